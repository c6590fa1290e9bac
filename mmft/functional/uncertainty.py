"""How sure a reward model is: moments over dropout samples, predictive intervals, and their calibration."""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor


def mc_dropout_moments(samples_TB: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and epistemic variance of predictions sampled with dropout left on.

    Equation: E18
        y_bar = 1/T sum_t f_t(s),   Var(y) = 1/T sum_t (f_t(s) - y_bar)^2

    Args:
        samples_TB: f_t(s), one row for each of the T dropout masks (here T counts masks, not tokens).

    Returns:
        (mean_B, variance_B). One mask alone has variance 0.

    Raises:
        ValueError: not a matrix, or no samples.

    Source: Gal & Ghahramani 2016, "Dropout as a Bayesian Approximation", section 4, without the term of a noise level
    fixed beforehand: noise is the aleatoric part, see `predictive_sigma`.
    """
    if samples_TB.dim() != 2 or len(samples_TB) == 0:
        raise ValueError(f"samples must be T x B with at least one sample, got {tuple(samples_TB.shape)}")
    mean_B = samples_TB.mean(0)
    return mean_B, (samples_TB - mean_B).square().mean(0)


def predictive_sigma(epistemic_variance_B: Tensor, aleatoric_variance_B: Tensor) -> Tensor:
    """Standard deviation of a rating: what the model does not know and what raters disagree on, together.

        Var(y) = Var_f(E[y | f]) + E_f[Var(y | f)]    (law of total variance)

    Args:
        epistemic_variance_B: Var_f(E[y | f]), the variance of the mean over dropout masks.
        aleatoric_variance_B: E_f[Var(y | f)], the predicted noise, averaged over dropout masks as a *variance*.

    Returns:
        sigma_B.

    Source: Kendall & Gal 2017, eq. 9.
    """
    if epistemic_variance_B.shape != aleatoric_variance_B.shape:
        shapes = f"{tuple(epistemic_variance_B.shape)} and {tuple(aleatoric_variance_B.shape)}"
        raise ValueError(f"the two variances must have one shape, got {shapes}")
    return (epistemic_variance_B + aleatoric_variance_B).sqrt()


def normal_interval(mean_B: Tensor, sigma_B: Tensor, level: float = 0.9) -> tuple[Tensor, Tensor]:
    """(low_B, high_B), the central interval that holds a normal variable with probability `level`.

    low, high = mean -+ z sigma,   z = Phi^-1((1 + level) / 2)
    """
    half_width_B = normal_quantile(level) * sigma_B
    return mean_B - half_width_B, mean_B + half_width_B


def sigma_scale(error_B: Tensor, sigma_B: Tensor, level: float = 0.9) -> float:
    """The factor by which sigma must be multiplied so that intervals of `level` cover that share of held-out errors.

        score_i = |error_i| / sigma_i
        q = the k-th smallest score,  k = ceil((n + 1) level)
        factor = q / Phi^-1((1 + level) / 2)

    With the n errors held out from training, `normal_interval(mean, factor * sigma, level)` covers a new exchangeable
    rating with probability at least `level`, and at most `level` + 1 / (n + 1), whatever the errors' distribution.
    At other levels coverage rests on the errors being normal.

    Args:
        error_B: target - mean of n held-out samples; the sign does not matter.
        sigma_B: their predicted standard deviations, positive.
        level: in (0, 1).

    Raises:
        ValueError: too few errors for the level (k > n: no finite interval is guaranteed), a sigma that is not
            positive, or a number that is not finite.

    Source: split conformal prediction with normalised scores, Lei et al. 2018, "Distribution-Free Predictive Inference
    for Regression", sections 2.2 and 5.2.
    """
    z = normal_quantile(level)
    if error_B.dim() != 1 or error_B.shape != sigma_B.shape:
        raise ValueError(
            f"error and sigma must be one number a row, got {tuple(error_B.shape)}, {tuple(sigma_B.shape)}"
        )
    if not (sigma_B > 0).all():
        raise ValueError("every sigma must be positive")
    score_B = error_B.double().abs() / sigma_B.double()
    if not torch.isfinite(score_B).all():
        raise ValueError("every error and sigma must be finite")
    n = len(score_B)
    k = math.ceil((n + 1) * level - 1e-9)  # 0.9 x 20 must not become 19 by rounding
    if k > n:
        needed = math.ceil(level / (1.0 - level) - 1e-9)
        raise ValueError(
            f"{n} held-out errors cannot calibrate intervals of level {level}: at least {needed} are needed"
        )
    return score_B.kthvalue(k).values.item() / z


def normal_quantile(level: float) -> float:
    """z such that a standard normal variable lies in [-z, z] with probability `level`."""
    if not 0.0 < level < 1.0:
        raise ValueError(f"the level of an interval must be between 0 and 1, got {level}")
    return NormalDist().inv_cdf(0.5 * (1.0 + level))


def mahalanobis(x_BD: Tensor, mean_D: Tensor, precision_DD: Tensor) -> Tensor:
    """Squared distance of each row from a Gaussian's centre in units of its spread -> (B,).

        d^2 = (x - mu)^T Sigma^-1 (x - mu)

    Source: Lee et al. 2018, "A Simple Unified Framework for Detecting Out-of-Distribution Samples".
    """
    centred_BD = x_BD - mean_D
    return ((centred_BD @ precision_DD) * centred_BD).sum(-1)


def distance_variance(distance_B: Tensor, limit: float, prior_variance: float) -> Tensor:
    """What a prediction far from all training inputs is uncertain by, which dropout does not see.

        Var = prior (1 - exp(-max(0, d^2 / limit - 1)))

    0 up to `limit`, within which training inputs lie; far beyond it the prior variance, that of predictions over the
    training set: nothing learned holds there. A Gaussian process behaves so.

    Source: the requirement of distance awareness, Liu et al. 2020, "Simple and Principled Uncertainty Estimation with
    Deterministic Deep Learning via Distance Awareness", section 2.
    """
    return prior_variance * -torch.expm1(-(distance_B / limit - 1.0).clamp(min=0.0))
