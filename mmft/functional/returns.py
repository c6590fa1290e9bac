"""Returns and temporal differences. `value_BT[:, t]` is V(s_t), before token t; `next_value_BT[:, t]` is V(s_{t+1})."""

from __future__ import annotations

import torch
from torch import Tensor

from mmft.functional.masked import masked_mean
from mmft.types import LossOutput

TD_ERROR_MEAN = "value/td_error_mean"


def td_error(reward_BT: Tensor, value_BT: Tensor, next_value_BT: Tensor, gamma: float) -> Tensor:
    """One-step temporal difference.

    Equation: E09
        delta_t = R_t + gamma V(s_{t+1}) - V(s_t)

    Any one shape; V(s_{t+1}) of a terminal state must be given as 0.
    Source: Sutton 1988, "Learning to Predict by the Methods of Temporal Differences".
    """
    return reward_BT + gamma * next_value_BT - value_BT


def td_loss(reward_BT: Tensor, value_BT: Tensor, next_value_BT: Tensor, mask_BT: Tensor, gamma: float) -> LossOutput:
    """Mean squared TD error over the kept positions.

    Equation: E09
        L_TD = E[ (R_t + gamma V(s_{t+1}) - V(s_t))^2 ]

    The target R_t + gamma V(s_{t+1}) is held fixed (semi-gradient TD), as the field does: with its gradient the loss
    is the Bellman residual, which converges to another value function in stochastic problems (Baird 1995).
    """
    delta_BT = td_error(reward_BT, value_BT, next_value_BT.detach(), gamma).masked_fill(~mask_BT, 0.0)
    loss = masked_mean(delta_BT.square(), mask_BT)
    return LossOutput(loss, {TD_ERROR_MEAN: masked_mean(delta_BT.detach(), mask_BT)})


@torch.no_grad()
def gae(reward_BT: Tensor, value_BT: Tensor, mask_BT: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over complete responses.

    Equation: E09
        delta_t = R_t + gamma V(s_{t+1}) - V(s_t)
        A_t     = delta_t + gamma lam A_{t+1},    A_T = 0
        return_t = A_t + V(s_t)

    A response is an episode: V is 0 outside the mask and after the last position, so no value is bootstrapped past
    the end. The mask does nothing else; in particular rewards are used as given, and those outside must be 0.
    TRL's layout, which credits the score one position after EOS, follows from a mask one position longer.

    Args:
        reward_BT: rewards, 0 after the end of a response.
        value_BT: V(s_t); anything outside the mask.
        mask_BT: bool.
        gamma: discount in [0, 1].
        lam: in [0, 1]; 0 gives one-step TD errors, 1 Monte Carlo returns minus the baseline.

    Returns:
        advantage_BT, return_BT, both without gradient.

    Source: Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage Estimation", eq. 16.
    """
    value_BT = value_BT.masked_fill(~mask_BT, 0.0)
    next_value_BT = torch.cat([value_BT[:, 1:], torch.zeros_like(value_BT[:, :1])], dim=1)
    delta_BT = td_error(reward_BT, value_BT, next_value_BT, gamma)
    advantage_BT = torch.empty_like(delta_BT)
    running_B = torch.zeros_like(delta_BT[:, 0])
    for t in reversed(range(delta_BT.shape[1])):
        running_B = delta_BT[:, t] + gamma * lam * running_B
        advantage_BT[:, t] = running_B
    return advantage_BT, advantage_BT + value_BT


def discounted_return(reward_BT: Tensor, mask_BT: Tensor, gamma: float) -> Tensor:
    """Discounted sum of the rewards of each row; its mean over rows estimates the objective.

    Equation: E04
        J(pi) = E_pi[ sum_t gamma^t R(s_t, a_t) ]

    Args:
        reward_BT: rewards; anything outside the mask.
        mask_BT: bool.
        gamma: discount in [0, 1]; t counts positions from the start of the response.

    Returns:
        return_B.
    """
    steps = torch.arange(reward_BT.shape[1], device=reward_BT.device)
    discount_T = torch.pow(torch.tensor(gamma, dtype=reward_BT.dtype, device=reward_BT.device), steps)
    return (reward_BT.masked_fill(~mask_BT, 0.0) * discount_T).sum(1)


def credit_score(reward_BT: Tensor, score_B: Tensor, last_index_B: Tensor) -> Tensor:
    """A copy of `reward_BT` with each row's score added at its own position `last_index_B` (int64), usually EOS."""
    return reward_BT.scatter_add(1, last_index_B.unsqueeze(1), score_B.to(reward_BT.dtype).unsqueeze(1))
