"""Means with bootstrap intervals, of one set of samples and of the difference between two paired sets."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

Summary = dict[str, dict[str, "float | None"]]

RESAMPLES = 2000
LEVEL = 0.95
_CHUNK = 4_000_000  # entries of the count matrix held at once: about 32 MB


def summarise(scores: Mapping[str, Sequence[float] | np.ndarray], seed: int = 0, resamples: int = RESAMPLES) -> Summary:
    """The mean of every metric over N samples, with its 95% percentile bootstrap interval.

    Samples are drawn with replacement, all metrics of a sample together. NaN marks a metric that is undefined for a
    sample, and is left out of the mean; a metric that is defined nowhere gives None.

    Args:
        scores: metric -> N floats, the same N for all.
    Returns:
        metric -> {"mean", "low", "high"}.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    if not scores:
        return {}
    names, values_NM = _matrix(scores)
    return _intervals(names, values_NM, seed, resamples)


def compare(
    before: Mapping[str, Sequence[float] | np.ndarray],
    after: Mapping[str, Sequence[float] | np.ndarray],
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Summary:
    """The mean change after - before over the same N samples, with its paired bootstrap interval.

    Pairing removes the differences between pictures, which are much larger than the change that is looked for.
    A sample counts for a metric where the metric is defined on both sides. Metrics of one side alone are left out.
    """
    shared = [name for name in before if name in after]
    if not shared:
        return {}
    names, before_NM = _matrix({name: before[name] for name in shared})
    _, after_NM = _matrix({name: after[name] for name in shared})
    if before_NM.shape != after_NM.shape:
        raise ValueError(f"cannot pair {len(before_NM)} samples before with {len(after_NM)} after")
    return _intervals(names, after_NM - before_NM, seed, resamples)


def _matrix(scores: Mapping[str, Sequence[float] | np.ndarray]) -> tuple[list[str], np.ndarray]:
    columns = {name: np.asarray(values, dtype=np.float64).reshape(-1) for name, values in scores.items()}
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"metrics of different lengths: {lengths}")
    if not next(iter(lengths.values())):
        raise ValueError("no samples")
    return list(columns), np.stack(list(columns.values()), axis=1)


def _intervals(names: list[str], values_NM: np.ndarray, seed: int, resamples: int) -> Summary:
    defined_NM = np.isfinite(values_NM)
    filled_NM = np.where(defined_NM, values_NM, 0.0)
    mean_M = _divide(filled_NM.sum(axis=0), defined_NM.sum(axis=0))
    means_RM = np.concatenate(list(_resampled(filled_NM, defined_NM.astype(np.float64), seed, resamples)))
    tail = 100 * (1 - LEVEL) / 2
    summary: Summary = {}
    for m, name in enumerate(names):
        drawn = means_RM[np.isfinite(means_RM[:, m]), m]
        low, high = np.percentile(drawn, [tail, 100 - tail]) if len(drawn) else (math.nan, math.nan)
        summary[name] = {"mean": _number(mean_M[m]), "low": _number(low), "high": _number(high)}
    return summary


def _resampled(filled_NM: np.ndarray, defined_NM: np.ndarray, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """Means of R resamples, in chunks. How often each sample is drawn is all a mean needs, so a chunk of resamples
    is one matrix product for all metrics."""
    rng = np.random.default_rng(seed)
    n = len(filled_NM)
    share = np.full(n, 1.0 / n)
    chunk = max(1, _CHUNK // n)
    for start in range(0, resamples, chunk):
        count_RN = rng.multinomial(n, share, size=min(chunk, resamples - start)).astype(np.float64)
        yield _divide(count_RN @ filled_NM, count_RN @ defined_NM)


def _divide(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
