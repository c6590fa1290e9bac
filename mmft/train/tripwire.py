"""A guard against reward hacking: a metric that is not in the reward, watched beside it.

The tripwire trips when, for some steps in a row, the reward is above where it started while the metric is below the
best it has been, both by more than noise. Pure logic: the caller feeds it batch means and decides what to do.

Both are smoothed by their mean over the last `window` steps. A moving exponential average would never wholly forget
the start, and its error depends on the whole past; a trailing mean forgets exactly, and the scatter of what is in the
window gives its standard error. Nothing is judged before the first window is full.

Sources: rising proxy and falling true reward as in Gao, Schulman, Hilton 2023, "Scaling Laws for Reward Model
Overoptimization"; the largest of k normal means lies about sqrt(2 ln k) standard errors above their mean (Cramér 1946,
"Mathematical Methods of Statistics", section 28.6).
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_NOISE = 2.0  # standard errors that a difference must exceed to be more than noise


@dataclass(frozen=True)
class TripwireState:
    """What the tripwire sees at a step. Up to the first full window, levels are 0 and steps None.

    reward_rise: smoothed reward above its starting level, in units of the reward.
    metric_fall: smoothed metric below its best, as a share of the larger of the two in magnitude (so of the best, for
        a metric that is not negative; this has a value where the best is 0).
    best_step: the last step of the window in which the metric was best.
    is_best: whether that is this step, so that the caller can keep a checkpoint.
    tripped_at, fell_since: the step at which the tripwire first tripped, and `best_step` then: where to go back to.
    """

    step: int
    reward_rise: float = 0.0
    metric_fall: float = 0.0
    best_step: int | None = None
    is_best: bool = False
    tripped_at: int | None = None
    fell_since: int | None = None

    @property
    def trips_now(self) -> bool:
        """Whether this is the step that tripped: the moment to warn."""
        return self.tripped_at == self.step

    def describe(self, name: str) -> str:
        """One line for people on a state that has tripped. name: of the metric."""
        return (
            f"reward rose by {self.reward_rise:.3g} while {name} fell by {self.metric_fall:.0%} since step "
            f"{self.fell_since}: the reward is probably being hacked; best checkpoint: step {self.best_step}"
        )


@dataclass(frozen=True)
class _Level:
    """A smoothed value, its standard error, and the step at which it was taken."""

    mean: float
    error: float
    step: int

    @classmethod
    def of(cls, window: Sequence[float], step: int) -> _Level:
        n, mean = len(window), statistics.fmean(window)
        variance = math.fsum((value - mean) ** 2 for value in window) / (n - 1)
        return cls(mean, math.sqrt(variance / n), step)


class Tripwire:
    """Watches a reward and a held-out metric of which more is better: `update` once a step.

    Args:
        threshold: share of its best that the metric must lose.
        window: steps that are averaged, at least 2.
        patience: steps in a row for which both must hold.

    `trip` is the state of the step that tripped first, None until then.
    """

    def __init__(self, threshold: float = 0.1, window: int = 10, patience: int = 3):
        if threshold < 0 or window < 2 or patience < 1:
            raise ValueError(
                "a tripwire needs threshold >= 0, window >= 2 and patience >= 1, "
                f"not {threshold}, {window} and {patience}"
            )
        self.threshold, self.window, self.patience = threshold, window, patience
        self.rewards: deque[float] = deque(maxlen=window)
        self.metrics: deque[float] = deque(maxlen=window)
        self.start: _Level | None = None
        self.best: _Level | None = None
        self.judged = 0  # steps with a full window
        self.scatter = 0.0  # sum over them of the squared standard error of the metric
        self.streak = 0  # suspicious ones in a row
        self.trip: TripwireState | None = None

    def update(self, step: int, reward: float, metric: float) -> TripwireState:
        """Takes the batch means of a step. One that lacks a finite reward or metric says nothing and is passed over:
        windows hold the same steps of both, and the steps in a row are neither added to nor broken.
        """
        fresh = math.isfinite(reward) and math.isfinite(metric)
        if fresh:
            self.rewards.append(reward)
            self.metrics.append(metric)
        return self._judge(step, fresh) if len(self.metrics) == self.window else TripwireState(step)

    def _judge(self, step: int, fresh: bool) -> TripwireState:
        reward, metric = _Level.of(self.rewards, step), _Level.of(self.metrics, step)
        self.start = self.start or reward
        is_best = fresh and (self.best is None or metric.mean > self.best.mean)
        if is_best or self.best is None:
            self.best = metric
        rise, fall = reward.mean - self.start.mean, self.best.mean - metric.mean
        scale = max(abs(self.best.mean), abs(metric.mean))
        state = TripwireState(step, rise, fall / scale if scale else 0.0, self.best.step, is_best)
        if fresh:
            self.judged += 1
            self.scatter += metric.error**2
            suspicious = rise > self._rise_noise(reward) and fall > self._fall_noise(metric)
            self.streak = self.streak + 1 if suspicious and state.metric_fall > self.threshold else 0
            if self.trip is None and self.streak >= self.patience:
                self.trip = dataclasses.replace(state, tripped_at=step, fell_since=self.best.step)
        if self.trip is not None:
            state = dataclasses.replace(state, tripped_at=self.trip.step, fell_since=self.trip.fell_since)
        return state

    def _rise_noise(self, now: _Level) -> float:
        assert self.start is not None
        return _NOISE * math.hypot(self.start.error, now.error)

    def _fall_noise(self, now: _Level) -> float:
        """Of k windows apart from each other the best is the luckiest, and the one judged now may be the unluckiest:
        without allowing for both, any noisy metric on a plateau would sooner or later seem to have fallen.
        """
        luck = math.sqrt(2 * math.log(max(1.0, self.judged / self.window)))
        # The scatter of a single window is itself uncertain, and chance picks windows where it is too small; that of
        # all windows is not. The present one counts where a metric has become noisier.
        error = max(math.sqrt(self.scatter / self.judged), now.error)
        return (_NOISE * math.sqrt(2) + 2 * luck) * error

    def state_dict(self) -> dict[str, Any]:
        """All that `update` has learned, JSON-ready."""
        return {
            "rewards": list(self.rewards),
            "metrics": list(self.metrics),
            "start": self.start and dataclasses.asdict(self.start),
            "best": self.best and dataclasses.asdict(self.best),
            "judged": self.judged,
            "scatter": self.scatter,
            "streak": self.streak,
            "trip": self.trip and dataclasses.asdict(self.trip),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back a `state_dict`. One of a longer window leaves its last values."""
        self.rewards = deque(state["rewards"], maxlen=self.window)
        self.metrics = deque(state["metrics"], maxlen=self.window)
        self.start = _Level(**state["start"]) if state["start"] else None
        self.best = _Level(**state["best"]) if state["best"] else None
        self.judged, self.scatter, self.streak = state["judged"], state["scatter"], state["streak"]
        self.trip = TripwireState(**state["trip"]) if state["trip"] else None
