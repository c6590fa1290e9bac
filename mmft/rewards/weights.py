"""Weights of reward terms learned from preferences or ratings, with intervals, and with the sign each term must have.

A term's weight is at least 0: its own sign says whether it is a reward or a cost (E34: alpha, beta, gamma). Where the
data would give it the other sign, the weight is 0 and the unconstrained estimate, reported beside it, shows why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

RIDGE = 1e-3  # on standardised features: keeps weights finite where the data can be told apart perfectly
RESAMPLES = 200
LEVEL = 0.95
_ITERATIONS = 200

Objective = Literal["logistic", "squared"]


@dataclass(frozen=True)
class LearnedWeight:
    """A weight with its 95% interval. unconstrained, and its interval: what the data say without the sign's rule.

    sign: "as expected", "not told from 0", or "against" where the data want the other sign.
    """

    name: str
    weight: float
    low: float
    high: float
    unconstrained: float
    unconstrained_low: float
    unconstrained_high: float
    sign: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def learn_weights(
    names: Sequence[str],
    features_NK: np.ndarray,
    target_N: np.ndarray,
    clusters: Sequence[str],
    objective: Objective,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> list[LearnedWeight]:
    """Weights of K terms from N pairs or ratings.

        logistic: P(chosen over rejected) = sigmoid(w . (x_chosen - x_rejected));   squared: rating = b + w . x

    Args:
        names: of the K terms.
        features_NK: differences of a pair's terms, or terms of a rated caption; costs already negated.
        target_N: 1 where the first of a pair is chosen and 0.5 for a tie; or ratings.
        clusters: the picture of each sample. The bootstrap draws pictures, since judgements of one are not independent.

    Source: Bradley and Terry 1952; intervals: Efron and Tibshirani 1993, chapter 13.
    """
    if features_NK.ndim != 2 or features_NK.shape != (len(target_N), len(names)) or not len(target_N):
        raise ValueError(f"features must be N > 0 x {len(names)} for {len(target_N)} targets, got {features_NK.shape}")
    scale_K = np.where(features_NK.std(0) > 0, features_NK.std(0), 1.0)
    x_NK = features_NK / scale_K
    bound, free = (_fit(x_NK, target_N, np.ones(len(target_N)), objective, sign) / scale_K for sign in (True, False))
    groups = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    group_N = np.array([groups[name] for name in clusters])
    rng = np.random.default_rng(seed)
    drawn: dict[bool, list[np.ndarray]] = {True: [], False: []}
    for _ in range(resamples):
        times_N = np.bincount(rng.integers(len(groups), size=len(groups)), minlength=len(groups))[group_N]
        for sign, found in drawn.items():
            found.append(_fit(x_NK, target_N, times_N.astype(float), objective, sign) / scale_K)
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(drawn[True], [tail, 100 - tail], axis=0)
    free_low, free_high = np.percentile(drawn[False], [tail, 100 - tail], axis=0)
    return [
        LearnedWeight(
            name, float(bound[k]), float(low[k]), float(high[k]), float(free[k]), float(free_low[k]),
            float(free_high[k]), _sign(float(free_low[k]), float(free_high[k])),
        )
        for k, name in enumerate(names)
    ]  # fmt: skip


def _sign(low: float, high: float) -> str:
    return "as expected" if low > 0 else "against" if high < 0 else "not told from 0"


def _fit(x_NK: np.ndarray, target_N: np.ndarray, times_N: np.ndarray, objective: Objective, bound: bool) -> np.ndarray:
    """Newton's method on the mean loss; `bound` keeps weights at or above 0 by an active set.

    An intercept belongs to ratings alone: a pair turned round must give the opposite difference.
    """
    x_NK = np.column_stack([x_NK, np.ones(len(x_NK))]) if objective == "squared" else x_NK
    k = x_NK.shape[1]
    may_be_negative, ridge_K = np.array([not bound] * k), np.full(k, RIDGE)
    if objective == "squared":  # the intercept: held to nothing, or terms would have to make up for it
        may_be_negative[-1], ridge_K[-1] = True, 0.0
    w, total = np.zeros(k), times_N.sum()

    def loss(v: np.ndarray) -> float:
        return _loss(x_NK @ v, target_N, times_N, objective) + 0.5 * float(ridge_K @ v**2)

    for _ in range(_ITERATIONS):
        slope_N, curve_N = _derivatives(x_NK @ w, target_N, objective)
        gradient = x_NK.T @ (times_N * slope_N) / total + ridge_K * w
        free = may_be_negative | (w > 0) | (gradient < 0)
        if not free.any():
            break
        hessian = (x_NK[:, free] * (times_N * curve_N)[:, None]).T @ x_NK[:, free] / total + np.diag(ridge_K[free])
        step = np.zeros(k)
        step[free] = np.linalg.solve(hessian, gradient[free])
        new = _descend(w, step, gradient, may_be_negative, loss)
        if np.abs(new - w).max() < 1e-9:
            break
        w = new
    return w[:-1] if objective == "squared" else w


def _descend(
    w: np.ndarray, step: np.ndarray, gradient: np.ndarray, may_be_negative: np.ndarray, loss: Any
) -> np.ndarray:
    """The longest halved step that lowers the loss: Newton's, else the gradient's, each put back into the bounds."""
    now = loss(w)
    for direction in (step, gradient):
        length = 1.0
        while length > 1e-10:
            new = w - length * direction
            new = np.where(may_be_negative, new, np.maximum(new, 0.0))
            if loss(new) < now:
                return new
            length /= 2
    return w


def _derivatives(score_N: np.ndarray, target_N: np.ndarray, objective: Objective) -> tuple[np.ndarray, np.ndarray]:
    if objective == "squared":
        return score_N - target_N, np.ones_like(score_N)
    p_N = 1.0 / (1.0 + np.exp(-np.clip(score_N, -60, 60)))
    return p_N - target_N, p_N * (1 - p_N)


def _loss(score_N: np.ndarray, target_N: np.ndarray, times_N: np.ndarray, objective: Objective) -> float:
    if objective == "squared":
        each = 0.5 * (score_N - target_N) ** 2
    else:
        each = np.logaddexp(0.0, score_N) - target_N * score_N
    return float((times_N * each).sum() / times_N.sum())
