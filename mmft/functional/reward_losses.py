"""Losses of reward models: regression on ratings, pairs by preference, ratings with a learned noise level."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from mmft.functional.masked import masked_mean
from mmft.types import LossOutput

RMSE = "reward_model/rmse"
ACCURACY = "reward_model/accuracy"
MARGIN = "reward_model/margin"
SIGMA = "reward_model/sigma"
STANDARDIZED_RMSE = "reward_model/standardized_rmse"


def mse_loss(predicted_B: Tensor, target_B: Tensor) -> LossOutput:
    """Mean squared error of predicted rewards.

    Equation: E08
        L_MSE = 1/N sum_i (R_i - R_hat_i)^2

    Args:
        predicted_B: R_hat, differentiable.
        target_B: R, the ratings.

    Returns:
        The loss with `reward_model/rmse`, its root, in units of the ratings.

    Raises:
        ValueError: shapes that differ (broadcasting would compare every row with every other), or no rows.
    """
    _check_rows(predicted=predicted_B, target=target_B)
    loss = (target_B - predicted_B).square().mean()
    return LossOutput(loss, {RMSE: loss.detach().sqrt()})


def bradley_terry_loss(
    chosen_B: Tensor,
    rejected_B: Tensor,
    margin_B: Tensor | None = None,
    tie_mask_B: Tensor | None = None,
    weight_B: Tensor | None = None,
) -> LossOutput:
    """Negative log-likelihood of preferences between two samples.

        P(chosen > rejected) = sigmoid(d),   d = r_chosen - r_rejected
        L = -log sigmoid(d - margin)                                 one is better
        L = -1/2 log sigmoid(d) - 1/2 log sigmoid(-d)                a tie: both orders are equally likely

    A tie pulls the two scores together; which of its two samples is called chosen does not matter.

    Args:
        chosen_B: r_chosen, differentiable.
        rejected_B: r_rejected, differentiable.
        margin_B: by how much the better one should win at least; none by default, not read at ties.
        tie_mask_B: bool, True = a tie; none by default.
        weight_B: weight of each pair in the mean, >= 0 and not all 0; equal by default.

    Returns:
        The loss, averaged over pairs by weight, with `reward_model/accuracy` (pairs ordered rightly; equal scores
        count one half) and `reward_model/margin` (mean d), both over pairs that are no tie, each counted once
        whatever its weight; absent where every pair is a tie.

    Raises:
        ValueError: shapes that differ, no rows, negative weights or weights that sum to 0.

    Source: Bradley & Terry 1952, "Rank Analysis of Incomplete Block Designs"; the margin: Touvron et al. 2023,
    "Llama 2: Open Foundation and Fine-Tuned Chat Models", section 3.2.2, eq. 2.
    """
    _check_rows(chosen=chosen_B, rejected=rejected_B, margin=margin_B, tie_mask=tie_mask_B, weight=weight_B)
    tie_mask_B = torch.zeros_like(chosen_B, dtype=torch.bool) if tie_mask_B is None else tie_mask_B
    d_B = chosen_B - rejected_B
    # Replaced before any arithmetic: the margin of a tie may be NaN, for "none was given".
    margin_B = torch.zeros_like(d_B) if margin_B is None else margin_B.masked_fill(tie_mask_B, 0.0)
    # -log sigmoid(x) = softplus(-x), exact where sigmoid(x) itself would round to 0 or 1.
    loss_B = torch.where(tie_mask_B, 0.5 * (softplus(-d_B) + softplus(d_B)), softplus(margin_B - d_B))
    metrics = {}
    if not tie_mask_B.all():
        ordered_B = 0.5 * (1.0 + d_B.detach().sign())
        metrics = {ACCURACY: masked_mean(ordered_B, ~tie_mask_B), MARGIN: masked_mean(d_B.detach(), ~tie_mask_B)}
    return LossOutput(_weighted_mean(loss_B, weight_B), metrics)


def aleatoric_loss(mean_B: Tensor, log_variance_B: Tensor, target_B: Tensor) -> LossOutput:
    """Regression with a predicted noise level (heteroscedastic Gaussian likelihood).

    Equation: E33
        L = 1/N sum_i [ (y_i - y_hat_i)^2 / (2 sigma_i^2) + 1/2 log sigma_i^2 ]

    Written in s = log sigma^2, which needs no division and no bound to stay positive:
        L = 1/N sum_i [ 1/2 exp(-s_i) (y_i - y_hat_i)^2 + 1/2 s_i ]

    It is the negative log-likelihood without its constant 1/2 log 2 pi, so it can be negative.

    Args:
        mean_B: y_hat, differentiable.
        log_variance_B: s, differentiable.
        target_B: y, the ratings.

    Returns:
        The loss with `reward_model/rmse`, `reward_model/sigma` (mean sigma) and `reward_model/standardized_rmse`
        (root mean square of (y - y_hat) / sigma: 1 is calibrated, above 1 too sure).

    Raises:
        ValueError: shapes that differ, or no rows.

    Source: Kendall & Gal 2017, "What Uncertainties Do We Need in Bayesian Deep Learning for Computer Vision?", eq. 8.
    """
    _check_rows(mean=mean_B, log_variance=log_variance_B, target=target_B)
    squared_B = (target_B - mean_B).square()
    standardized_B = squared_B * (-log_variance_B).exp()
    loss = 0.5 * (standardized_B + log_variance_B).mean()
    with torch.no_grad():
        metrics = {
            RMSE: squared_B.mean().sqrt(),
            SIGMA: (0.5 * log_variance_B).exp().mean(),
            STANDARDIZED_RMSE: standardized_B.mean().sqrt(),
        }
    return LossOutput(loss, metrics)


def _weighted_mean(x_B: Tensor, weight_B: Tensor | None) -> Tensor:
    if weight_B is None:
        return x_B.mean()
    if (weight_B < 0).any() or not weight_B.sum() > 0:
        raise ValueError("weights must not be negative, and at least one must be positive")
    return (weight_B * x_B).sum() / weight_B.sum()


def _check_rows(**columns: Tensor | None) -> None:
    """All given columns are vectors of one length, at least 1."""
    shapes = {name: tuple(column.shape) for name, column in columns.items() if column is not None}
    first = next(iter(shapes.values()))
    if len(first) != 1 or first[0] == 0 or set(shapes.values()) != {first}:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"one number a row is needed, of the same rows, at least one; got {listed}")
