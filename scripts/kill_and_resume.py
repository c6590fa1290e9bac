"""Kills a small run with SIGKILL at random moments, resumes it each time, and compares it with one left alone.

    python scripts/kill_and_resume.py --kills 20 --seed 0

The moments: within sampling, updates, checkpoint writing and evaluation (before, half-way through or after one of their
parts), and at any time by the clock. Exit status 0 where `metrics.jsonl`, `samples.jsonl` and the adapter are equal bit
for bit in the end. Children are forked, so that a kill costs no imports; thread pools do not survive that, so one
thread computes.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmft import run
from mmft.config import load_recipe
from mmft.models import decoding
from mmft.report.folder import CHECKPOINTS
from mmft.run import captioning
from mmft.train import checkpoint
from mmft.train.update import Updater

SMALL = (
    "train.batch=8", "train.samples_per_prompt=2", "train.minibatches=2", "train.epochs=2", "train.save_every=1",
    "eval.samples=4", "eval.every=2", "data.samples=12", "generation.max_new_tokens=8", "model.lora.r=2",
    "logging.samples_every=1", "kl.target=0.5", "reward.tripwire.window=2",
)  # fmt: skip
EQUAL = ("metrics.jsonl", "samples.jsonl", "eval_samples.jsonl", "eval.json", "adapter/adapter_model.safetensors")
STATUS_KILLED = -signal.SIGKILL


@dataclass(frozen=True)
class Moment:
    """Where to kill: in the `call`-th call of a function, or `seconds` after the start where it is None."""

    name: str
    owner: Any
    function: str | None
    call: int = 0
    after: bool = False
    seconds: float = 0.0

    def __str__(self) -> str:
        if self.function is None:
            return f"after {self.seconds:.1f} s"
        return f"{self.name}, {'after' if self.after else 'before'} call {self.call} of {self.function}"


def moments(count: int, seed: int) -> list[Moment]:
    """`count` moments within about two steps of a start, each kind in turn."""
    chance = random.Random(seed)
    kinds: list[Callable[[], Moment]] = [
        lambda: Moment("sampling", decoding.Responses, "draw", chance.randrange(1, 12), chance.random() < 0.5),
        lambda: Moment("update", Updater, "_step", chance.randrange(1, 7), chance.random() < 0.5),
        lambda: Moment("writing a checkpoint", checkpoint, "_seal", chance.randrange(1, 14), True),
        lambda: Moment("renaming a checkpoint", checkpoint, "_sync", chance.randrange(1, 24), True),
        lambda: Moment("evaluation", captioning, "caption", 1, chance.random() < 0.5),
        lambda: Moment("any", None, None, seconds=chance.uniform(0.3, 3.0)),
    ]
    return [kinds[i % len(kinds)]() for i in range(count)]


def child(recipe: Any, resume: str | None, log: Path, moment: Moment | None) -> int:
    """Trains in a forked process until the moment, or to the end; returns its status."""
    pid = os.fork()
    if pid:
        if moment is not None and moment.function is None:
            time.sleep(moment.seconds)
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        return os.waitstatus_to_exitcode(status)
    status = 1
    try:
        with open(log, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        if moment is not None and moment.function is not None:
            arm(moment)
        run.train(recipe, resume)
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def arm(moment: Moment) -> None:
    """Lets the `call`-th call of the moment's function be the process's last."""
    original, calls = getattr(moment.owner, moment.function), [0]

    def deadly(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] < moment.call:
            return original(*args, **options)
        if moment.after:
            original(*args, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(moment.owner, moment.function, deadly)


def compare(one: Path, other: Path) -> list[str]:
    """What differs between two run folders, a line each."""
    different = [name for name in EQUAL if (one / name).read_bytes() != (other / name).read_bytes()]
    return [f"{name} differs: {one / name} and {other / name}" for name in different]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the two runs are left; default: a folder that is removed")
    parser.add_argument("overrides", nargs="*", help="recipe keys, as train.critic=adapter")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        root = (options.folder or Path(temporary)).resolve()
        root.mkdir(parents=True, exist_ok=True)
        keys = [*SMALL, f"train.steps={options.steps}", f"train.seed={options.seed}", *options.overrides]
        alone, killed = (load_recipe("caption_ppo", [*keys, f"logging.dir={root / n}"]) for n in ("alone", "killed"))
        log = root / "output.txt"
        if child(alone, None, log, None):
            print(log.read_text()[-3000:], file=sys.stderr)
            return 1
        folder = root / "killed" / killed.run_name
        kills, attempts, resume = 0, 0, None
        planned = moments(options.kills, options.seed)
        while True:
            moment = planned[kills] if kills < len(planned) else None
            status = child(killed, resume, log, moment)
            attempts += 1
            resume = "" if (folder / "recipe.yaml").is_file() else None
            saved = sorted(path.name for path in (folder / CHECKPOINTS).glob("step-*"))
            print(f"attempt {attempts}: {moment or 'to the end'}: status {status}, checkpoints {saved}", flush=True)
            if status == STATUS_KILLED:
                kills += 1
                continue
            if status:
                print(log.read_text()[-3000:], file=sys.stderr)
                return 1
            if kills == len(planned):
                break
            print("the run ended before it was killed often enough; raise --steps", file=sys.stderr)
            return 1
        problems = compare(root / "alone" / alone.run_name, folder)
        print("\n".join(problems) or f"killed {kills} times and resumed: every bit as it is without")
        return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
