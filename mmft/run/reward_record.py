"""The record of a reward model, `eval.json`: scores of held-out judgements, put together by `mmft.eval.reward_eval`."""

from __future__ import annotations

import base64
import dataclasses
import io
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmft.data.unusual import UNUSUAL, unusual
from mmft.eval import reward_eval
from mmft.eval.intervals import clustered
from mmft.eval.reward_scores import Predict, Scored, Side, score
from mmft.models.reward import CaptionRewardModel
from mmft.rewards.judgements import Judgement, Preference
from mmft.rewards.learned import NETWORK, learned_weights
from mmft.rewards.sources import JudgementSets
from mmft.rewards.terms import Term
from mmft.rewards.weights import LearnedWeight
from mmft.train.reward import captions_of

OOD_PICTURES = 150
EXAMPLES = 12

Totals = dict[str, np.ndarray]


def judge(
    model: CaptionRewardModel,
    terms: Mapping[str, Term],
    predict: Predict | None,
    sets: JudgementSets,
    weights: Sequence[LearnedWeight] = (),
    linear: Sequence[LearnedWeight] = (),
) -> dict[str, Any]:
    """What a reward model is worth on held-out judgements. linear: weights of the terms without the network, a
    baseline.
    """
    heldout = score(sets.heldout, terms, predict)
    pairs = (
        heldout if sets.preferences or not sets.heldout_preferences else score(sets.heldout_preferences, terms, predict)
    )
    record: dict[str, Any] = {
        "samples": {
            "pictures": len(set(heldout.clusters)),
            "pairs": len(pairs.items) if pairs.second is not None else 0,
            "ratings": 0 if sets.preferences else len(heldout.items),
        },
        "weights": [_weight(weight) for weight in weights],
        "linear_weights": [_weight(weight) for weight in linear],
    }
    if sets.agreement:
        keys, agreed = zip(*sets.agreement, strict=True)
        record["agreement"] = clustered({"agreement": np.array(agreed)}, list(keys))["agreement"]
    if pairs.second is not None:
        chosen, rejected = (totals_of(side, model, linear) for side in (pairs.first, pairs.second))
        record["pairwise"] = reward_eval.pairwise(pairs, chosen, rejected)
        record["differences"] = reward_eval.differences(pairs, chosen, rejected)
    record["calibration"] = _calibration(model, heldout)
    if sets.adversarial:
        false = score(sets.adversarial, terms, predict)
        if false.second is not None:
            first, second = (totals_of(side, model, linear)["reward"] for side in (false.first, false.second))
            record["adversarial"] = reward_eval.adversarial(false, first, second)
    if not sets.preferences:
        totals = totals_of(heldout.first, model, linear)
        record["kendall_tau"] = reward_eval.rank_correlation(heldout, totals)
        record["length_bias"] = reward_eval.length_biases(
            totals, heldout.first.words_N, heldout.ratings_N, heldout.clusters
        )
    elif pairs.second is not None:
        record["length_bias"] = _length_bias_of_pairs(pairs, chosen, rejected)
    if predict is not None:
        record["ood"] = _out_of_distribution(model, sets.heldout)
        record["samples"]["ood"] = len(UNUSUAL) * min(OOD_PICTURES, record["samples"]["pictures"])
    return record


def totals_of(side: Side, model: CaptionRewardModel, linear: Sequence[LearnedWeight] = ()) -> Totals:
    """What each scorer says of N captions: the whole reward, the network alone, learned terms alone, the baselines."""
    weights = learned_weights(model.config)
    names = [name for name in weights if name != NETWORK]
    reward = sum((weights[name] * side.terms[name] for name in names), np.zeros(len(side.words_N)))
    totals: Totals = {}
    if side.network_N is not None:
        reward = reward + weights[NETWORK] * side.network_N
        totals["network"] = side.network_N
    if linear:
        totals["linear"] = sum((w.weight * side.terms[w.name] for w in linear), np.zeros(len(side.words_N)))
    return {"reward": reward, **totals, **side.baselines}


def _weight(weight: LearnedWeight) -> dict[str, Any]:
    return dataclasses.asdict(weight)


def _calibration(model: CaptionRewardModel, heldout: Scored) -> dict[str, Any]:
    """Of the probabilities that preferences get, or of predicted ratings."""
    if heldout.second is None:
        if heldout.first.network_N is None or heldout.first.sigma_N is None:
            return {}
        found = reward_eval.rating_calibration(heldout.ratings_N, heldout.first.network_N, heldout.first.sigma_N)
        return {"ratings": {**found, "sigma_scale": model.config.sigma_scale}}
    # The weights are those of a logistic regression: their sum, before it is scaled, is a difference of log odds.
    chosen, rejected = (
        totals_of(side, model)["reward"] / model.config.reward_scale for side in (heldout.first, heldout.second)
    )
    return {"preferences": reward_eval.preference_calibration(chosen, rejected, heldout.ties_N)}


def _length_bias_of_pairs(pairs: Scored, chosen: Totals, rejected: Totals) -> dict[str, Any]:
    """Without ratings, equal quality is what a pair was judged: chosen or rejected."""
    assert pairs.second is not None
    words = np.concatenate([pairs.first.words_N, pairs.second.words_N])
    quality = np.concatenate([np.ones(len(pairs.items)), np.zeros(len(pairs.items))])
    totals = {name: np.concatenate([chosen[name], rejected[name]]) for name in chosen if name != "length"}
    return reward_eval.length_biases(totals, words, quality, [*pairs.clusters, *pairs.clusters])


def _out_of_distribution(model: CaptionRewardModel, heldout: Sequence[Judgement]) -> dict[str, Any]:
    """sigma for held-out pictures and for unusual versions of them, each with the same caption."""
    items = list({item.picture_key: item for item in heldout}.values())[:OOD_PICTURES]
    captions, rows = [captions_of(item)[0] for item in items], [item.row() for item in items]
    inside = model.predict(captions, rows).sigma_B.double().numpy()
    outside = {}
    for kind in UNUSUAL:
        changed = [
            dataclasses.replace(row, image=unusual(row.image, kind, random.Random(f"{kind}/{row.id}")))
            for row in rows
            if row.image is not None
        ]
        outside[kind] = model.predict(captions, changed).sigma_B.double().numpy()
    return reward_eval.out_of_distribution(inside, outside)


def example_pairs(model: CaptionRewardModel, sets: JudgementSets) -> list[dict[str, Any]]:
    """Some held-out pairs with their pictures and the network's scores, for the page: one of each kind, then more."""
    pairs = [item for item in (sets.adversarial or sets.heldout_preferences) if isinstance(item, Preference)]
    first = list({item.kind: item for item in reversed(pairs)}.values())[::-1]
    items = [*first, *(item for item in pairs if item not in first)][:EXAMPLES]
    examples: list[dict[str, Any]] = [
        {"image": _data_uri(item), "kind": item.kind, "chosen": item.chosen, "rejected": item.rejected}
        for item in items
    ]
    if model.fusion is not None and items:
        rows = [item.row() for item in items]
        for side in ("chosen", "rejected"):
            prediction = model.predict([getattr(item, side) for item in items], rows)
            for i, example in enumerate(examples):
                example[f"score_{side}"] = float(prediction.mean_B[i])
                example[f"sigma_{side}"] = float(prediction.sigma_B[i])
    return examples


def _data_uri(item: Judgement) -> str:
    buffer = io.BytesIO()
    picture = item.open_picture()
    picture.thumbnail((192, 192))
    picture.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
