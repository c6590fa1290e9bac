"""How good a reward model is, as numbers: ranking, calibration, what it knows not to know, and its taste for length.

Pure functions of arrays. `mmft.eval.intervals.clustered` makes means with intervals of what they give for a sample.
Shapes: N samples, in any order; P pictures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

LEVELS = (0.5, 0.8, 0.9, 0.95)
BINS = 10
_CHUNK = 4_000_000  # entries of a pair matrix held at once
_TINY = 1e-12

Bin = dict[str, float]


# -- ranking -----------------------------------------------------------------------------------------------------------


def pair_correct(
    chosen_N: ArrayLike, rejected_N: ArrayLike, tie_N: ArrayLike | None = None, tolerance: float = 0.0
) -> np.ndarray:
    """For each pair: 1 where the chosen caption scores higher, 0 where it scores lower, 0.5 where the scores are equal.

    NaN, which means leave out, where the annotators saw no difference or a score is undefined: no order is right there.

    Args:
        chosen_N, rejected_N: scores of the two captions.
        tie_N: True where the annotators called the pair a tie.
        tolerance: scores that differ by no more than this are equal.
    Returns: (N,) floats.
    """
    difference_N = _floats(chosen_N) - _floats(rejected_N)
    correct_N = np.where(np.abs(difference_N) <= tolerance, 0.5, (difference_N > 0).astype(np.float64))
    undefined_N = np.isnan(difference_N)
    if tie_N is not None:
        undefined_N = undefined_N | np.asarray(tie_N, dtype=bool)
    return np.where(undefined_N, np.nan, correct_N)


def kendall_tau(x_N: ArrayLike, y_N: ArrayLike) -> float:
    """Kendall's rank correlation tau-b, which allows for ties on either side.

        tau_b = sum_ij sign(x_i - x_j) sign(y_i - y_j) / sqrt(sum_ij sign(x_i - x_j)^2 sum_ij sign(y_i - y_j)^2)

    Returns: from -1 to 1; NaN where one side is constant. Samples that are NaN on one side are left out.
    Source: Kendall, The treatment of ties in ranking problems, Biometrika 33 (1945).
    """
    x_N, y_N = _both_defined(x_N, y_N)
    if len(x_N) < 2:
        return math.nan
    both = in_x = in_y = 0.0
    rows = max(1, _CHUNK // len(x_N))
    for start in range(0, len(x_N), rows):  # every pair twice, which cancels
        x_CN = np.sign(x_N[start : start + rows, None] - x_N)
        y_CN = np.sign(y_N[start : start + rows, None] - y_N)
        both, in_x, in_y = both + np.sum(x_CN * y_CN), in_x + np.sum(x_CN * x_CN), in_y + np.sum(y_CN * y_CN)
    return float(both / math.sqrt(in_x * in_y)) if in_x and in_y else math.nan


def within_picture_tau(scores_N: ArrayLike, ratings_N: ArrayLike, clusters: Sequence[str]) -> np.ndarray:
    """Kendall's tau between scores and ratings of the captions of one picture, for every picture.

    What a policy is trained on is the order among captions of one picture; that some pictures are easier than others
    would only blur it. Average with `mmft.eval.intervals.summarise`.

    Args:
        clusters: the picture of each of the N samples.
    Returns: (P,) floats, pictures in the order in which they first appear; NaN where tau is undefined.
    """
    scores_N, ratings_N = _floats(scores_N), _floats(ratings_N)
    if not len(scores_N) == len(ratings_N) == len(clusters):
        raise ValueError(f"{len(scores_N)} scores, {len(ratings_N)} ratings, clusters of {len(clusters)}")
    places: dict[str, list[int]] = {}
    for i, name in enumerate(clusters):
        places.setdefault(name, []).append(i)
    return np.array([kendall_tau(scores_N[at], ratings_N[at]) for at in places.values()], dtype=np.float64)


def auroc(positive: ArrayLike, negative: ArrayLike) -> float:
    """Area under the ROC curve: the probability that a positive scores above a negative, equal scores counting half.

        U = sum of the positives' midranks - n (n + 1) / 2;   AUROC = U / (n m)

    Args:
        positive, negative: n and m scores. NaN is left out.
    Returns: from 0 to 1, 0.5 for no separation; NaN where one side is empty.
    Source: Mann and Whitney, Annals of Mathematical Statistics 18 (1947); Hanley and McNeil, Radiology 143 (1982).
    """
    upper, lower = (side[~np.isnan(side)] for side in (_floats(positive), _floats(negative)))
    n, m = len(upper), len(lower)
    if not n or not m:
        return math.nan
    rank_sum = float(midranks(np.concatenate([upper, lower]))[:n].sum())
    return (rank_sum - n * (n + 1) / 2) / (n * m)


# -- calibration of preferences ----------------------------------------------------------------------------------------


def reliability(probability_N: ArrayLike, outcome_N: ArrayLike, bins: int = BINS) -> list[Bin]:
    """Confidence against accuracy, in bins of equal width: a calibrated model is right in 80% of its 80% cases.

    Which caption of a pair stands first is a matter of writing it down, so the confidence is that in the likelier one,
    from 0.5 to 1, and the accuracy is how often that one was chosen. Swapping the two captions changes nothing.

    Args:
        probability_N: of the first caption being chosen.
        outcome_N: 1 where it was, 0 where the other was, 0.5 for a tie.
        bins: between 0.5 and 1.
    Returns: {"confidence": mean, "accuracy": mean, "count"} of each bin that is not empty, by rising confidence.
    Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017, section 2.
    """
    probability_N, outcome_N = _probabilities(probability_N, outcome_N)
    confidence_N = np.maximum(probability_N, 1 - probability_N)
    agreed_N = np.where(probability_N > 0.5, outcome_N, 1 - outcome_N)
    agreed_N = np.where(probability_N == 0.5, 0.5, agreed_N)  # neither is likelier
    place_N = np.minimum(((confidence_N - 0.5) * 2 * bins).astype(int), bins - 1)
    return [
        {
            "confidence": float(confidence_N[place_N == place].mean()),
            "accuracy": float(agreed_N[place_N == place].mean()),
            "count": int(np.sum(place_N == place)),
        }
        for place in np.unique(place_N)
    ]


def expected_calibration_error(probability_N: ArrayLike, outcome_N: ArrayLike, bins: int = BINS) -> float:
    """ECE = sum_b n_b / N |accuracy_b - confidence_b| over the bins of `reliability`; NaN for no samples.

    Source: Naeini, Cooper and Hauskrecht, AAAI 2015; Guo et al., ICML 2017, equation 3.
    """
    found = reliability(probability_N, outcome_N, bins)
    total = sum(entry["count"] for entry in found)
    gap = sum(entry["count"] * abs(entry["accuracy"] - entry["confidence"]) for entry in found)
    return gap / total if total else math.nan


def log_loss(probability_N: ArrayLike, outcome_N: ArrayLike, clip: float = 1e-7) -> float:
    """Mean negative log-likelihood of preferences, -[y log p + (1 - y) log(1 - p)], in nats; ln 2 for guessing.

    Args:
        clip: probabilities are kept this far from 0 and 1, where one wrong pair would cost everything.
    """
    probability_N, outcome_N = _probabilities(probability_N, outcome_N)
    if not len(probability_N):
        return math.nan
    p_N = np.clip(probability_N, clip, 1 - clip)
    return float(-np.mean(outcome_N * np.log(p_N) + (1 - outcome_N) * np.log1p(-p_N)))


def _probabilities(probability_N: ArrayLike, outcome_N: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    probability_N, outcome_N = _both_defined(probability_N, outcome_N)
    for name, values in (("probability", probability_N), ("outcome", outcome_N)):
        if len(values) and not 0 <= values.min() <= values.max() <= 1:
            raise ValueError(f"{name} outside [0, 1]: from {values.min()} to {values.max()}")
    return probability_N, outcome_N


# -- calibration of ratings --------------------------------------------------------------------------------------------


def coverage(
    target_N: ArrayLike, mean_N: ArrayLike, sigma_N: ArrayLike, levels: Sequence[float] = LEVELS
) -> dict[float, float]:
    """Share of targets within each central predictive interval, mean +- z sigma, z the normal quantile of the level.

    Calibrated sigmas give each level itself; less means overconfident.

    Returns: level -> share; NaN for no samples.
    Source: Kuleshov, Fenner and Ermon, Accurate Uncertainties for Deep Learning Using Calibrated Regression, ICML 2018.
    """
    target_N, mean_N, sigma_N = _predictions(target_N, mean_N, sigma_N)
    distance_N = np.abs(target_N - mean_N)
    reach = {level: NormalDist().inv_cdf((1 + level) / 2) for level in levels}
    return {
        level: float(np.mean(distance_N <= z * sigma_N)) if len(distance_N) else math.nan for level, z in reach.items()
    }


def gaussian_nll(target_N: ArrayLike, mean_N: ArrayLike, sigma_N: ArrayLike) -> float:
    """Mean negative log-density, (y - mu)^2 / (2 sigma^2) + log sigma + log(2 pi) / 2, in nats. Lower is better.

    Equation: E33, with its constant. Source: Nix and Weigend, ICNN 1994; Gneiting and Raftery, JASA 102 (2007).
    """
    target_N, mean_N, sigma_N = _predictions(target_N, mean_N, sigma_N)
    if not len(target_N):
        return math.nan
    z_N = (target_N - mean_N) / sigma_N
    return float(np.mean(0.5 * z_N**2 + np.log(sigma_N)) + 0.5 * math.log(2 * math.pi))


def _predictions(
    target_N: ArrayLike, mean_N: ArrayLike, sigma_N: ArrayLike
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    target_N, mean_N, sigma_N = np.broadcast_arrays(_floats(target_N), _floats(mean_N), _floats(sigma_N))
    if not np.all(sigma_N > 0):
        raise ValueError("sigma must be positive everywhere")
    return target_N, mean_N, sigma_N


# -- bias --------------------------------------------------------------------------------------------------------------


def length_bias(score_N: ArrayLike, length_N: ArrayLike, quality_N: ArrayLike) -> float:
    """Does the reward like long captions as such? Partial Spearman correlation of score and length, given quality.

    Scores, lengths and qualities become midranks; what quality explains of the other two, by a straight line, is taken
    away, and the rests are correlated. Above 0: of equally good captions the longer one scores higher.

    Returns: from -1 to 1; NaN where, after that, one of them does not vary.
    Source: Kim, ppcor, Communications for Statistical Applications and Methods 22 (2015), partial Spearman;
        for the bias: Singhal et al., A Long Way to Go: Investigating Length Correlations in RLHF, COLM 2024.
    """
    columns = np.broadcast_arrays(_floats(score_N), _floats(length_N), _floats(quality_N))
    kept_N = ~np.isnan(np.stack(columns)).any(axis=0)
    score_N, length_N, quality_N = (midranks(column[kept_N]) for column in columns)
    if len(score_N) < 3:
        return math.nan
    rest_score_N, rest_length_N = _unexplained(score_N, quality_N), _unexplained(length_N, quality_N)
    scale = math.sqrt(float(rest_score_N @ rest_score_N) * float(rest_length_N @ rest_length_N))
    # Rounding leaves about 1e-16 of a rest that is zero; ranks have squares of about N^3 / 12.
    if scale <= _TINY * len(score_N) ** 3:
        return math.nan
    return float(np.clip(rest_score_N @ rest_length_N / scale, -1.0, 1.0))


def midranks(x_N: ArrayLike) -> np.ndarray:
    """Ranks from 1 to N; equal values share the mean of their ranks."""
    _, place_N, count = np.unique(_floats(x_N), return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place_N.reshape(-1)]


def _unexplained(y_N: np.ndarray, x_N: np.ndarray) -> np.ndarray:
    """What a least-squares line on x leaves of y."""
    y_N, x_N = y_N - y_N.mean(), x_N - x_N.mean()
    square = float(x_N @ x_N)
    return y_N - x_N * (float(x_N @ y_N) / square) if square else y_N


def _floats(values: ArrayLike) -> np.ndarray:
    return np.asarray(values, dtype=np.float64).reshape(-1)


def _both_defined(x_N: ArrayLike, y_N: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    x_N, y_N = _floats(x_N), _floats(y_N)
    if len(x_N) != len(y_N):
        raise ValueError(f"cannot pair {len(x_N)} values with {len(y_N)}")
    kept_N = ~(np.isnan(x_N) | np.isnan(y_N))
    return x_N[kept_N], y_N[kept_N]
