"""Random numbers by seed and step: the same whoever asks, when, and for how many."""

from __future__ import annotations

import pytest
import torch

from mmft.train.randomness import Randomness


def test_points_depend_on_seed_and_step_alone() -> None:
    points = Randomness(3).points(7, 5, 4)
    assert points.shape == (5, 4) and points.dtype == torch.float64
    assert float(points.min()) >= 0.0 and float(points.max()) < 1.0 and len(points.unique()) == 20
    torch.manual_seed(1)
    assert torch.equal(Randomness(3).points(7, 5, 4), points)
    others = [Randomness(4).points(7, 5, 4), Randomness(3).points(8, 5, 4)]
    assert not any(torch.equal(other, points) for other in others)


@pytest.mark.parametrize(
    ("rows", "minibatches", "together"), [(8, 2, 1), (12, 3, 2), (16, 4, 4), (12, 4, 6), (6, 1, 3)]
)
def test_every_row_is_in_one_minibatch(rows: int, minibatches: int, together: int) -> None:
    order = Randomness(0).order(1, 0, rows, minibatches, together)
    assert [len(part) for part in order] == [rows // minibatches] * minibatches
    assert sorted(torch.cat(order).tolist()) == list(range(rows))


def test_neighbours_stay_together_where_they_can() -> None:
    for part in Randomness(0).order(1, 0, 24, 3, 4):
        units = part.view(-1, 4)
        assert torch.equal(units, units[:, :1] + torch.arange(4)) and not (units[:, 0] % 4).any()


def test_processes_have_equally_much_in_every_minibatch() -> None:
    for part in Randomness(5).order(9, 2, 16, 2, 2):
        assert sum(int(row) < 8 for row in part) == 4


def test_epochs_and_steps_are_shuffled_anew() -> None:
    seen = {tuple(torch.cat(Randomness(0).order(s, e, 32, 2)).tolist()) for s in range(4) for e in range(4)}
    assert len(seen) == 16
    assert torch.cat(Randomness(0).order(2, 1, 32, 2)).tolist() == torch.cat(Randomness(0).order(2, 1, 32, 2)).tolist()
