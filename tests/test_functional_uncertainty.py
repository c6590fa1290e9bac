"""Moments of dropout samples, intervals and their calibration against hand arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from mmft.functional.uncertainty import (
    distance_variance,
    mahalanobis,
    mc_dropout_moments,
    normal_interval,
    normal_quantile,
    predictive_sigma,
    sigma_scale,
)

Z90 = 1.6448536269514722  # Phi^-1(0.95), any table


def test_mc_dropout_moments_by_hand():
    # [1, 3, 5]: mean 3, variance (4 + 0 + 4) / 3, by T and not T - 1.   [0, 0, 6]: mean 2, (4 + 4 + 16) / 3 = 8
    mean, variance = mc_dropout_moments(torch.tensor([[1.0, 0.0], [3.0, 0.0], [5.0, 6.0]]))
    assert_close(mean, torch.tensor([3.0, 2.0]))
    assert_close(variance, torch.tensor([8 / 3, 8.0]))


def test_one_sample_has_no_variance():
    mean, variance = mc_dropout_moments(torch.tensor([[1.0, 2.0]]))
    assert mean.tolist() == [1.0, 2.0]
    assert variance.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("shape", [(0, 3), (3,), (2, 2, 2)])
def test_moments_need_samples(shape):
    with pytest.raises(ValueError, match="T x B"):
        mc_dropout_moments(torch.zeros(shape))


def test_predictive_sigma_by_hand():
    assert_close(predictive_sigma(torch.tensor([9.0, 0.0]), torch.tensor([16.0, 4.0])), torch.tensor([5.0, 2.0]))
    with pytest.raises(ValueError, match="one shape"):
        predictive_sigma(torch.zeros(2), torch.zeros(1))


def test_normal_interval_by_hand():
    low, high = normal_interval(torch.tensor([10.0]), torch.tensor([2.0]), level=0.9)
    assert_close(low, torch.tensor([10.0 - 2 * Z90]))
    assert_close(high, torch.tensor([10.0 + 2 * Z90]))
    assert normal_quantile(0.95) == pytest.approx(1.959963984540054, abs=1e-12)


@pytest.mark.parametrize("level", [0.0, 1.0, 90.0, -0.1])
def test_levels_are_shares(level):
    with pytest.raises(ValueError, match="between 0 and 1"):
        normal_interval(torch.zeros(1), torch.ones(1), level)


def test_sigma_scale_by_hand():
    # |error| / sigma = 1, ..., 19 in some order. k = ceil(20 x 0.9) = 18 (in floating point exactly 18), so q = 18;
    # at level 0.5 k = 10.
    error = torch.arange(1.0, 20.0)[torch.randperm(19)] * torch.tensor([2.0, -2.0]).repeat(10)[:19]
    sigma = torch.full((19,), 2.0)
    assert sigma_scale(error, sigma, 0.9) == pytest.approx(18 / Z90, rel=1e-6)
    assert sigma_scale(error, sigma, 0.5) == pytest.approx(10 / 0.6744897501960817, rel=1e-6)


def test_errors_are_compared_with_their_own_sigma():
    # Errors of 3 where sigma is 1, of 30 where it is 10: every score is 3.
    sigma = torch.tensor([1.0, 10.0]).repeat(5)
    assert sigma_scale(3 * sigma, sigma, 0.9) == pytest.approx(3 / Z90, rel=1e-6)


def test_scaled_intervals_cover_as_promised():
    # Errors far from normal (exponential), sigma far from right. Of the n = 199 errors that calibrated, k = 180 lie
    # within; of 100 000 new ones a share of about 0.9: its standard deviation over calibration sets is
    # sqrt(0.9 x 0.1 / 201) = 0.021, here for the one seed of the suite.
    noise = torch.rand(100_199) + 0.1
    error = noise * torch.empty_like(noise).exponential_() * 5
    scale = sigma_scale(error[:199], noise[:199], 0.9)
    low, high = normal_interval(torch.zeros_like(noise), scale * noise, 0.9)
    inside = (low <= error) & (error <= high * (1 + 1e-5))  # the k-th error lies on the edge
    assert inside[:199].sum() == 180
    assert abs(inside[199:].float().mean() - 0.9) < 0.045


def test_too_few_errors_for_the_level():
    # k = ceil(9 x 0.9) = 9 > 8; with nine errors k = 9.
    with pytest.raises(ValueError, match="8 held-out errors .* at least 9"):
        sigma_scale(torch.ones(8), torch.ones(8), 0.9)
    assert sigma_scale(torch.ones(9), torch.ones(9), 0.9) == pytest.approx(1 / Z90)


@pytest.mark.parametrize(
    ("error", "sigma", "message"),
    [
        ([1.0] * 10, [1.0] * 9 + [0.0], "must be positive"),
        ([1.0] * 10, [1.0] * 9 + [float("nan")], "must be positive"),
        ([1.0] * 9 + [float("nan")], [1.0] * 10, "must be finite"),
        ([1.0] * 10, [1.0] * 11, "one number a row"),
    ],
)
def test_sigma_scale_refuses_nonsense(error, sigma, message):
    with pytest.raises(ValueError, match=message):
        sigma_scale(torch.tensor(error), torch.tensor(sigma))


def test_mahalanobis_by_hand() -> None:
    """Spread 2 along the first axis and 1 along the second: d^2 = (2 / 2)^2 + 3^2 = 10 and 0 at the centre."""
    mean, precision = torch.tensor([1.0, 0.0]), torch.diag(torch.tensor([0.25, 1.0]))
    x = torch.tensor([[3.0, 3.0], [1.0, 0.0]])
    assert_close(mahalanobis(x, mean, precision), torch.tensor([10.0, 0.0]))


def test_distance_variance_by_hand() -> None:
    """Nothing up to the limit; then prior (1 - exp(-(d^2 / limit - 1))): 4 (1 - e^-1) at twice the limit; prior far
    away.
    """
    variance = distance_variance(torch.tensor([0.0, 5.0, 10.0, 1e6]), 5.0, 4.0)
    assert_close(variance, torch.tensor([0.0, 0.0, 4 * (1 - math.exp(-1)), 4.0]))
