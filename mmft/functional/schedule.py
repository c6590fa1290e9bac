"""Schedules: of the learning rate, and of anything else that moves from one number to another."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]


def cosine_annealing(step: float, total: float, eta_max: float, eta_min: float = 0.0) -> float:
    """From `eta_max` at step 0 to the floor `eta_min` at `total`, slow at both ends.

    Equation: E26
        eta_t = eta_min + 1/2 (eta_max - eta_min) (1 + cos(pi t / T))

    Steps outside [0, total] take the value at the nearer end: the cosine would otherwise rise again.
    Source: Loshchilov and Hutter 2017, "SGDR: Stochastic Gradient Descent with Warm Restarts", eq. 5, one cycle.
    """
    return eta_min + 0.5 * (eta_max - eta_min) * (1.0 + math.cos(math.pi * _progress(step, total)))


def linear_annealing(step: float, total: float, eta_max: float, eta_min: float = 0.0) -> float:
    """From `eta_max` at step 0 to `eta_min` at `total` in equal steps; held at the ends outside [0, total]."""
    return eta_max + (eta_min - eta_max) * _progress(step, total)


def learning_rate_factor(schedule: Schedule, step: int, total: int, warmup: int = 0, floor: float = 0.0) -> float:
    """What to multiply the peak learning rate by at optimizer step `step`, counted from 0 (for `LambdaLR`).

    During warm-up it rises linearly as (step + 1) / (warmup + 1), so that the first update, which has cost a whole
    rollout, is not made at rate 0, and `step == warmup` is the peak. Then it follows the schedule down to `floor`,
    a fraction of the peak, at `total`. `constant` stays at the peak.

    Raises:
        ValueError: an unknown schedule, or `floor` outside [0, 1].
    """
    if not 0.0 <= floor <= 1.0:
        raise ValueError(f"the floor is a fraction of the peak, in [0, 1]; got {floor}")
    if schedule not in ("constant", "linear", "cosine"):
        raise ValueError(f"unknown schedule {schedule!r}: use 'constant', 'linear' or 'cosine'")
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    anneal = cosine_annealing if schedule == "cosine" else linear_annealing
    # A run no longer than its warm-up never anneals; max keeps the division defined there.
    return anneal(step - warmup, max(total - warmup, 1), 1.0, floor)


def _progress(step: float, total: float) -> float:
    if total <= 0:
        raise ValueError(f"a schedule needs a positive length, got {total}")
    return min(max(step / total, 0.0), 1.0)
