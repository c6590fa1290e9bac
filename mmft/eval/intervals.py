"""Means with bootstrap intervals: of samples, of clustered samples, and of the difference between two paired sets."""

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


def clustered(
    values: Mapping[str, Sequence[float] | np.ndarray],
    clusters: Sequence[str],
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Summary:
    """The mean of every metric over N samples, with a bootstrap that draws whole clusters.

    Judgements of one picture are not independent: drawn one by one they would give intervals that are too short. The
    mean itself is over samples, so a picture with more of them counts for more. NaN as in `summarise`. A paired
    difference is `clustered({"a - b": a - b}, clusters)`.

    Args:
        values: metric -> N floats, the same N for all.
        clusters: the picture of each of the N samples.
    Returns:
        metric -> {"mean", "low", "high"}.
    Source: Davison and Hinkley, Bootstrap Methods and their Application (1997), section 3.8.
    """
    if not values:
        return {}
    names, values_NM = _matrix(values)
    if len(clusters) != len(values_NM):
        raise ValueError(f"{len(values_NM)} samples, but clusters of {len(clusters)}")
    _, cluster_N = np.unique(np.asarray(clusters, dtype=np.str_), return_inverse=True)
    return _intervals(names, values_NM, seed, resamples, cluster_N.reshape(-1))


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


def _intervals(
    names: list[str], values_NM: np.ndarray, seed: int, resamples: int, cluster_N: np.ndarray | None = None
) -> Summary:
    defined_NM = np.isfinite(values_NM)
    filled_NM, count_NM = np.where(defined_NM, values_NM, 0.0), defined_NM.astype(np.float64)
    mean_M = _divide(filled_NM.sum(axis=0), count_NM.sum(axis=0))
    if cluster_N is not None:  # a cluster is drawn as one: its sums and counts stand for it
        filled_NM, count_NM = _sums(filled_NM, cluster_N), _sums(count_NM, cluster_N)
    means_RM = np.concatenate(list(_resampled(filled_NM, count_NM, seed, resamples)))
    tail = 100 * (1 - LEVEL) / 2
    summary: Summary = {}
    for m, name in enumerate(names):
        drawn = means_RM[np.isfinite(means_RM[:, m]), m]
        low, high = np.percentile(drawn, [tail, 100 - tail]) if len(drawn) else (math.nan, math.nan)
        summary[name] = {"mean": _number(mean_M[m]), "low": _number(low), "high": _number(high)}
    return summary


def _sums(values_NM: np.ndarray, cluster_N: np.ndarray) -> np.ndarray:
    """(C, M): the sum of each of C clusters."""
    sums_CM = np.zeros((int(cluster_N.max()) + 1, values_NM.shape[1]))
    np.add.at(sums_CM, cluster_N, values_NM)
    return sums_CM


def _resampled(filled_NM: np.ndarray, count_NM: np.ndarray, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """Means of R resamples, in chunks, from the sums and counts of N samples or clusters. How often each is drawn is
    all a mean needs, so a chunk of resamples is one matrix product for all metrics."""
    rng = np.random.default_rng(seed)
    n = len(filled_NM)
    share = np.full(n, 1.0 / n)
    chunk = max(1, _CHUNK // n)
    for start in range(0, resamples, chunk):
        drawn_RN = rng.multinomial(n, share, size=min(chunk, resamples - start)).astype(np.float64)
        yield _divide(drawn_RN @ filled_NM, drawn_RN @ count_NM)


def _divide(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
