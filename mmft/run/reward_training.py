"""`mmft reward train`: from judgements to a reward model that is trained, saved, read back, judged and reported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import set_seed

from mmft.config import RewardRecipe, dump_recipe, resolve
from mmft.eval.reward_scores import Predict, Scored, score
from mmft.functional.uncertainty import sigma_scale
from mmft.models.features import FeatureStore
from mmft.models.reward import (
    CaptionRewardConfig,
    CaptionRewardModel,
    CaptionRewardProcessor,
    load_reward_model,
    load_towers,
    tower_dims,
)
from mmft.report.console import say
from mmft.report.folder import RunFolder, clean, write_atomic
from mmft.report.reward_page import write_reward_page
from mmft.report.reward_table import print_reward
from mmft.rewards.judgement_files import check_suffix, write_preferences, write_ratings
from mmft.rewards.judgements import Judgement
from mmft.rewards.learned import NETWORK, TERMS_FILE, label_of
from mmft.rewards.sources import JudgementSets, open_judgements
from mmft.rewards.terms import Term, build_term
from mmft.rewards.weights import LearnedWeight, learn_weights
from mmft.run.device import device_of, quiet_loading
from mmft.run.reward_record import example_pairs, judge
from mmft.train.reward import (
    TrainingSet,
    add_features,
    captions_of,
    fit_distance,
    scores_of,
    train_network,
)
from mmft.types import UserError

LINEAR_JUDGEMENTS = 6000  # enough for the weights of a few terms
NOT_OPTIONS = {"type", "name", "weight", "normalize"}


@dataclass
class Trained:
    """A reward model and what its training leaves for its judgement: terms, feature store, learned weights."""

    model: CaptionRewardModel
    terms: dict[str, Term]
    store: FeatureStore | None
    weights: list[LearnedWeight]
    linear: list[LearnedWeight]

    @property
    def predict(self) -> Predict | None:
        store = self.store
        if store is None:
            return None

        def from_store(said: Sequence[tuple[Judgement, str]]) -> Any:
            index = torch.tensor([store.index[item.picture_key, item.prompt, caption] for item, caption in said])
            # A preference is a difference of scores: sigma would be computed for nothing.
            return scores_of(self.model, store, index, uncertainty=self.model.config.loss != "bradley_terry")

        return from_store


def train_reward(recipe: RewardRecipe) -> Path:
    """Trains, saves, judges and reports a reward model; returns its folder."""
    console = Console(stderr=True)
    with console.status("reading judgements"):
        sets = open_judgements(recipe)
    run = RunFolder.create(recipe.logging.dir, recipe.run_name, dump_recipe(recipe))
    say(console, f"-> {run.path}", recipe.name)
    with run.lock():
        return _train_in(run, recipe, sets, console)


def _train_in(run: RunFolder, recipe: RewardRecipe, sets: JudgementSets, console: Console) -> Path:
    set_seed(recipe.train.seed)
    quiet_loading()
    try:
        trained = _trained(recipe, sets, run, console)
    except UserError:
        shutil.rmtree(run.path)  # nothing was trained: the name stays free
        raise
    with console.status("saving"):
        save_reward(trained.model, trained.terms, run.path, sets.heldout[:8])
    with console.status("judging on held-out pictures"):
        record = judge(trained.model, trained.terms, trained.predict, sets, trained.weights, trained.linear)
    run.write_text("eval.json", json.dumps(clean(record), indent=2) + "\n")
    run.write_text("examples.json", json.dumps(example_pairs(trained.model, sets)) + "\n")
    print_reward(record)
    if sets.bad_rows:
        run.write_lines("bad_rows.jsonl", list(sets.bad_rows))
        say(console, f"skipped {len(sets.bad_rows)} bad rows, listed in {run / 'bad_rows.jsonl'}")
    say(
        console,
        f"report: {write_reward_page(run.path)}\nuse it:  mmft train caption_ppo reward.model={run.path}",
    )
    return run.path


def write_judgements(recipe: RewardRecipe, out: Path) -> int:
    """Writes the judgements that a recipe would learn from to a JSONL or parquet file; returns how many."""
    check_suffix(out)
    sets = open_judgements(recipe)
    items = [*sets.train, *sets.validation]
    write: Any = write_preferences if sets.preferences else write_ratings
    write(out, items)
    return len(items)


def build_terms(recipe: RewardRecipe, sets: JudgementSets) -> dict[str, Term]:
    """The recipe's terms, fitted on the references of the training pictures."""
    terms = {e.label: build_term(e.type, **e.model_dump(exclude=NOT_OPTIONS)) for e in recipe.terms}
    check_references(terms, sets)
    fit_terms(terms, sets.train)
    return terms


