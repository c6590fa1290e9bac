"""What captions are worth: a vector of numbers a metric, one number a sample, and their summary before and after.

The metric functions are those of the reward terms. The oracle metrics come from the scene graph of synthetic pictures,
which no reward can see, so a reward that rises while they fall is being hacked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mmft.eval.intervals import Summary, compare, summarise
from mmft.metrics.bleu import sentence_bleu
from mmft.metrics.chrf import chrf
from mmft.metrics.cider import corpus_cider_d
from mmft.metrics.rouge_l import rouge_l
from mmft.metrics.text import bad_ending, repetition_rate, tokenise
from mmft.metrics.vqa import exact_match, vqa_accuracy
from mmft.types import Row

if TYPE_CHECKING:
    from mmft.rewards.combine import RewardFunction

Scores = dict[str, np.ndarray]

REFERENCE: dict[str, Callable[[str, Sequence[str]], float]] = {
    "bleu_4": sentence_bleu,
    "rouge_l": rouge_l,
    "chrf": chrf,
}

# Metric here -> key of mmft.data.scenes.score_caption.
ORACLE = {
    "oracle_precision": "object_precision",
    "oracle_recall": "object_recall",
    "oracle_hallucination": "hallucination",
    "oracle_attribute": "attribute_accuracy",
    "oracle_count": "count_accuracy",
}


def evaluate_captions(
    captions: Sequence[str],
    rows: Sequence[Row],
    reward: RewardFunction | None = None,
    finished: Sequence[bool] | None = None,
    only: str | None = None,
) -> Scores:
    """Every metric that the rows allow, for N captions.

    Args:
        captions: N texts, special tokens stripped.
        rows: their N rows. References add bleu_4, cider_d, chrf and rouge_l, answers to questions that are asked add
            vqa_accuracy and exact_match, a scene adds the oracle's metrics.
        reward: adds `reward` and `term_<name>` (raw); its running statistics are left as they are.
        finished: whether each caption reached its end token; adds the rate, and counts in bad_ending.
        only: a metric; those that need references or the whole set are left out unless it is they.
    Returns:
        metric -> N floats, NaN where a metric is undefined for a sample.
    Raises:
        ValueError: different numbers of captions, rows and flags, or none at all.
    """
    captions, rows = list(captions), list(rows)
    ended = [True] * len(captions) if finished is None else [bool(flag) for flag in finished]
    if not captions or not len(captions) == len(rows) == len(ended):
        raise ValueError(f"{len(captions)} captions, {len(rows)} rows and {len(ended)} flags: expected N > 0 of each")
    scores: dict[str, list[float]] = {}
    if reward is not None:
        output = reward(captions, rows, finished=ended, update=False)
        scores["reward"] = [math.nan if i in output.dropped else value for i, value in enumerate(output.total)]
        scores.update({f"term_{name}": list(values) for name, values in output.raw.items()})
    scores.update(_against_references(captions, rows, only))
    scores.update(_against_answers(captions, rows))
    scores["length"] = [float(len(tokenise(caption))) for caption in captions]
    scores["repetition"] = [float(repetition_rate(caption)) for caption in captions]
    scores["bad_ending"] = [float(bad_ending(text, end)) for text, end in zip(captions, ended, strict=True)]
    if finished is not None:
        scores["finished"] = [float(flag) for flag in ended]
    scores.update(_against_oracle(captions, rows))
    return {name: np.asarray(values, dtype=np.float64) for name, values in scores.items()}


def _against_references(captions: list[str], rows: list[Row], only: str | None) -> dict[str, list[float]]:
    if not any(row.references for row in rows):
        return {}
    pairs = list(zip(captions, rows, strict=True))
    found = {
        name: [metric(text, row.references) if row.references else math.nan for text, row in pairs]
        for name, metric in REFERENCE.items()
        if only in (None, name)
    }
    if only in (None, "cider_d"):
        known = [(text, row.references) for text, row in pairs if row.references]
        values = iter(corpus_cider_d([text for text, _ in known], [references for _, references in known]))
        found["cider_d"] = [next(values) if row.references else math.nan for _, row in pairs]
    return found


def _against_answers(captions: list[str], rows: list[Row]) -> dict[str, list[float]]:
    asked = [row.is_asked and (row.answer is not None or bool(row.answers)) for row in rows]
    if not any(asked):
        return {}
    triples = list(zip(captions, rows, asked, strict=True))
    return {
        name: [metric(text, row.known_answers) if known else math.nan for text, row, known in triples]
        for name, metric in (("vqa_accuracy", vqa_accuracy), ("exact_match", exact_match))
    }


def _against_oracle(captions: list[str], rows: list[Row]) -> dict[str, list[float]]:
    if not any(row.scene is not None for row in rows):
        return {}
    from mmft.data.scenes import score_caption

    found = [
        score_caption(text, row.scene) if row.scene is not None else {}
        for text, row in zip(captions, rows, strict=True)
    ]
    scores = {name: [float(of_one.get(key, math.nan)) for of_one in found] for name, key in ORACLE.items()}
    pairs = zip(scores["oracle_precision"], scores["oracle_recall"], strict=True)
    return {**scores, "oracle_f1": [_f1(precision, recall) for precision, recall in pairs]}


def _f1(precision: float, recall: float) -> float:
    """Of the objects named; 0 for a caption that names none, NaN without an oracle."""
    if math.isnan(recall):
        return math.nan
    return 2 * precision * recall / (precision + recall) if precision > 0 else 0.0


def evaluation_record(
    before: Scores | None, after: Scores | None, reference_reward: float | None = None, seed: int = 0
) -> dict[str, Any]:
    """The content of `eval.json`: summaries before and after, their paired difference, N and the references' reward.

    One side may be missing: an evaluation before training, or of a model alone.
    """
    present = [scores for scores in (before, after) if scores]
    if not present:
        raise ValueError("nothing was evaluated")
    record: dict[str, Any] = {}
    sides: dict[str, Scores | None] = {"before": before, "after": after}
    record.update({side: summarise(scores, seed) for side, scores in sides.items() if scores})
    if before and after:
        record["difference"] = compare(before, after, seed)
    record["samples"] = len(next(iter(present[0].values())))
    known = reference_reward is not None and math.isfinite(reference_reward)
    record["reference_reward"] = float(reference_reward) if known else None  # type: ignore[arg-type]
    return record


def share_of_gap_closed(record: dict[str, Any]) -> float | None:
    """How much of the distance from the reward before to the references' own reward training has covered.

    None where a number is missing or the policy was at or above its references from the start.
    """
    ends: list[Summary] = [record.get("before") or {}, record.get("after") or {}]
    low, high = (summary.get("reward", {}).get("mean") for summary in ends)
    ceiling = record.get("reference_reward")
    if low is None or high is None or ceiling is None or ceiling <= low:
        return None
    return (high - low) / (ceiling - low)
