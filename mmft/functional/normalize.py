"""Normalisation of rewards, and the running statistics that checkpoints keep.

Order of use: update the statistics with a batch, then normalise that batch. The first batch is then normalised by
itself instead of by nothing, and min-max stays within [0, 1] while statistics are updated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

Values = Tensor | Sequence[float]


def minmax(x: Values, low: float | Tensor | None = None, high: float | Tensor | None = None) -> Tensor:
    """Min-max normalisation.

    Equation: E06
        x' = (x - min) / (max - min)

    Args:
        x: any shape.
        low, high: min and max, by default those of `x` (which must then not be empty). With other statistics, x'
            may leave [0, 1]; it is not clipped, so that an outlier can still be seen.

    Returns:
        The shape of `x`; 0 everywhere if max = min, where the equation has no value.
    """
    x = _as_float(x)
    low = x.min() if low is None else _like(low, x)
    high = x.max() if high is None else _like(high, x)
    return _divide(x - low, high - low, magnitude=torch.maximum(low.abs(), high.abs()))


def zscore(x: Values, mean: float | Tensor | None = None, std: float | Tensor | None = None) -> Tensor:
    """Standardisation.

    Equation: E07
        x' = (x - mu) / sigma

    Args:
        x: any shape.
        mean, std: mu and sigma (of the population, divided by n), by default those of `x`.

    Returns:
        The shape of `x`; 0 everywhere if sigma = 0, where the equation has no value.
    """
    x = _as_float(x)
    mean = x.mean() if mean is None else _like(mean, x)
    std = x.std(correction=0) if std is None else _like(std, x)
    return _divide(x - mean, std, magnitude=mean.abs())


@dataclass
class RunningStats:
    """Count, mean, spread and range of a stream of numbers, in double precision, merged batch by batch.

        n = n_a + n_b,   d = mean_b - mean_a
        mean = mean_a + d n_b / n,   M2 = M2_a + M2_b + d^2 n_a n_b / n

    Source: Chan, Golub, LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances".
    """

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0
    min: float = 0.0
    max: float = 0.0

    @property
    def std(self) -> float:
        """Population standard deviation; 0 before the first value."""
        return math.sqrt(self.m2 / self.count) if self.count else 0.0

    def update(self, values: Values) -> None:
        """Add a batch of any shape; an empty one changes nothing.

        Raises:
            ValueError: a value is not finite. One NaN would poison every later reward.
        """
        x = torch.as_tensor(values).detach().to("cpu", torch.float64).reshape(-1)
        if x.numel() == 0:
            return
        if not bool(x.isfinite().all()):
            raise ValueError(f"running statistics need finite values, got {x[~x.isfinite()][0].item()}")
        mean = x.mean()
        m2 = (x - mean).square().sum()
        self.merge(RunningStats(x.numel(), mean.item(), m2.item(), x.min().item(), x.max().item()))

    def merge(self, other: RunningStats) -> None:
        """Add what `other` has seen, as if its values had been given to `update`."""
        if other.count == 0:
            return
        if self.count == 0:
            self.load_state_dict(other.state_dict())
            return
        count = self.count + other.count
        delta = other.mean - self.mean
        self.mean += delta * other.count / count
        self.m2 += other.m2 + delta**2 * self.count * other.count / count
        self.min, self.max = min(self.min, other.min), max(self.max, other.max)
        self.count = count

    def state_dict(self) -> dict[str, float]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.count = int(state["count"])
        self.mean, self.m2, self.min, self.max = state["mean"], state["m2"], state["min"], state["max"]


def _as_float(x: Values) -> Tensor:
    x = x if isinstance(x, Tensor) else torch.as_tensor(x, dtype=torch.float64)
    return x if x.is_floating_point() else x.double()


def _like(value: float | Tensor, x: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=x.dtype, device=x.device)


def _divide(numerator: Tensor, spread: Tensor, magnitude: Tensor) -> Tensor:
    # The spread of a constant is rounding noise rather than 0, and noise over noise would invent differences:
    # ten rewards of 0.1 have a standard deviation of 1e-17, and would each be standardised to 1.
    constant = spread <= 16 * torch.finfo(spread.dtype).eps * magnitude
    return torch.where(constant, 0.0, numerator / torch.where(constant, 1.0, spread))