def check_references(terms: Mapping[str, Term], sets: JudgementSets) -> None:
    """Raises UserError, naming term and picture, where a term needs references that are not there."""
    needing = next((name for name, term in terms.items() if term.needs_references), None)
    for item in (*sets.train, *sets.validation, *sets.heldout):
        if needing is not None and not item.references:
            source = item.picture.source
            name = source if isinstance(source, Path) else item.picture_key
            raise UserError(f"reward term {needing!r} needs references, and picture {name} has none")


def fit_terms(terms: Mapping[str, Term], items: Sequence[Judgement]) -> None:
    """Fits terms on the references of judged pictures, each picture once."""
    rows = list({item.picture_key: item.row(picture=False) for item in items}.values())
    for term in terms.values():
        if term.needs_fit:
            term.fit(rows)


def _trained(recipe: RewardRecipe, sets: JudgementSets, run: RunFolder, console: Console) -> Trained:
    terms = build_terms(recipe, sets)
    if recipe.model is None:
        model, store = CaptionRewardModel(CaptionRewardConfig(loss=recipe.loss)), None
    else:
        model = build_model(recipe)
        store = _encode(model, sets, console)
        _learn(model, store, sets, recipe, run, console)
    trained = Trained(model, terms, store, [], [])
    _combine(trained, recipe, sets)
    return trained


def build_model(recipe: RewardRecipe) -> CaptionRewardModel:
    """A fresh network over the recipe's towers."""
    m = recipe.model
    if m is None:
        raise ValueError("this recipe has no network")
    options = m.model_dump()
    config = CaptionRewardConfig(**options, loss=recipe.loss)
    processor = CaptionRewardProcessor.of_towers(resolve(m.vision), resolve(m.text), m.grounded)
    towers = load_towers(config, "")
    device = device_of(recipe)
    for tower in towers.values():
        tower.to(device)  # type: ignore[arg-type]  # transformers' stubs
    config.vision_dim, config.text_dim = tower_dims(config, towers, processor)
    model = CaptionRewardModel(config).to(device)  # type: ignore[arg-type]
    model.attach(processor, towers)
    return model


def _encode(model: CaptionRewardModel, sets: JudgementSets, console: Console) -> FeatureStore:
    store = FeatureStore(model.encode)
    items = [*sets.train, *sets.validation, *sets.heldout, *sets.heldout_preferences, *sets.adversarial]
    with _bar("encode", len({(i.picture_key, i.prompt) for i in items}), console) as advance:
        add_features(store, items, advance)
    return store


def _learn(
    model: CaptionRewardModel,
    store: FeatureStore,
    sets: JudgementSets,
    recipe: RewardRecipe,
    run: RunFolder,
    console: Console,
) -> None:
    """The network's weights, then what its numbers mean: their centre, scale and uncertainty."""
    config = model.config
    if not sets.preferences:
        ratings = np.array([item.rating for item in sets.train])  # type: ignore[attr-defined]
        config.target_mean, config.target_std = float(ratings.mean()), float(ratings.std()) or 1.0
    train, validation = (
        TrainingSet.of(items, store, config.target_mean, config.target_std) for items in (sets.train, sets.validation)
    )
    with _bar("train", recipe.train.steps, console) as advance:
        done = 0

        def report(step: int, steps: int, metrics: dict[str, float]) -> None:
            nonlocal done
            run.log(step, metrics)
            shown = f"loss {metrics['loss/train']:.3f}  held out {metrics['loss/validation']:.3f}"
            advance(step - done, shown)
            done = step

        train_network(model, store, train, validation, recipe, report)
    fit_distance(model, store, train, validation)
    prediction = scores_of(model, store, validation.first_N)
    if sets.preferences:
        config.target_mean -= float(prediction.mean_B.mean())
        return
    error_B = torch.tensor([item.rating for item in sets.validation]) - prediction.mean_B  # type: ignore[attr-defined]
    if recipe.loss == "mse":
        config.noise_std = float(error_B.std(correction=0)) / config.target_std
        prediction = scores_of(model, store, validation.first_N)
    if len(error_B) >= 10:
        config.sigma_scale = sigma_scale(error_B, prediction.sigma_B)


