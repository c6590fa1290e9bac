"""`mmft train --resume`: which run, which checkpoint, and whether the recipe is still the one it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from mmft.config import Recipe, load_recipe
from mmft.report.console import say
from mmft.report.folder import CHECKPOINTS, RECIPE, RunFolder, read_json
from mmft.run.guard import STATE
from mmft.train.checkpoint import MANIFEST, check_checkpoint, newest_checkpoint, steps_of
from mmft.types import UserError

# What may change without a word: it does not change a number.
_FREE = ("name", "logging.", "hub.", "accelerate", "train.keep", "train.save_every", "train.workers")


@dataclass(frozen=True)
class Resumed:
    """A run to go on with. checkpoint: None where it ended before there was one; new: it is yet to begin; finished:
    nothing is left to do.
    """

    run: RunFolder
    checkpoint: Path | None = None
    new: bool = False
    finished: bool = False


def find_run(recipe: Recipe, where: str, force: bool, console: Console) -> Resumed:
    """The run to resume. where: "" for the newest of the recipe's name, a run folder, or a checkpoint in one.

    Raises UserError for none, for a given checkpoint that is damaged, and for a recipe that is not the run's, naming
    the keys, unless `force`.
    """
    path = Path(where)
    checkpoint: Path | None = None
    if not where:
        found = RunFolder.last_run(recipe.logging.dir, recipe.run_name)
        if found is None:
            raise UserError(f"{Path(recipe.logging.dir) / recipe.run_name}: no run to resume; leave --resume out")
        run = found
    elif (path / MANIFEST).is_file() or path.parent.name == CHECKPOINTS:
        check_checkpoint(path)
        run, checkpoint = RunFolder(path.resolve().parents[1]), path
    else:
        run = RunFolder(path)
    if not (run / RECIPE).is_file():
        raise UserError(f"{run.path}: no {RECIPE}: not a run that can be resumed")
    _compare(recipe, run, force, console)
    if checkpoint is None:
        checkpoint, problems = newest_checkpoint(run / CHECKPOINTS)
        for problem in problems:
            say(console, f"{problem}; the one before it is used", "warning")
    return Resumed(run, checkpoint, finished=_is_finished(recipe, run, checkpoint))


def _is_finished(recipe: Recipe, run: RunFolder, checkpoint: Path | None) -> bool:
    """A run that was evaluated is, unless more steps are wanted than it took; one that the guard stopped wants none."""
    if run.evaluation() is None or checkpoint is None:
        return run.evaluation() is not None
    steps = next(step for step, folder in steps_of(checkpoint.parent).items() if folder.name == checkpoint.name)
    stopped = recipe.reward.tripwire.action == "stop" and bool((read_json(checkpoint / STATE) or {}).get("tripped"))
    return steps >= recipe.train.steps or stopped


def _compare(recipe: Recipe, run: RunFolder, force: bool, console: Console) -> None:
    before = dict(_flat(load_recipe(run / RECIPE).model_dump(mode="json")))
    now = dict(_flat(recipe.model_dump(mode="json")))
    changed = [
        f"{key} ({before.get(key)} -> {now.get(key)})"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(_FREE)
    ]
    if not changed:
        return
    if not force:
        raise UserError(
            f"{run.path}: this recipe is not the run's: {', '.join(changed)}; --force goes on with the new values"
        )
    say(console, f"going on with other values: {', '.join(changed)}", "warning")


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys with their values."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield key, value
        return
    for name, item in items:
        yield from _flat(item, f"{key}.{name}" if key else str(name))
