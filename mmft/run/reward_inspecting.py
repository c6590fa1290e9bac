"""After a reward model is trained: judge it again, or let it score captions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mmft.config import ImageFolderConfig, RewardRecipe, ScenesConfig, load_reward_recipe, resolve
from mmft.data.sources import open_source
from mmft.eval.reward_scores import Predict
from mmft.functional.uncertainty import normal_interval
from mmft.models.features import FeatureStore
from mmft.models.reward import CaptionRewardModel, load_reward_model
from mmft.report.console import say
from mmft.report.folder import RunFolder, clean, is_reward_folder
from mmft.report.reward_table import print_reward
from mmft.rewards.combine import RewardFunction, WeightedTerm
from mmft.rewards.judgements import Judgement, Preference
from mmft.rewards.learned import NETWORK, NetworkTerm, learned_weights, terms_of
from mmft.rewards.preferences import read_judgements
from mmft.rewards.sources import JudgementSets, open_judgements
from mmft.rewards.weights import LearnedWeight
from mmft.run.device import device_of, quiet_loading
from mmft.run.reward_record import judge
from mmft.run.reward_training import check_references, fit_terms
from mmft.train.reward import add_features, captions_of, scores_of
from mmft.types import Row, UserError

SCENES, SCORED_AT_ONCE = 64, 64


def is_reward_model(target: str) -> bool:
    """Whether a folder or bundled name is a reward model's."""
    return is_reward_folder(resolve(target))


def evaluate_reward(target: str, data: str | None = None, overrides: tuple[str, ...] = ()) -> dict[str, Any]:
    """Judges a reward model on the held-out part of its own data, or of `data`; prints and returns the record.

    Its own settings renew its `eval.json`; anything else goes to `eval_custom.json` beside it.
    """
    folder = Path(resolve(target))
    own = folder / "recipe.yaml"
    recipe = load_reward_recipe(own if own.is_file() else "caption", [*_data(data), *overrides])
    quiet_loading()
    model = load_reward_model(target, device_of(recipe))
    sets = open_judgements(recipe)
    terms, fitted = terms_of(target, model.config)
    check_references(terms, sets)
    if not fitted:
        fit_terms(terms, sets.train)
    weights, linear = _trained_weights(folder)
    console = Console(stderr=True)
    with console.status("judging on held-out pictures"):
        record = judge(model, terms, _predict(model, sets), sets, weights, linear)
    print_reward(record)
    if own.is_file() and not target.startswith("builtin:"):
        name = "eval.json" if data is None and not overrides else "eval_custom.json"
        RunFolder(folder).write_text(name, json.dumps(clean(record), indent=2) + "\n")
        say(console, f"written: {folder / name}")
    return record


def _trained_weights(folder: Path) -> tuple[list[LearnedWeight], list[LearnedWeight]]:
    """The learned weights, and those of the terms without the network, as training left them in `eval.json`."""
    file = folder / "eval.json"
    record = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    found = [[LearnedWeight(**entry) for entry in record.get(key) or []] for key in ("weights", "linear_weights")]
    return found[0], found[1]


def _data(data: str | None) -> list[str]:
    if data is None:
        return []
    return ["data.type=scenes"] if data == "scenes" else ["data.type=file", f"data.path={data}"]


def _predict(model: CaptionRewardModel, sets: JudgementSets) -> Predict | None:
    if model.fusion is None:
        return None
    store = FeatureStore(model.encode)
    add_features(store, [*sets.heldout, *sets.heldout_preferences, *sets.adversarial])

    def predict(said: Any) -> Any:
        index = torch.tensor([store.index[item.picture_key, item.prompt, caption] for item, caption in said])
        return scores_of(model, store, index, uncertainty=model.config.loss != "bradley_terry")

    return predict


def score_captions(target: str, data: str, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """A record for every caption of `data`: the reward, every term raw and weighted, the network's score and sigmas.

    data: `scenes` (held-out pictures with their references), a folder with a metadata.jsonl (the captions of all its
    pictures, each scored against the picture's others, one that is alone against itself), or a file of preferences or
    ratings.
    """
    quiet_loading()
    model = load_reward_model(target, device_of(RewardRecipe()))
    weights = learned_weights(model.config)
    plain, fitted = terms_of(target, model.config)
    terms = [WeightedTerm(name, term, weights[name]) for name, term in plain.items()]
    network = NetworkTerm(model) if model.fusion is not None else None
    if network is not None:
        terms.append(WeightedTerm(NETWORK, network, weights[NETWORK]))
    reward = RewardFunction(terms)
    if not fitted and (rows_of := {row.id: row for row, _, _ in _captions(data, None)}):
        reward.fit(rows_of.values())
    captioned = _captions(data, limit)
    scored = 0
    while part := list(islice(captioned, SCORED_AT_ONCE)):
        scored += len(part)
        reward.check(row for row, _, _ in part)
        captions, rows = [caption for _, caption, _ in part], [row for row, _, _ in part]
        output = reward(captions, rows, update=False)
        prediction = network.predict(captions, rows) if network is not None else None
        if prediction is not None:
            low_B, high_B = normal_interval(prediction.mean_B, prediction.sigma_B, 0.9)
        for i, (row, caption, extra) in enumerate(part):
            record: dict[str, Any] = {"id": row.id, "caption": caption, **extra, "reward": output.total[i]}
            record["terms"] = {name: values[i] for name, values in output.raw.items()}
            record["weighted"] = {name: values[i] + 0.0 for name, values in output.weighted.items()}  # no -0.0
            if prediction is not None:
                record["mean"] = float(prediction.mean_B[i])
                record["sigma_epistemic"] = float(prediction.epistemic_B[i])
                record["sigma_aleatoric"] = float(prediction.aleatoric_B[i])
                record["sigma"] = float(prediction.sigma_B[i])
                if model.config.loss != "bradley_terry":  # a prediction of ratings
                    record["interval_90"] = [float(low_B[i]), float(high_B[i])]
            yield record
    if not scored:
        raise UserError(f"{data}: no captions to score")


def _captions(data: str, limit: int | None) -> Iterator[tuple[Row, str, dict[str, Any]]]:
    """(row, caption, what else is known of it)."""
    if data.endswith((".jsonl", ".parquet")):
        for item in read_judgements(data)[:limit]:
            row = item.row()
            for caption in captions_of(item):
                yield row, caption, _known(item, caption)
        return
    scenes = data == "scenes"
    source = open_source(
        ScenesConfig() if scenes else ImageFolderConfig(path=data), "heldout" if scenes else "all", limit or SCENES
    )
    for i in range(min(len(source), limit or len(source))):
        row = source[i]
        for caption in row.references:
            others = tuple(reference for reference in row.references if reference != caption)
            yield Row(row.id, row.image, row.prompt, others or row.references), caption, {}


def _known(item: Judgement, caption: str) -> dict[str, Any]:
    if isinstance(item, Preference):
        return {"role": "chosen" if caption == item.chosen else "rejected", "kind": item.kind}
    return {"rating": getattr(item, "rating", None), "kind": item.kind}
