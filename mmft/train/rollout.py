"""Sampling responses and scoring them token by token, the two passes of a rollout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from mmft.functional.masked import masked_mean, response_mask
from mmft.models.generation import generate
from mmft.models.prompts import Prompt
from mmft.models.scoring import TokenScores, pack

# Mean |log pi(sampled) - log pi(recomputed)| in nats above which sampling and learning are not about the same policy.
_MISMATCH = {torch.float32: 0.02, torch.bfloat16: 0.3, torch.float16: 0.1}


def sample(
    policy: Any,
    prompts: Sequence[Prompt],
    config: GenerationConfig,
    stops: Sequence[int],
    pad_id: int,
    batch: int,
    scores: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(responses_BT, mask_BT, finished_B, sampled log-probabilities or None). Nothing is left after the first EOS."""
    responses_BT, logprobs_BT = generate(policy, prompts, config, pad_id, batch, scores)
    mask_BT = response_mask(responses_BT, stops, None)  # a sampled padding token is a token like any other
    finished_B = torch.isin(responses_BT, torch.tensor(stops, device=responses_BT.device)).any(1)
    return responses_BT.masked_fill(~mask_BT, pad_id), mask_BT, finished_B, logprobs_BT


@torch.no_grad()
def score(
    model: nn.Module,
    prompts: Sequence[Prompt],
    responses_BT: Tensor,
    mask_BT: Tensor,
    batches: Sequence[Tensor],
    pad_id: int,
    values: bool = True,
) -> TokenScores:
    """Log-probabilities and values of all rows, computed in the micro-batches `batches` (index tensors that cover
    every row).

    The update's first epoch uses the same micro-batches, so its first ratio compares equal arithmetic and is exactly 1.
    """
    shape = responses_BT.shape
    logprobs_BT = torch.zeros(shape, device=responses_BT.device)
    value_BT = torch.zeros(shape, device=responses_BT.device)
    for index in batches:
        scores = forward(model, prompts, responses_BT, mask_BT, index, pad_id, values, with_entropy=False)
        # What fills a short row may itself be a banned token, of probability 0.
        logprobs_BT[index] = scores.logprobs_BT.masked_fill(~mask_BT[index], 0.0)
        if scores.value_BT is not None:
            value_BT[index] = scores.value_BT
    return TokenScores(logprobs_BT, None, value_BT)


def forward(
    model: nn.Module,
    prompts: Sequence[Prompt],
    responses_BT: Tensor,
    mask_BT: Tensor,
    index: Tensor,
    pad_id: int,
    values: bool = True,
    with_entropy: bool = True,
) -> TokenScores:
    """One micro-batch through policy and critic. Rows and their pictures are picked together, by one index."""
    device = responses_BT.device
    picked = [prompts[i] for i in index.tolist()]
    inputs, index_BT = pack(picked, responses_BT[index], mask_BT[index], pad_id)
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    return model(inputs, index_BT.to(device), responses_BT[index], values=values, with_entropy=with_entropy)


def check_sampling(sampled_BT: Tensor, scored_BT: Tensor, mask_BT: Tensor, dtype: torch.dtype) -> None:
    """Raises RuntimeError where the forward pass disagrees with what `generate` sampled from.

    Padding, positions, per-token inputs or pictures then reach the model differently in the two, and every ratio
    would be wrong.
    """
    gap = masked_mean((sampled_BT - scored_BT).abs(), mask_BT).item()
    if gap > _MISMATCH.get(dtype, 0.02):
        raise RuntimeError(
            f"sampled and recomputed log-probabilities differ by {gap:.3f} nats a token: this model's generate() and "
            "forward() do not see the same input, so PPO's ratios would be wrong"
        )
