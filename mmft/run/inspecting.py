"""After training: measure, caption, preview."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from mmft.config import DataConfig, Recipe, load_recipe
from mmft.data.pictures import UNREADABLE, load_picture
from mmft.data.preview import contact_sheet
from mmft.data.sources import guess_type, open_source
from mmft.eval.evaluator import evaluate_captions, evaluation_record
from mmft.models.policy import Policy, load_adapter, load_pretrained
from mmft.report.console import say
from mmft.report.folder import RunFolder, clean
from mmft.report.table import print_evaluation
from mmft.run.building import eval_rows, prepare
from mmft.run.captioning import caption_rows
from mmft.run.device import device_of, dtype_of, quiet_loading
from mmft.types import Row, UserError


def evaluate(target: str, data: str | None = None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Measures a run (its base before, its adapter after) or a bare model; prints the table and returns the record.

    A run's own settings renew its `eval.json`; anything else goes to `eval_NAME.json` beside it.
    """
    quiet_loading()
    run, recipe = _target(target, data, overrides)
    job = prepare(recipe)
    rows = eval_rows(job)
    console = Console(stderr=True)
    if run is not None and (run / "reward" / "state.json").is_file():
        job.reward.load_state_dict(json.loads((run / "reward" / "state.json").read_text(encoding="utf-8")))
    sides = []
    for trained in (None, run) if run is not None else (None,):
        policy = _load(trained, recipe)
        with console.status(
            f"captioning {len(rows)} pictures with the {'base' if trained is None else 'trained'} model"
        ):
            captions, ended = caption_rows(policy, rows, recipe)
        sides.append(evaluate_captions(captions, rows, job.reward, ended))
    ceiling = job.reward.reference_reward(rows, leave_one_out=False)
    record = evaluation_record(sides[0], sides[1] if len(sides) > 1 else None, ceiling)
    print_evaluation(record, run.last_step() if run is not None else None)
    if run is not None:
        own = data is None and not overrides
        name = "eval.json" if own else f"eval_{Path(data).name if data else 'custom'}.json"
        run.write_text(name, json.dumps(clean(record), indent=2) + "\n")
        say(console, f"written: {run / name}")
    return record


def generate(target: str, images: Sequence[Path], prompt: str | None = None) -> list[str]:
    """Greedy captions of picture files by a run's adapter or a bare model."""
    run, recipe = _target(target, None, ())
    text = prompt or recipe.data.prompt
    rows = [Row(str(path), _picture(path), text) for path in images]
    return caption_rows(_load(run, recipe), rows, recipe)[0]


def preview(data: DataConfig, rows: int, out: Path) -> Path:
    """A contact sheet of the first training rows."""
    source = open_source(data, "train")
    return contact_sheet([source[i] for i in range(min(rows, len(source)))], out)


def _target(target: str, data: str | None, overrides: Sequence[str]) -> tuple[RunFolder | None, Recipe]:
    """A run folder with its own recipe, or a model under the default recipe."""
    where: list[str] = []
    if data is not None:
        where = ["data.type=scenes"] if data == "scenes" else [f"data.type={guess_type(data)}", f"data.path={data}"]
    if (Path(target) / "recipe.yaml").is_file():
        run = RunFolder(target)
        if (run / "config.json").is_file() and not (
            run / "adapter_config.json"
        ).is_file():  # a merged model that was pulled, with the recipe that made it
            return None, load_recipe(run / "recipe.yaml", [f"model.path={run.path.resolve()}", *where, *overrides])
        return run, load_recipe(run / "recipe.yaml", [*where, *overrides])
    return None, load_recipe("caption_ppo", [f"model.path={target}", *where, *overrides])


def _load(run: RunFolder | None, recipe: Recipe) -> Policy:
    dtype, device = dtype_of(recipe), device_of(recipe)
    quiet_loading()
    if run is None:
        return Policy(*load_pretrained(recipe.model, dtype, device))
    for folder in (run / "adapter", run.path):  # as trained here, or as pulled
        if (folder / "adapter_config.json").is_file() or (folder / "config.json").is_file():
            return load_adapter(recipe.model, folder, dtype, device)
    raise UserError(f"{run.path}: no adapter was saved here; did the training end?")


def _picture(path: Path) -> Any:
    try:
        return load_picture(path)
    except UNREADABLE as error:
        raise UserError(f"{path}: not a picture that can be read ({error})") from error
