"""Trackers: TensorBoard, Weights & Biases, trackio and whatever else transformers knows, with tables of samples.

Scalars go through transformers' own callbacks. A tracker that fails in the middle of a run is left out from then on,
with one line: the run folder has everything anyway.
"""

from __future__ import annotations

import importlib
import json
import os
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

from mmft.report.console import say
from mmft.report.folder import RECIPE, RunFolder, read_json
from mmft.types import RewardOutput, Row, UserError

IDENTITY = "tracker.json"  # by which a resumed run goes on in the same place
TENSORBOARD = "tensorboard"
SIDE = 192  # pixels of a picture in a table
LIMIT = 16  # samples of a step
_WITH_TABLES = {"WandbCallback": "wandb", "TrackioCallback": "trackio"}


def check_trackers(report_to: Sequence[str]) -> None:
    """Raises UserError for a tracker that does not exist, is not installed, or would ask for a login."""
    try:
        callbacks = [kind() for kind in get_reporting_integration_callbacks(list(report_to))]
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"logging.report_to: {str(error).splitlines()[0]}") from error
    if any(type(callback).__name__ == "WandbCallback" for callback in callbacks):
        offline = os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun")
        if not offline and not importlib.import_module("wandb").api.api_key:
            raise UserError("logging.report_to: wandb knows no API key; run `wandb login`, or set WANDB_MODE=offline")


def open_trackers(report_to: Sequence[str], run: RunFolder, step: int) -> list[TrainerCallback]:
    """Callbacks for a recipe's trackers, which write below the run folder and go on behind `step` of the same run."""
    if not report_to:
        return []
    known = read_json(run / IDENTITY) or {"id": uuid.uuid4().hex[:12]}
    run.write_text(IDENTITY, json.dumps(known) + "\n")
    os.environ |= {"WANDB_RUN_ID": known["id"], "WANDB_RESUME": "allow", "WANDB_DIR": str(run.path)}
    os.environ.setdefault("WANDB_PROJECT", "mmft")
    trackers = []
    for kind in get_reporting_integration_callbacks(list(report_to)):
        if kind.__name__ == "TensorBoardCallback":
            from torch.utils.tensorboard import SummaryWriter

            # What was logged behind the step is of a run that ended there, and will be logged again.
            callback = kind(SummaryWriter(str(run / TENSORBOARD), purge_step=step + 1 if step else None))
        else:
            callback = kind()
        trackers.append(Tracker(callback, run))
    return trackers


class Tracker(TrainerCallback):
    """Passes everything on to one of transformers' callbacks, until that fails."""

    def __init__(self, callback: Any, run: RunFolder):
        self.callback: Any = callback
        self.run = run
        self.name = type(callback).__name__.removesuffix("Callback")

    def _safely(self, action: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        if self.callback is None:
            return
        try:
            action(*args, **kwargs)
        except Exception as error:  # a tracker must not end the run, whatever it raises
            self.callback = None
            line = (str(error).splitlines() or [""])[0]
            message = f"{self.name} is left out from here on ({type(error).__name__}: {line})"
            say(Console(stderr=True), message, "warning")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._safely(lambda: self.callback.on_train_begin(args, state, control, **kwargs))
        if state.is_world_process_zero:
            self._safely(self._log_recipe)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        # A copy: some callbacks rename what they are given.
        self._safely(lambda: self.callback.on_log(args, state, control, logs=dict(logs or {}), **kwargs))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._safely(lambda: self.callback.on_train_end(args, state, control, **kwargs))

    def _log_recipe(self) -> None:
        text = (self.run / RECIPE).read_text(encoding="utf-8") if (self.run / RECIPE).is_file() else ""
        if self.writer is not None:
            self.writer.add_text("recipe", f"```yaml\n{text}\n```", 0)

    @property
    def writer(self) -> Any:
        """TensorBoard's, where this is it."""
        return getattr(self.callback, "tb_writer", None)

    def log_samples(self, step: int, captions: Sequence[str], rows: Sequence[Row], output: RewardOutput) -> None:
        """A table of a step's first samples, beside those of earlier steps and never in their place."""
        self._safely(self._log_samples, step, captions[:LIMIT], rows[:LIMIT], output)

    def _log_samples(self, step: int, captions: Sequence[str], rows: Sequence[Row], output: RewardOutput) -> None:
        columns = ["picture", "prompt", "caption", "references", "reward", *output.raw]
        if self.writer is not None:
            pictures = [thumbnail(row) for row in rows]
            shown = [np.asarray(picture) for picture in pictures if picture is not None]
            if shown:
                self.writer.add_images("samples", np.stack(shown), step, dataformats="NHWC")
            self.writer.add_text("samples", _markdown(columns[1:], _cells(captions, rows, output)), step)
            return
        module = _WITH_TABLES.get(type(self.callback).__name__)
        if module is None:
            return
        tracker: Any = importlib.import_module(module)
        cells = _cells(captions, rows, output)
        data = []
        for row, line in zip(rows, cells, strict=True):
            picture = thumbnail(row)
            data.append([None if picture is None else tracker.Image(picture), *line])
        # W&B shows the last table of a key; trackio keeps one a step.
        key = f"samples/step-{step}" if module == "wandb" else "samples"
        tracker.log({key: tracker.Table(columns=columns, data=data)})


def thumbnail(row: Row) -> Image.Image | None:
    """The row's picture in a white square."""
    if row.image is None:
        return None
    small = row.image.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    square = Image.new("RGB", (SIDE, SIDE), "white")
    square.paste(small, ((SIDE - small.width) // 2, (SIDE - small.height) // 2))
    return square


def _cells(captions: Sequence[str], rows: Sequence[Row], output: RewardOutput) -> list[list[Any]]:
    return [
        [
            row.prompt,
            caption,
            " | ".join(row.references),
            output.total[i],
            *(values[i] for values in output.raw.values()),
        ]
        for i, (caption, row) in enumerate(zip(captions, rows, strict=True))
    ]


def _markdown(columns: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    def cell(value: Any) -> str:
        text = f"{value:.3f}" if isinstance(value, float) else str(value)
        return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())

    head = [" | ".join(columns), " | ".join("---" for _ in columns)]
    return "\n".join(f"| {line} |" for line in [*head, *(" | ".join(map(cell, values)) for values in lines)])
