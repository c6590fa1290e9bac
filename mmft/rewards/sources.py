"""From a reward recipe's `data` block to judgements: to learn from, to stop by, and held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from mmft.config import Corruptions, JudgementFile, RewardRecipe, SimulatedJudgements
from mmft.data.corruptions import check_kinds, corrupted_pairs
from mmft.data.sources import Source, open_source
from mmft.rewards import simulate
from mmft.rewards.judgements import Judgement, Picture, Preference, split_by_picture
from mmft.rewards.preferences import read_judgements
from mmft.types import UserError

ADVERSARIAL_SCENES = 20


@dataclass(frozen=True)
class JudgementSets:
    """Preferences or ratings, no picture in two of the sets.

    train: the network learns from these. validation: early stopping, term weights, width of intervals. heldout: the
    judgement of the finished model. heldout_preferences: the same pictures as pairs, where `heldout` are ratings.
    adversarial: true captions against false ones. agreement: (picture, whether two annotators agreed).
    """

    train: Sequence[Judgement]
    validation: Sequence[Judgement]
    heldout: Sequence[Judgement]
    heldout_preferences: Sequence[Preference] = ()
    adversarial: Sequence[Preference] = ()
    agreement: Sequence[tuple[str, float]] = ()
    bad_rows: Sequence[dict[str, Any]] = field(default_factory=list)

    @property
    def preferences(self) -> bool:
        return isinstance(self.train[0], Preference)


def open_judgements(recipe: RewardRecipe) -> JudgementSets:
    """What a recipe learns from and is judged by. Raises UserError for files that are not there or do not fit."""
    if isinstance(recipe.data, SimulatedJudgements):
        return _simulated(recipe, recipe.data)
    if isinstance(recipe.data, JudgementFile):
        return _from_file(recipe, recipe.data)
    return _corrupted(recipe, recipe.data)


def _simulated(recipe: RewardRecipe, data: SimulatedJudgements) -> JudgementSets:
    build = simulate.preferences if recipe.loss == "bradley_terry" else simulate.ratings
    train, validation = _split(build(data, "train", data.pictures), recipe)
    return JudgementSets(
        train,
        validation,
        build(data, "heldout", recipe.eval.pictures),
        simulate.preferences(data, "heldout", recipe.eval.pictures),
        simulate.adversarial(data, "heldout", ADVERSARIAL_SCENES),
        simulate.agreement(data, "heldout", recipe.eval.pictures),
    )


def _from_file(recipe: RewardRecipe, data: JudgementFile) -> JudgementSets:
    items = read_judgements(data.path, data.on_bad_row, data.prompt)
    wanted, other = ("preferences", "ratings") if recipe.loss == "bradley_terry" else ("ratings", "preferences")
    if isinstance(items[0], Preference) != (wanted == "preferences"):
        raise UserError(f"{data.path}: holds {other}, and loss {recipe.loss} learns from {wanted}")
    rest, heldout = split_by_picture(list(items), recipe.eval.fraction, seed=1)
    train, validation = _split(rest, recipe)
    if not heldout or not train or not validation:
        raise UserError(f"{data.path}: too few pictures to hold some out; three are the least")
    pairs = [item for item in heldout if isinstance(item, Preference)]
    return JudgementSets(train, validation, heldout, pairs, bad_rows=items.bad_rows)


def _corrupted(recipe: RewardRecipe, data: Corruptions) -> JudgementSets:
    check_kinds(data.kinds)
    train, validation = _split(_pairs(open_source(data.source, "train"), data, data.pictures), recipe)
    seen = {item.picture_key for item in (*train, *validation)}  # two files may hold one picture
    heldout = _pairs(open_source(data.source, "heldout", recipe.eval.pictures), data, recipe.eval.pictures)
    heldout = [item for item in heldout if item.picture_key not in seen]
    if not heldout or not train or not validation:
        raise UserError("data.source: too few pictures with references to hold some out")
    return JudgementSets(train, validation, heldout, heldout)


def _pairs(source: Source, data: Corruptions, pictures: int) -> list[Preference]:
    taken = _First(source, pictures)
    pairs = corrupted_pairs(taken, data.kinds or None, data.per_picture, data.seed)
    known: dict[str, Picture] = {}
    found = []
    for row, chosen, rejected, kind in pairs:
        if row.image is None:
            continue
        if row.id not in known:
            known[row.id] = Picture.of(row.image)
        references = tuple(reference for reference in row.references if reference != chosen)
        found.append(
            Preference(
                picture=known[row.id], prompt=row.prompt, chosen=chosen, rejected=rejected, kind=kind,
                references=references, annotator="corruption",
            )
        )  # fmt: skip
    return found


class _First:
    """The first rows of a source."""

    def __init__(self, source: Source, rows: int):
        self.source, self.rows = source, min(rows, len(source))

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self.rows:
            raise IndexError(f"row {index} of {self.rows}")
        return self.source[index]

    def rows_without_pictures(self, limit: int | None = None) -> Any:
        return islice(self.source.rows_without_pictures(limit), self.rows)


def _split(items: list[Any], recipe: RewardRecipe) -> tuple[list[Any], list[Any]]:
    return split_by_picture(items, recipe.train.validation, seed=0)