def _combine(trained: Trained, recipe: RewardRecipe, sets: JudgementSets) -> None:
    """Learned weights of the terms and the network, on judgements that the network was not trained on."""
    config, names = trained.model.config, list(trained.terms)
    linear = [*sets.validation, *sets.train[:LINEAR_JUDGEMENTS]]
    plain = score(linear, trained.terms)
    if names:
        trained.linear = fit_weights(names, plain, network=False)
    if recipe.model is None:
        trained.weights = trained.linear
    elif names:
        scored = score(sets.validation, trained.terms, trained.predict)
        trained.weights = fit_weights([*names, NETWORK], scored, network=True)
        config.network_weight = trained.weights[-1].weight
    by_name = {weight.name: weight.as_dict() for weight in trained.weights}
    entries = [{k: v for k, v in e.model_dump().items() if k not in ("weight", "normalize")} for e in recipe.terms]
    config.terms = [{**entry, **_kept(by_name[label_of(entry)])} for entry in entries]
    weights_K = np.array(
        [by_name[name]["weight"] for name in names] + ([config.network_weight] if recipe.model else [])
    )
    if not weights_K.any():
        raise UserError("the judgements give every term and the network a weight of 0: nothing was learned")
    scored = score(sets.validation, trained.terms, trained.predict)
    good = scored.first.matrix(names, network=True) @ weights_K
    if not sets.preferences:
        good = good[scored.ratings_N >= np.median(scored.ratings_N)]
    config.reward_scale = 1.0 / float(good.std()) if good.std() > 0 else 1.0


def _kept(weight: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in weight.items() if key != "name"}


def fit_weights(names: Sequence[str], scored: Scored, network: bool) -> list[LearnedWeight]:
    """Weights from scored judgements: logistic regression on pairs, linear on ratings."""
    labels = [name for name in names if name != NETWORK]
    first = scored.first.matrix(labels, network)
    if scored.second is None:
        return learn_weights(names, first, scored.ratings_N, scored.clusters, "squared")
    target = np.where(scored.ties_N, 0.5, 1.0)
    return learn_weights(names, first - scored.second.matrix(labels, network), target, scored.clusters, "logistic")


def save_reward(model: CaptionRewardModel, terms: Mapping[str, Term], folder: Path, probe: Sequence[Judgement]) -> None:
    """Saves, and reads back: a model that would score otherwise than the one trained is not saved.

    Raises RuntimeError when it does.
    """
    model.save_pretrained(folder)
    fitted = {name: term.state_dict() for name, term in terms.items() if term.needs_fit}
    write_atomic(folder / TERMS_FILE, json.dumps(fitted).encode())
    if model.fusion is None:
        return
    captions, rows = [captions_of(item)[0] for item in probe], [item.row() for item in probe]
    again = load_reward_model(str(folder.resolve()), str(model.device))
    saved, kept = again.predict(captions, rows), model.predict(captions, rows)
    if not (torch.equal(saved.mean_B, kept.mean_B) and torch.equal(saved.sigma_B, kept.sigma_B)):
        raise RuntimeError(f"{folder}: the saved reward model scores otherwise than the trained one")


class _bar:
    """A progress bar that is quiet where the output is no terminal; `advance(n, text)` inside."""

    def __init__(self, name: str, total: int, console: Console):
        columns = (
            TextColumn(f"[bold]{name}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[text]}", markup=False),
        )  # fmt: skip
        self.name, self.total, self.console = name, total, console
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self.done, self.lines = 0, 0

    def __enter__(self) -> Any:
        self.progress.start()
        self.task = self.progress.add_task(self.name, total=self.total, text="")
        return self.advance

    def advance(self, count: int, text: str = "") -> None:
        self.done += count
        self.progress.update(self.task, advance=count, text=text)
        due = self.done * 5 // max(1, self.total)  # a log gets five lines, not a redrawn bar
        if not self.console.is_terminal and due > self.lines:
            self.lines = due
            self.console.print(f"{self.name} {self.done}/{self.total} {text}".rstrip(), highlight=False)

    def __exit__(self, *error: Any) -> None:
        self.progress.stop()
