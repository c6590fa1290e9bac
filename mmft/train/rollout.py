"""Scoring sampled responses token by token, and whether sampling and scoring agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mmft.functional.masked import masked_mean
from mmft.models.interface import Interface
from mmft.models.prompts import Prompt
from mmft.models.scoring import TokenScores

# Mean |log pi(sampled) - log pi(recomputed)| in nats above which sampling and learning are not about the same policy.
_MISMATCH = {torch.float32: 0.02, torch.bfloat16: 0.3, torch.float16: 0.1}


@torch.no_grad()
def score(
    model: nn.Module,
    interface: Interface,
    prompts: Sequence[Prompt],
    responses_BT: Tensor,
    mask_BT: Tensor,
    batches: Sequence[Tensor],
    values: bool = True,
    between: Callable[[], None] | None = None,
) -> TokenScores:
    """Log-probabilities and values of all rows, computed in the micro-batches `batches` (index tensors that cover
    every row); `between` is called before each.

    The update's first epoch uses the same micro-batches, so its first ratio compares equal arithmetic and is exactly 1.
    """
    zeros = torch.zeros(responses_BT.shape, device=responses_BT.device)
    whole = TokenScores(zeros, None, zeros.clone())
    for index in batches:
        if between is not None:
            between()
        scores = forward(model, interface, prompts, responses_BT, mask_BT, index, values, with_entropy=False)
        put(whole, index, scores, mask_BT)
    return whole


def put(whole: TokenScores, index: Tensor, scores: TokenScores, mask_BT: Tensor) -> None:
    """Writes the scores of the rows `index` into those of the batch, without their graph."""
    # What fills a short row may itself be a banned token, of probability 0.
    whole.logprobs_BT[index] = scores.logprobs_BT.detach().masked_fill(~mask_BT[index], 0.0)
    if scores.value_BT is not None:
        whole.value_BT[index] = scores.value_BT.detach()


def forward(
    model: nn.Module,
    interface: Interface,
    prompts: Sequence[Prompt],
    responses_BT: Tensor,
    mask_BT: Tensor,
    index: Tensor,
    values: bool = True,
    with_entropy: bool = True,
    entropy_grad: bool = False,
) -> TokenScores:
    """One micro-batch through policy and critic. Rows and their pictures are picked together, by one index."""
    picked = [prompts[i] for i in index.tolist()]
    packed = interface.pack(picked, responses_BT[index], mask_BT[index])
    with interface.prepacked():
        return model(packed, responses_BT[index], values=values, with_entropy=with_entropy, entropy_grad=entropy_grad)


def check_sampling(sampled_BT: Tensor, scored_BT: Tensor, mask_BT: Tensor, dtype: torch.dtype) -> None:
    """Raises RuntimeError where the forward pass disagrees with what `generate` sampled from.

    Padding, positions, per-token inputs or pictures then reach the model differently in the two, and every ratio
    would be wrong.
    """
    gap = masked_mean((sampled_BT - scored_BT).abs(), mask_BT).item()
    if not gap <= _MISMATCH.get(dtype, 0.02):  # NaN is no agreement
        raise RuntimeError(
            f"sampled and recomputed log-probabilities differ by {gap:.3f} nats a token: this model's generate() and "
            "forward() do not see the same input, so PPO's ratios would be wrong"
        )
