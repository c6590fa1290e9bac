"""Schedules against hand arithmetic."""

from __future__ import annotations

import math

import pytest

from mmft.functional.schedule import cosine_annealing, learning_rate_factor, linear_annealing


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 5.0),
        (3, 1.0 + 2.0 * (1 + 0.5)),  # cos(pi / 3) = 1/2
        (4.5, 3.0),
        (6, 1.0 + 2.0 * (1 - 0.5)),
        (9, 1.0),
        (12, 1.0),  # the floor holds
        (-1, 5.0),
    ],
)
def test_cosine_annealing_by_hand(step, expected):
    assert cosine_annealing(step, total=9, eta_max=5.0, eta_min=1.0) == pytest.approx(expected)


@pytest.mark.parametrize(("step", "expected"), [(0, 5.0), (1, 4.0), (4, 1.0), (7, 1.0)])
def test_linear_annealing_by_hand(step, expected):
    assert linear_annealing(step, total=4, eta_max=5.0, eta_min=1.0) == pytest.approx(expected)


@pytest.mark.parametrize("anneal", [cosine_annealing, linear_annealing])
def test_a_schedule_needs_a_length(anneal):
    with pytest.raises(ValueError, match="positive length"):
        anneal(0, 0, 1.0)


def test_learning_rate_factor_by_hand():
    # warm-up of 3: 1/4, 2/4, 3/4, then the peak at step 3 and 4 steps down to the floor at 7
    linear = [learning_rate_factor("linear", s, total=7, warmup=3, floor=0.2) for s in range(9)]
    assert linear == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2])
    cosine = [learning_rate_factor("cosine", s, total=7, warmup=3, floor=0.2) for s in (3, 5, 7)]
    assert cosine == pytest.approx([1.0, 0.6, 0.2])
    assert [learning_rate_factor("constant", s, total=7, warmup=1) for s in (0, 1, 99)] == [0.5, 1.0, 1.0]
    assert learning_rate_factor("cosine", 1, total=4) == pytest.approx(0.5 * (1 + math.sqrt(0.5)))


def test_linear_without_warmup_is_that_of_transformers():
    import torch
    from transformers import get_linear_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_linear_schedule_with_warmup(optimizer, 0, 10).lr_lambdas[0]
    assert [learning_rate_factor("linear", s, 10) for s in range(12)] == pytest.approx([theirs(s) for s in range(12)])


def test_a_run_shorter_than_its_warmup():
    assert learning_rate_factor("cosine", 1, total=2, warmup=3) == 0.5


@pytest.mark.parametrize(("schedule", "floor"), [("cosin", 0.0), ("cosine", 1.5)])
def test_nonsense_is_refused(schedule, floor):
    with pytest.raises(ValueError):
        learning_rate_factor(schedule, 0, 10, floor=floor)
