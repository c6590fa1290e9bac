"""`mmft data check`: what is wrong with data, found before a run is spent on it."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from mmft.config import Recipe, load_recipe
from mmft.data.card import data_card
from mmft.data.sources import Source, guess_type, open_source, open_training
from mmft.data.table import TableStream
from mmft.report.console import say
from mmft.report.progress import Bar
from mmft.types import Row, UserError

LISTED = 10
_TINY, _STRETCHED = 32, 20  # pixels a side; long side by short side
_COMMON = 0.2  # a caption of so many pictures says nothing of them


@dataclass
class Findings:
    """problems: what makes a run wrong or loses rows. notes: what may be meant so."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_data(target: str, overrides: Sequence[str] = ()) -> bool:
    """Reads all of a recipe's data, or of a folder's or file's, decodes every picture, and prints the data card and
    what is wrong. Returns whether nothing is.
    """
    recipe = _recipe(target, overrides)
    tolerant = {"on_bad_row": "skip", "max_bad_fraction": 1.0} if hasattr(recipe.data, "on_bad_row") else {}
    data = recipe.data.model_copy(update=tolerant)
    console = Console(stderr=True)
    train, heldout = open_training(data), open_source(data, recipe.eval.split, recipe.eval.samples)
    card = data_card(train, heldout)
    for line in card.lines():
        say(console, line)
    looked = _Look(recipe)
    with Bar("check", card.rows if card.all_counted else None, console) as bar:
        for count, row in enumerate(_rows(train), start=1):
            looked.at(row, "train")
            if count % 50 == 0:
                bar.move(count, "")
    for row in _rows(heldout):
        looked.at(row, "heldout")
    found = looked.findings([*getattr(train, "bad_rows", ()), *getattr(heldout, "bad_rows", ())])
    for label, lines in (("problem", found.problems), ("note", found.notes)):
        for line in lines:
            say(console, line, label)
    say(console, f"{looked.count:,} rows read; {len(found.problems)} problems, {len(found.notes)} notes")
    return not found.problems


def _recipe(target: str, overrides: Sequence[str]) -> Recipe:
    if target.endswith((".yaml", ".yml")):
        return load_recipe(target, overrides)
    if target == "scenes":
        return load_recipe("caption_ppo_fixed", overrides)
    return load_recipe("caption_ppo_fixed", [f"data.type={guess_type(target)}", f"data.path={target}", *overrides])


def _rows(source: Source | TableStream) -> Iterator[Row]:
    """Every usable row once. A bad row of a folder is stood in for by the next, which has been seen."""
    if isinstance(source, TableStream):
        yield from source.rows()
        return
    seen: set[str] = set()
    for index in range(len(source)):
        try:
            row = source[index]
        except UserError:  # not one readable picture is left
            return
        if row.id not in seen:
            seen.add(row.id)
            yield row


class _Look:
    """Looks at rows one by one; keeps digests and counts, no pictures."""

    def __init__(self, recipe: Recipe):
        self.longest = recipe.generation.max_new_tokens
        self.count = 0
        self._sides: dict[str, set[str]] = defaultdict(set)
        self._names: dict[str, list[str]] = defaultdict(list)
        self._texts: Counter[str] = Counter()
        self._odd: dict[str, list[str]] = defaultdict(list)

    def at(self, row: Row, side: str) -> None:
        self.count += 1
        if row.image is not None:
            digest = hashlib.blake2b(row.image.tobytes() + str(row.image.size).encode(), digest_size=16).hexdigest()
            self._sides[digest].add(side)
            if len(self._names[digest]) < LISTED:
                self._names[digest].append(row.id)
            short, long = sorted(row.image.size)
            if short < _TINY:
                self._odd[f"pictures are smaller than {_TINY} pixels"].append(row.id)
            elif long > _STRETCHED * short:
                self._odd[f"pictures are {_STRETCHED} times longer than wide"].append(row.id)
            if row.image.getextrema() and all(low == high for low, high in row.image.getextrema()):  # type: ignore[misc]
                self._odd["pictures are of one colour"].append(row.id)
        if not row.references and row.answer is None:
            self._odd["rows have neither a reference nor an answer"].append(row.id)
        if any(len(reference.split()) > self.longest for reference in row.references):
            self._odd[f"rows have references of more words than max_new_tokens, {self.longest}"].append(row.id)
        self._texts.update({reference.strip().lower() for reference in row.references})

    def findings(self, bad_rows: Sequence[dict[str, Any]]) -> Findings:
        found = Findings()
        distinct = {(bad["file"], bad["row"], bad["reason"]) for bad in bad_rows}
        found.problems += [
            f"{file}{'' if row is None else f', row {row}'}: {reason}"
            for file, row, reason in sorted(distinct, key=str)[:LISTED]
        ]
        if len(distinct) > LISTED:
            found.problems.append(f"{len(distinct) - LISTED} more bad rows")
        both = [self._names[digest] for digest, sides in self._sides.items() if len(sides) > 1]
        if both:
            names = _some(map(" = ".join, both))
            found.problems.append(f"{len(both)} pictures are trained on and held out too: {names}")
        pictures = max(1, len(self._sides))
        text, times = self._texts.most_common(1)[0] if self._texts else ("", 0)
        if times > max(2, _COMMON * pictures):
            found.problems.append(f"{times} of {pictures} pictures have the same caption: {text[:80]!r}")
        apart = {digest: names for digest, names in self._names.items() if _named_apart(names)}
        again = [names for digest, names in apart.items() if len(self._sides[digest]) == 1]
        if again:
            found.notes.append(f"{len(again)} pictures are there under several names: {_some(map(' = '.join, again))}")
        found.notes += [f"{len(ids)} {what}: {_some(ids)}" for what, ids in self._odd.items()]
        return found


def _named_apart(names: Sequence[str]) -> bool:
    """Whether rows of one picture come from several files; several questions to one are as they should be."""
    return len({name.partition("#")[0] for name in names}) > 1 and not all(":" in name for name in names)


def _some(names: Any) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
