"""The judgement of a reward model on held-out judgements: is it right, how sure may one be, and is it sure of that?

Everything is said beside baselines (BLEU alone, length alone, learned weights of plain terms) on the same captions,
with intervals that draw whole pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmft.eval.intervals import clustered
from mmft.eval.reward_metrics import (
    auroc,
    coverage,
    expected_calibration_error,
    gaussian_nll,
    length_bias,
    log_loss,
    pair_correct,
    reliability,
    within_picture_tau,
)
from mmft.eval.reward_scores import Scored

Totals = Mapping[str, np.ndarray]

_MANY = 400  # sigmas kept for the histograms


def pairwise(scored: Scored, chosen: Totals, rejected: Totals) -> dict[str, Any]:
    """Accuracy of every scorer on the pairs, in all and by the kind of the rejected caption."""
    right = {name: pair_correct(chosen[name], rejected[name], scored.ties_N) for name in chosen}
    everything = clustered(right, scored.clusters)
    kinds = scored.kinds
    record: dict[str, Any] = {name: {"all": everything[name], "by_kind": {}} for name in right}
    for kind in sorted(set(kinds)):
        where = np.array([k == kind for k in kinds])
        of_kind = clustered(
            {name: values[where] for name, values in right.items()},
            [c for c, w in zip(scored.clusters, where, strict=True) if w],
        )
        for name in right:
            record[name]["by_kind"][kind] = {**of_kind[name], "pairs": int(where.sum())}
    return record


def differences(scored: Scored, chosen: Totals, rejected: Totals) -> dict[str, Any]:
    """Paired differences of accuracy: the model over the learned weights of terms, those over each baseline."""
    right = {name: pair_correct(chosen[name], rejected[name], scored.ties_N) for name in chosen}
    compared = [
        ("reward", "linear"),
        ("linear", "bleu"),
        ("linear", "length"),
        ("reward", "bleu"),
        ("reward", "length"),
    ]
    found = {f"{a} - {b}": right[a] - right[b] for a, b in compared if a in right and b in right}
    return clustered(found, scored.clusters) if found else {}


def preference_calibration(chosen_N: np.ndarray, rejected_N: np.ndarray, ties_N: np.ndarray) -> dict[str, Any]:
    """How far P(chosen is better) = sigmoid(difference) can be believed. Scores are in Bradley-Terry's units."""
    keep = ~ties_N
    probability = 1 / (1 + np.exp(-np.clip((chosen_N - rejected_N)[keep], -60, 60)))
    outcome = np.ones(len(probability))  # which caption stands first is a matter of writing: both metrics fold that
    return {
        "nll": log_loss(probability, outcome),
        "ece": expected_calibration_error(probability, outcome),
        "bins": reliability(probability, outcome),
    }


def rating_calibration(rating_N: np.ndarray, mean_N: np.ndarray, sigma_N: np.ndarray) -> dict[str, Any]:
    """Error of predicted ratings, and what share of ratings predictive intervals cover."""
    return {
        "rmse": float(np.sqrt(np.mean((rating_N - mean_N) ** 2))),
        "nll": gaussian_nll(rating_N, mean_N, sigma_N),
        "coverage": {str(level): share for level, share in coverage(rating_N, mean_N, sigma_N).items()},
    }


def rank_correlation(scored: Scored, totals: Totals) -> dict[str, Any]:
    """Kendall's tau-b of scores and ratings within a picture, averaged over pictures."""
    taus = {name: within_picture_tau(total, scored.ratings_N, scored.clusters) for name, total in totals.items()}
    pictures = [str(i) for i in range(len(next(iter(taus.values()))))]
    return clustered(taus, pictures)


def length_biases(
    totals: Totals, words_N: np.ndarray, quality_N: np.ndarray, clusters: Sequence[str]
) -> dict[str, Any]:
    """Partial rank correlation of score and length at equal quality, with a bootstrap over pictures."""
    names = list(dict.fromkeys(clusters))
    members = {name: [] for name in names}  # type: dict[str, list[int]]
    for i, name in enumerate(clusters):
        members[name].append(i)
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(200):
        drawn = rng.integers(len(names), size=len(names))
        draws.append(np.concatenate([members[names[k]] for k in drawn]))
    record = {}
    for scorer, total in totals.items():
        values = [length_bias(total[i], words_N[i], quality_N[i]) for i in draws]
        low, high = np.nanpercentile(values, [2.5, 97.5]) if np.isfinite(values).any() else (np.nan, np.nan)
        record[scorer] = {
            "mean": _number(length_bias(total, words_N, quality_N)), "low": _number(low), "high": _number(high),
        }  # fmt: skip
    return record


def out_of_distribution(inside_N: np.ndarray, outside: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Whether sigma tells pictures unlike those of training from held-out ones: AUROC, 0.5 = no better than chance."""
    everything = np.concatenate(list(outside.values()))
    rng = np.random.default_rng(0)
    draws = [auroc(rng.choice(everything, len(everything)), rng.choice(inside_N, len(inside_N))) for _ in range(200)]
    low, high = np.percentile(draws, [2.5, 97.5])
    return {
        "auroc": {"mean": auroc(everything, inside_N), "low": float(low), "high": float(high)},
        "by_kind": {kind: auroc(sigma, inside_N) for kind, sigma in outside.items()},
        "sigma_in": inside_N[:_MANY].round(5).tolist(),
        "sigma_out": rng.permutation(everything)[:_MANY].round(5).tolist(),
    }


def adversarial(scored: Scored, chosen_N: np.ndarray, rejected_N: np.ndarray) -> dict[str, Any]:
    """How often a true caption is ranked above one that is false, or none, by kind."""
    right_N = pair_correct(chosen_N, rejected_N)
    kinds = scored.kinds
    by_kind = {}
    for kind in dict.fromkeys(kinds):
        of_kind = right_N[[k == kind for k in kinds]]
        by_kind[kind] = {"mean": float(of_kind.mean()), "pairs": len(of_kind)}
    return {
        **clustered({"all": right_N}, scored.clusters)["all"],
        "by_kind": by_kind,
        "scenes": len(set(scored.clusters)),
    }


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
