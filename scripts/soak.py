"""Trains a micro model for thousands of steps and watches what must not grow: memory, open files, threads.

    python scripts/soak.py --steps 2000

The model is an Idefics3 of toy size, built here; the data a table of scenes that is read as a stream by
worker threads; a checkpoint is written every 50 steps and the model evaluated every 250. Memory is the process's
resident set, a median of 100 steps: the last 100 against those after step 200, when every cache has filled. Exit status
0 where it has grown by less than 1% and neither open files nor threads are more than then. Readings go to
runs/soak.jsonl.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parent / "bench"))

import checkpoint

from mmft import run
from mmft.config import load_recipe
from mmft.data.scenes import EmojiScenes
from mmft.run import training

WARM, WINDOW, GROWTH = 200, 100, 0.01
RECIPE = (
    "data.type=table", "data.columns.image=image", "data.shuffle_window=64", "train.batch=16",
    "train.samples_per_prompt=4", "train.minibatches=2", "train.epochs=2", "train.save_every=50", "train.keep=2",
    "generation.max_new_tokens=12", "model.lora.r=4", "model.feature_cache_gb=0.001", "eval.samples=8",
    "eval.every=250", "logging.samples_every=10", "reward.tripwire.action=warn", "kl.target=0.1",
)  # fmt: skip


class Watch(TrainerCallback):
    """A reading a step: resident bytes, open files, threads."""

    def __init__(self, out: Path):
        self.out = out
        self.readings: list[dict[str, int]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        reading = {
            "step": state.global_step, "bytes": pages * os.sysconf("SC_PAGESIZE"),
            "files": len(os.listdir("/proc/self/fd")), "threads": threading.active_count(),
            "tasks": len(os.listdir("/proc/self/task")),
        }  # fmt: skip
        self.readings.append(reading)
        with open(self.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(reading) + "\n")


def write_table(path: Path, rows: int) -> None:
    """Scenes with their captions, a line each."""
    scenes = EmojiScenes(rows, "train", 0, "Describe the picture.")
    with open(path, "w", encoding="utf-8") as file:
        for row in scenes:
            buffer = io.BytesIO()
            assert row.image is not None
            row.image.save(buffer, "PNG")
            line = {"image": base64.b64encode(buffer.getvalue()).decode(), "captions": list(row.references)}
            file.write(json.dumps(line) + "\n")


def verdict(readings: Sequence[dict[str, int]]) -> tuple[bool, str]:
    """Whether nothing has grown, and what was read."""
    early = [reading for reading in readings if WARM < reading["step"] <= WARM + WINDOW]
    late = list(readings)[-WINDOW:]
    before, after = (median(r["bytes"] for r in part) for part in (early, late))
    growth = after / before - 1
    good, said = growth < GROWTH, [f"memory {before / 1e6:.1f} -> {after / 1e6:.1f} MB ({growth:+.2%})"]
    for name in ("files", "threads", "tasks"):
        most = [max(r[name] for r in part) for part in (early, late)]
        good &= most[1] <= most[0]
        said.append(f"{name} {most[0]} -> {most[1]}")
    return good, f"steps {WARM + 1}-{WARM + WINDOW} and {late[0]['step']}-{late[-1]['step']}: {', '.join(said)}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path("runs/soak.jsonl"))
    parser.add_argument("overrides", nargs="*", help="recipe keys")
    options = parser.parse_args(arguments)
    if options.steps < WARM + 2 * WINDOW:
        parser.error(f"--steps: at least {WARM + 2 * WINDOW}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.unlink(missing_ok=True)
    watch, build_trainer = Watch(options.out.resolve()), training.build_trainer

    def watched(*args: Any) -> Any:
        trainer = build_trainer(*args)
        trainer.add_callback(watch)
        return trainer

    training.build_trainer = watched
    with tempfile.TemporaryDirectory() as folder:
        model = checkpoint.build(checkpoint.PRESETS["tiny"], Path(folder))
        table = Path(folder) / "scenes.jsonl"
        write_table(table, 300)
        keys = [*RECIPE, f"model.path={model}", f"data.path={table}", f"logging.dir={folder}"]
        run.train(load_recipe("caption_ppo_fixed", [*keys, f"train.steps={options.steps}", *options.overrides]))
    good, said = verdict(watch.readings)
    print(f"{said}: {'nothing grows' if good else 'GROWS'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
