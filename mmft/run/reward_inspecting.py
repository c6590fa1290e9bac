"""After a reward model is trained: judge it again, or let it score captions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mmft.config import ImageFolderConfig, RewardRecipe, ScenesConfig, load_reward_recipe, resolve
from mmft.data.sources import open_source
from mmft.eval.reward_scores import Predict
from mmft.models.features import FeatureStore
from mmft.models.reward import CaptionRewardModel, load_reward_model
from mmft.report.folder import RunFolder, clean, is_reward_folder
from mmft.report.reward_table import print_reward
from mmft.rewards.combine import RewardFunction, WeightedTerm
from mmft.rewards.judgements import Judgement, Preference
from mmft.rewards.learned import NETWORK, NetworkTerm, label_of, learned_weights, term_of
from mmft.rewards.preferences import read_judgements
from mmft.rewards.sources import JudgementSets, open_judgements
from mmft.run.reward_record import judge
from mmft.run.training import device_of, quiet_loading
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
    terms = {label_of(entry): term_of(entry) for entry in model.config.terms}
    rows = list({item.picture_key: item.row(picture=False) for item in sets.train}.values())
    for term in terms.values():
        if term.needs_fit:
            term.fit(rows)
    console = Console(stderr=True)
    with console.status("judging on held-out pictures"):
        record = judge(model, terms, _predict(model, sets), sets)
    print_reward(record)
    if own.is_file() and not target.startswith("builtin:"):
        name = "eval.json" if data is None and not overrides else "eval_custom.json"
        if name == "eval.json" and (folder / name).is_file():  # what only training knows stays
            before = json.loads((folder / name).read_text(encoding="utf-8"))
            record["weights"] = before.get("weights", [])
        RunFolder(folder).write_text(name, json.dumps(clean(record), indent=2) + "\n")
        console.print(f"written: {folder / name}", highlight=False)
    return record


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
    terms = [WeightedTerm(label_of(e), term_of(e), weights[label_of(e)]) for e in model.config.terms]
    network = NetworkTerm(model) if model.fusion is not None else None
    if network is not None:
        terms.append(WeightedTerm(NETWORK, network, weights[NETWORK]))
    reward = RewardFunction(terms)
    pairs = list(_captions(data, limit))
    if not pairs:
        raise UserError(f"{data}: no captions to score")
    rows = [row for row, _, _ in pairs]
    reward.check(rows)
    reward.fit(rows)
    for start in range(0, len(pairs), SCORED_AT_ONCE):
        part = pairs[start : start + SCORED_AT_ONCE]
        captions, rows = [caption for _, caption, _ in part], [row for row, _, _ in part]
        output = reward(captions, rows, update=False)
        prediction = network.predict(captions, rows) if network is not None else None
        for i, (row, caption, extra) in enumerate(part):
            record: dict[str, Any] = {"id": row.id, "caption": caption, **extra, "reward": output.total[i]}
            record["terms"] = {name: values[i] for name, values in output.raw.items()}
            record["weighted"] = {name: values[i] + 0.0 for name, values in output.weighted.items()}  # no -0.0
            if prediction is not None:
                record["mean"] = float(prediction.mean_B[i])
                record["sigma_epistemic"] = float(prediction.epistemic_B[i])
                record["sigma_aleatoric"] = float(prediction.aleatoric_B[i])
                record["sigma"] = float(prediction.sigma_B[i])
            yield record


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
