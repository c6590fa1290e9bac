"""The critic's loss."""

from __future__ import annotations

import torch
from torch import Tensor

from mmft.functional.masked import masked_mean, masked_var
from mmft.types import LossOutput

CLIP_FRACTION = "value/clip_fraction"


def clipped_value_loss(
    value_BT: Tensor, old_value_BT: Tensor, return_BT: Tensor, mask_BT: Tensor, clip_range: float | None
) -> LossOutput:
    """Half the mean squared error to the returns; a move of more than `clip_range` in one update earns nothing.

    Equation: E14
        L = 1/2 E[ max( (V_t - G_t)^2, (clip(V_t, V_old_t - c, V_old_t + c) - G_t)^2 ) ]

    G_t is the return of `mmft.functional.returns.gae`; at lam = 0 it is R_t + gamma V_old(s_{t+1}) and the unclipped
    loss is one half of E14's squared TD error.

    Args:
        value_BT: V_t, differentiable.
        old_value_BT: V_old_t of the rollout.
        return_BT: G_t.
        mask_BT: bool.
        clip_range: c, or None for the plain squared error.

    Returns:
        The loss with `value/clip_fraction` (positions whose clipped error is the larger).

    Source: Schulman et al. 2017 (PPO); the clipping is that of OpenAI baselines, see Engstrom et al. 2020,
    "Implementation Matters in Deep Policy Gradients", section 3.
    """
    # Masked before squaring: 0 times the NaN that padding may hold is NaN in the gradient.
    squared_BT = (value_BT - return_BT).masked_fill(~mask_BT, 0.0).square()
    clipped_squared_BT = squared_BT
    if clip_range is not None:
        clipped_BT = value_BT.clamp(old_value_BT - clip_range, old_value_BT + clip_range)
        clipped_squared_BT = (clipped_BT - return_BT).masked_fill(~mask_BT, 0.0).square()
    loss = 0.5 * masked_mean(torch.maximum(squared_BT, clipped_squared_BT), mask_BT)
    with torch.no_grad():
        metrics = {
            CLIP_FRACTION: masked_mean((clipped_squared_BT > squared_BT).float(), mask_BT),
        }
    return LossOutput(loss, metrics)


def explained_variance(value_BT: Tensor, return_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """1 - Var(G - V) / Var(G) over kept positions: 1 is a perfect critic, 0 no better than a constant, and 0 where the
    returns do not vary.
    """
    total = masked_var(return_BT, mask_BT, unbiased=False)
    residual = masked_var(return_BT - value_BT, mask_BT, unbiased=False)
    # Returns that are constant have a variance of rounding noise, not 0.
    noise = (16 * torch.finfo(total.dtype).eps) ** 2 * masked_mean(return_BT.square(), mask_BT)
    return torch.where(total > noise, 1.0 - residual / total.clamp(min=torch.finfo(total.dtype).tiny), 0.0)
