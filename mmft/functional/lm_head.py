"""Log-probabilities and entropy of tokens straight from hidden states, without keeping logits.

Logits of N states over a vocabulary V are computed some rows at a time and thrown away: memory is that of one chunk,
whatever N x V is. With a frozen output layer the gradient is found in the same pass. d log pi(a)/dh does not depend on
the loss, so it is computed while the chunk's logits are there, D numbers a token, and the backward pass only scales it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Logits held at once: 2**22 in fp32 are 16 MB, small beside any model, large enough to be fast.
CHUNK_ELEMENTS = 2**22
# So many chunks of a trained head's logits are kept for the backward pass before they are computed anew in it.
_KEPT_CHUNKS = 2
# A log-probability of a token that cannot be: -inf times its probability 0 would be NaN.
_LEAST = -1e4


@dataclass(frozen=True)
class Forbidden:
    """Tokens that sampling could not choose: `always` (K,) int64, and `early` (S,) int64 where `is_early_N` is True."""

    always: Tensor
    early: Tensor
    is_early_N: Tensor | None = None

    def rows(self, start: int, stop: int) -> Forbidden:
        part = None if self.is_early_N is None else self.is_early_N[start:stop]
        return Forbidden(self.always, self.early, part)

    def mask_(self, logits_NV: Tensor) -> Tensor:
        """In place: -inf where a token is forbidden."""
        if len(self.always):
            logits_NV.index_fill_(-1, self.always, float("-inf"))
        if self.is_early_N is not None and len(self.early) and bool(self.is_early_N.any()):
            logits_NV[self.is_early_N[:, None].nonzero()[:, :1], self.early[None, :]] = float("-inf")
        return logits_NV


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to its output layer's logits: z' = scale * z, then cap * tanh(z' / cap) if there is a cap."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def slope(self, transformed: Tensor) -> Tensor | float:
        """dz'/dz as a function of z'."""
        return self.scale if self.cap is None else self.scale * (1 - (transformed / self.cap).square())


def head_logprobs(
    head: nn.Module,
    states_ND: Tensor,
    tokens_N: Tensor,
    forbidden: Forbidden,
    temperature: float = 1.0,
    transform: LogitTransform | None = None,
    with_entropy: bool = True,
    entropy_grad: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log pi(token) under softmax(logits / temperature), and the entropy of that distribution in nats, both in fp32.

        log pi(a) = z_a - logsumexp(z),   z = transform(head(h)) / temperature
        d log pi(a) / dh = W^T (onehot(a) - pi) * z'          H = -sum_v pi_v log pi_v

    Args:
        head: the output layer, states (.., D) -> logits (.., V); a frozen `nn.Linear` takes the fast way.
        states_ND: hidden states. tokens_N: int64.
        with_entropy: compute it; entropy_grad: it is part of a loss (a second product a chunk).

    Returns:
        logprobs_N and entropy_N, None where it is not asked for.
    """
    transform = transform or LogitTransform()
    frozen = type(head) is nn.Linear and not any(p.requires_grad for p in head.parameters())
    if frozen:
        logprobs, entropy = _FrozenHead.apply(
            states_ND, head.weight, head.bias, tokens_N, forbidden, temperature, transform, with_entropy, entropy_grad
        )
        return logprobs, entropy if with_entropy else None
    return _checkpointed(head, states_ND, tokens_N, forbidden, temperature, transform, with_entropy)


