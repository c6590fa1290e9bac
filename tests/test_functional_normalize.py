"""Min-max, z-score and running statistics against hand arithmetic."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.testing import assert_close

from mmft.functional.normalize import RunningStats, minmax, zscore


def test_minmax_by_hand():
    x = torch.tensor([2.0, 3.0, 6.0])
    assert_close(minmax(x), torch.tensor([0.0, 0.25, 1.0]))  # (x - 2) / 4
    assert_close(minmax(x, low=3.0, high=5.0), torch.tensor([-0.5, 0.0, 1.5]))  # not clipped


def test_zscore_by_hand():
    x = torch.tensor([2.0, 4.0, 6.0])  # mean 4, population variance 8/3
    assert_close(zscore(x), torch.tensor([-2.0, 0.0, 2.0]) / math.sqrt(8 / 3))
    assert_close(zscore(x, mean=2.0, std=4.0), torch.tensor([0.0, 0.5, 1.0]))


@pytest.mark.parametrize("normalize", [minmax, zscore])
@pytest.mark.parametrize("x", [torch.full((11,), 0.1), [0.1] * 11, [7], [0.0, 0.0], [1e30] * 3])
def test_constant_input_gives_zeros(normalize, x):
    y = normalize(x)
    assert_close(y, torch.zeros_like(y))


def test_a_stream_of_one_value_is_not_standardised_into_noise():
    stats = RunningStats()
    for n in (3, 7, 11):
        stats.update([0.1] * n)
        assert_close(zscore([0.1] * n, stats.mean, stats.std), torch.zeros(n, dtype=torch.float64))


def test_small_but_real_differences_survive():
    assert_close(zscore([1.0, 1.0 + 1e-9]), torch.tensor([-1.0, 1.0], dtype=torch.float64), rtol=1e-6, atol=0)


def test_running_stats_by_hand():
    stats = RunningStats()
    stats.update([1.0, 3.0])
    assert (stats.count, stats.mean, stats.std, stats.min, stats.max) == (2, 2.0, 1.0, 1.0, 3.0)
    stats.update(torch.tensor([[8.0]]))
    # mean 12/3 = 4, squares 9 + 1 + 16 = 26
    assert (stats.count, stats.mean, stats.min, stats.max) == (3, 4.0, 1.0, 8.0)
    assert stats.std == pytest.approx(math.sqrt(26 / 3))


def test_running_stats_do_not_depend_on_how_the_stream_is_cut():
    torch.manual_seed(0)
    # A large offset: sums of squares would cancel here.
    x = torch.randn(100, dtype=torch.float64) + 1e6
    stats, left, right = RunningStats(), RunningStats(), RunningStats()
    for chunk in x.split(7):
        stats.update(chunk)
    left.update(x[:30])
    right.update(x[30:])
    left.merge(right)
    for s in (stats, left):
        assert (s.count, s.min, s.max) == (100, x.min().item(), x.max().item())
        assert s.mean == pytest.approx(x.mean().item(), rel=1e-12)
        assert s.std == pytest.approx(x.std(correction=0).item(), rel=1e-9)


def test_running_stats_of_negative_values_do_not_see_zero():
    stats = RunningStats()
    stats.update([-3.0, -2.0])
    assert (stats.min, stats.max) == (-3.0, -2.0)


def test_running_stats_resume_exactly():
    stats, resumed = RunningStats(), RunningStats()
    stats.update([0.1, 0.7, -0.3])
    resumed.load_state_dict(json.loads(json.dumps(stats.state_dict())))
    for s in (stats, resumed):
        s.update([1.0, 2.0])
    assert stats == resumed


def test_running_stats_ignore_an_empty_batch():
    stats = RunningStats()
    stats.update([])
    stats.merge(RunningStats())
    assert (stats.count, stats.std) == (0, 0.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_running_stats_refuse_what_is_not_finite(bad):
    stats = RunningStats()
    with pytest.raises(ValueError, match="finite"):
        stats.update([1.0, bad])
    assert stats.count == 0
