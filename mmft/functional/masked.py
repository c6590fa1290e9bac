"""Masked statistics, token log-probabilities and response masks. Every mask is True = keep.

Entries outside a mask may hold anything, NaN included: they are replaced before any arithmetic, never multiplied by 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Rows of logits turned to fp32 at once: 2**22 elements are 16 MB, small beside any model, large enough to be fast.
_CHUNK_ELEMENTS = 2**22


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of `x` where `mask` is True, over `dim` or over everything; 0 where nothing is kept.

    Args:
        x: any shape.
        mask: bool, the shape of `x`.

    Raises:
        ValueError: the shapes differ. Broadcasting here would hide a transposed or forgotten dimension.
    """
    if x.shape != mask.shape:
        raise ValueError(f"x and mask must have one shape, got {tuple(x.shape)} and {tuple(mask.shape)}")
    kept = torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))
    if dim is None:
        return kept.sum() / mask.sum().clamp(min=1)
    return kept.sum(dim) / mask.sum(dim).clamp(min=1)


def masked_var(x: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Variance of `x` where `mask` is True; `unbiased` divides by n - 1. Fewer than two entries have variance 0."""
    variance = masked_mean((x - masked_mean(x, mask)).square(), mask)
    if unbiased:
        n = mask.sum()
        variance = variance * (n / (n - 1).clamp(min=1))
    return variance


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """`x` scaled to unit variance, and to zero mean if `shift_mean`, with the statistics of the kept entries.

        y = (x - mean) / sqrt(var + 1e-8)    (+ mean, unless shift_mean)

    Returns the shape of `x`, 0 outside the mask. The constant 1e-8 inside the root is that of TRL and of
    Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", so numbers agree with both.
    """
    mean = masked_mean(x, mask)
    whitened = (x - mean) * torch.rsqrt(masked_var(x, mask) + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return whitened.masked_fill(~mask, 0.0)


def token_logprobs(logits_BTV: Tensor, tokens_BT: Tensor, temperature: float = 1.0) -> Tensor:
    """log pi(token) under softmax(logits / temperature), in fp32 (fp64 stays fp64).

        log pi(a) = z_a - logsumexp(z),  z = logits / temperature

    Only a few rows are held in fp32 at a time, and B x T x V log-probabilities are never formed.

    Args:
        logits_BTV: floating point, (..., V); -inf marks tokens that cannot be sampled.
        tokens_BT: int64, (...).
        temperature: the one the tokens were sampled at; another one would make the policy ratio wrong.

    Returns:
        logprobs_BT.
    """
    _check_temperature(temperature)
    flat_logits, flat_tokens = logits_BTV.reshape(-1, logits_BTV.shape[-1]), tokens_BT.reshape(-1)
    if len(flat_logits) != len(flat_tokens):
        raise ValueError(f"logits {tuple(logits_BTV.shape)} and tokens {tuple(tokens_BT.shape)} do not match")
    rows = _rows_per_chunk(flat_logits)
    chunks = []
    for logits, tokens in zip(flat_logits.split(rows), flat_tokens.split(rows), strict=True):
        z = _tempered(logits, temperature)
        chunks.append(z.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - z.logsumexp(-1))
    return torch.cat(chunks).view(tokens_BT.shape)


def entropy(logits_BTV: Tensor, temperature: float = 1.0) -> Tensor:
    """Shannon entropy in nats of softmax(logits / temperature), in fp32: H = -sum_a pi(a) log pi(a).

    Tokens at -inf (banned from sampling) count as 0, in the value and in the gradient.

    Args:
        logits_BTV: floating point, (..., V).

    Returns:
        entropy_BT, (...).
    """
    _check_temperature(temperature)
    flat_logits = logits_BTV.reshape(-1, logits_BTV.shape[-1])
    chunks = []
    for logits in flat_logits.split(_rows_per_chunk(flat_logits)):
        logprobs = _tempered(logits, temperature).log_softmax(-1)
        probs = logprobs.exp()
        chunks.append(-(probs * logprobs.masked_fill(probs == 0, 0.0)).sum(-1))
    return torch.cat(chunks).view(logits_BTV.shape[:-1])


def response_mask(tokens_BT: Tensor, eos_ids: int | Sequence[int] | None, pad_id: int | None) -> Tensor:
    """Which generated tokens belong to the response: all up to and including the first EOS.

    Nothing after the first EOS is kept, whatever it is, so `pad_id` may equal an EOS id. In a row without EOS the
    trailing run of padding is dropped too; a padding token that was sampled *inside* a response stays.

    Args:
        tokens_BT: int64, response positions only.
        eos_ids: one id, several, or None where nothing stops a response.
        pad_id: filler of the batch, or None.

    Returns:
        mask_BT, bool. True positions are contiguous from 0.
    """
    ids = [] if eos_ids is None else [eos_ids] if isinstance(eos_ids, int) else list(eos_ids)
    is_eos = torch.isin(tokens_BT, torch.tensor(ids, dtype=tokens_BT.dtype, device=tokens_BT.device))
    # Number of EOS strictly before t: the first EOS itself is kept.
    keep = (is_eos.cumsum(1) - is_eos.long()) == 0
    if pad_id is None or pad_id in ids:
        return keep
    has_text_from_t = (tokens_BT != pad_id).flip(1).cumsum(1).flip(1) > 0
    return keep & has_text_from_t


def last_index(mask_BT: Tensor) -> Tensor:
    """Position of the last True of each row, int64 (B); 0 for an empty row, so that it can always index."""
    positions = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    return (positions * mask_BT).amax(1)


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits if temperature == 1.0 else logits / temperature


def _rows_per_chunk(flat_logits: Tensor) -> int:
    return max(1, _CHUNK_ELEMENTS // flat_logits.shape[-1])


def _check_temperature(temperature: float) -> None:
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