def _distribution(logits: Tensor, forbidden: Forbidden, temperature: float, transform: LogitTransform) -> Tensor:
    z = transform(logits.float() if logits.dtype != torch.float64 else logits)
    z = z.clone() if z is logits else z
    if temperature != 1.0:
        z.div_(temperature)
    return forbidden.mask_(z)


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, forbidden: Forbidden,
        temperature: float, transform: LogitTransform, with_entropy: bool, entropy_grad: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        n, wide = len(states), torch.float64 if states.dtype == torch.float64 else torch.float32
        needs_grad = ctx.needs_input_grad[0]
        logprobs, entropy = states.new_zeros(n, dtype=wide), states.new_zeros(n, dtype=wide)
        d_logprob = torch.empty_like(states) if needs_grad else None
        d_entropy = torch.empty_like(states) if needs_grad and with_entropy and entropy_grad else None
        rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
        for start in range(0, n, rows):
            part = slice(start, min(start + rows, n))
            z = nn.functional.linear(states[part], weight, bias)
            z = _distribution(z, forbidden.rows(part.start, part.stop), temperature, transform)
            chosen = tokens[part].unsqueeze(-1)
            slope = transform.slope(z * temperature) if needs_grad and transform.cap is not None else transform.scale
            z -= z.logsumexp(-1, keepdim=True)
            logprobs[part] = z.gather(-1, chosen).squeeze(-1)
            if not (with_entropy or needs_grad):
                continue
            p = z.exp()
            if with_entropy:
                z.clamp_(min=_LEAST)
                if d_entropy is not None:
                    entropy[part] = -(p * z).sum(-1)
                    g = -p * (z + entropy[part].unsqueeze(-1))
                    d_entropy[part] = _through(g, slope, temperature, weight)
                else:
                    entropy[part] = -z.mul_(p).sum(-1)  # in place: these are passes over N x V numbers
            if d_logprob is not None:
                g = p.neg_()
                g.scatter_add_(-1, chosen, torch.ones_like(g[:, :1]))
                d_logprob[part] = _through(g, slope, temperature, weight)
        ctx.save_for_backward(d_logprob, d_entropy)
        if not (with_entropy and entropy_grad):
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g_logprob: Tensor, g_entropy: Tensor) -> tuple[Any, ...]:
        d_logprob, d_entropy = ctx.saved_tensors
        grad = g_logprob.unsqueeze(-1) * d_logprob
        if d_entropy is not None:
            grad = grad + g_entropy.unsqueeze(-1) * d_entropy
        return (grad.to(d_logprob.dtype), *(None,) * 8)


def _through(g: Tensor, slope: Tensor | float, temperature: float, weight: Tensor) -> Tensor:
    """A gradient at z back to the states, through temperature, transform and the output layer."""
    if isinstance(slope, Tensor):
        # a forbidden token's logit is -inf and its slope means nothing; nor does its g, where it fills a short row
        g = torch.where(slope.isfinite(), g * slope, 0.0)
        slope = 1.0
    return (g.to(weight.dtype) @ weight) * (slope / temperature)


def _checkpointed(
    head: nn.Module, states: Tensor, tokens: Tensor, forbidden: Forbidden, temperature: float,
    transform: LogitTransform, with_entropy: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Any output layer, trained or not: unless they are few, logits are computed again in the backward pass."""

    def of(start: int, stop: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        def scores(chunk: Tensor) -> tuple[Tensor, Tensor]:
            z = _distribution(head(chunk), forbidden.rows(start, stop), temperature, transform)
            logprobs = z.log_softmax(-1)
            p = logprobs.exp()
            entropy = -(p * logprobs.masked_fill(p == 0, 0.0)).sum(-1) if with_entropy else p[:, 0]
            return logprobs.gather(-1, tokens[start:stop].unsqueeze(-1)).squeeze(-1), entropy

        return scores

    with torch.no_grad():
        vocabulary = head(states[:1]).shape[-1]
    rows = max(1, CHUNK_ELEMENTS // vocabulary)
    few = len(states) <= _KEPT_CHUNKS * rows
    parts = []
    for start in range(0, len(states), rows):
        chunk, scores = states[start : start + rows], of(start, min(start + rows, len(states)))
        parts.append(scores(chunk) if few else checkpoint(scores, chunk, use_reentrant=False))
    logprobs, entropy = (torch.cat(items) for items in zip(*parts, strict=True))
    return logprobs, entropy if with_entropy else None
