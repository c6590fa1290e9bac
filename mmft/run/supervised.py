"""Supervised steps of a run: all of it (`algorithm.type: sft`), or its warm-up."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

from rich.console import Console

from mmft.data.sources import open_cursor
from mmft.models.policy import Policy
from mmft.report.console import say
from mmft.report.folder import WARM_UP, RunFolder
from mmft.report.progress import Bar
from mmft.run.building import Job
from mmft.run.device import device_of
from mmft.train.ppo import VisionPPOTrainer
from mmft.train.sft import SFTSettings, fine_tune
from mmft.types import UserError


def check_supervised(job: Job, resume: str | None) -> None:
    """Raises UserError for what supervised steps do not do."""
    supervised = "algorithm sft" if job.recipe.algorithm.type == "sft" else "warm_up" if job.recipe.warm_up else None
    if supervised and job.processes.count > 1:
        raise UserError(f"{supervised}: runs in one process; remove the key accelerate")
    if job.recipe.algorithm.type == "sft" and resume is not None:
        raise UserError("algorithm sft: keeps no checkpoints to go on from; train it anew")


def warm_up(job: Job, policy: Policy, trainer: VisionPPOTrainer, run: RunFolder, console: Console) -> None:
    """The recipe's supervised steps before reinforcement learning, logged in warm_up.jsonl."""
    w = job.recipe.warm_up
    assert w is not None
    run.write_text(WARM_UP, "")
    lines: list[str] = []

    def log(step: int, numbers: dict[str, float]) -> None:
        lines.append(json.dumps({"step": step, **numbers}))
        run.write_text(WARM_UP, "\n".join(lines) + "\n")

    settings = SFTSettings(
        w.steps, w.batch, w.micro_batch or w.batch, w.lr, seed=job.recipe.train.seed,
        use_cpu=device_of(job.recipe) == "cpu", workers=job.recipe.train.workers,
    )  # fmt: skip
    _run(job, policy, trainer, run, console, settings, log, "warm-up")


def supervised(job: Job, policy: Policy, trainer: VisionPPOTrainer, run: RunFolder, console: Console) -> None:
    """All steps of a recipe whose algorithm is sft, logged in metrics.jsonl."""
    t = job.recipe.train
    settings = SFTSettings(
        t.steps, t.batch, t.micro_batch or t.batch, t.lr, t.schedule, t.warmup, job.recipe.algorithm.max_grad_norm,
        t.seed, device_of(job.recipe) == "cpu", t.workers,
    )  # fmt: skip
    _run(job, policy, trainer, run, console, settings, run.log, "sft")
    trainer.state.global_step = t.steps


def _run(
    job: Job, policy: Policy, trainer: VisionPPOTrainer, run: RunFolder, console: Console, settings: SFTSettings,
    log: Callable[[int, dict[str, float]], None], name: str,
) -> None:  # fmt: skip
    started = time.perf_counter()
    cursor = open_cursor(job.train, settings.seed)
    with Bar(name, settings.steps, console) as bar:

        def record(step: int, numbers: dict[str, float]) -> None:
            log(step, numbers)
            bar.show(step, f"loss {numbers['loss/sft']:.3f}")

        fine_tune(policy.model, trainer.interface, trainer.banned, cursor, settings, run / "checkpoints", record)
    say(console, f"{name}: {settings.steps} steps in {time.perf_counter() - started:.0f} s")
