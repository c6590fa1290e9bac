"""How long a recipe's steps take, from two small batches through its own trainer."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import set_seed

from mmft.config import Recipe
from mmft.eval.evaluator import evaluate_captions
from mmft.models.policy import Policy, load_policy
from mmft.models.value_adapter import CRITIC
from mmft.report.folder import RunFolder
from mmft.report.progress import ProgressReporter
from mmft.run.building import Job, build_trainer, eval_rows, prepare
from mmft.run.captioning import caption_rows
from mmft.run.device import device_of, dtype_of

PHASES = ("sample", "score", "reference", "reward", "update")
_ROWS = 8  # of the smaller batch, or one prompt's captions where those are more
_STEPS = 3  # of each batch; the first finds out how the model is fed


@dataclass(frozen=True)
class Timing:
    """Seconds of probed batches: `rows` of each, `phases` of one step, `evaluation` of so many pictures; `setup`:
    data, reward and model before the first step.
    """

    rows: tuple[int, ...]
    phases: tuple[dict[str, float], ...]
    evaluation: tuple[float, ...]
    setup: float

    def record(self, recipe: Recipe) -> dict[str, Any]:
        """What the recipe's steps, evaluations and whole run take, about."""
        t, e = recipe.train, recipe.eval
        phases = {
            name: extrapolate(self.rows, [phase.get(name, 0.0) for phase in self.phases], t.batch)
            for name in (*PHASES, "encode", "other")
        }
        encode = phases.pop("encode")  # inside the others
        full, rest = divmod(e.samples, e.batch)
        evaluation = full * extrapolate(self.rows, self.evaluation, e.batch)
        evaluation += extrapolate(self.rows, self.evaluation, rest) if rest else 0.0
        step = sum(phases.values())
        evaluations = 2 + (t.steps // e.every if e.every else 0)
        return {
            "probed_rows": list(self.rows),
            "phases": phases,
            "encode": encode,
            "step": step,
            "evaluation": evaluation,
            "evaluations": evaluations,
            "setup": self.setup,
            "run": self.setup + t.steps * step + evaluations * evaluation,
        }


def extrapolate(rows: tuple[int, ...], seconds: tuple[float, ...] | list[float], wanted: int) -> float:
    """Seconds for `wanted` rows: what a pass costs and what each row adds, neither below 0; in proportion where one
    number of rows was tried.
    """
    if len(rows) == 1:
        return seconds[0] * wanted / rows[0]
    each = max(0.0, (seconds[-1] - seconds[0]) / (rows[-1] - rows[0]))
    fixed = seconds[-1] - each * rows[-1]
    return fixed + each * wanted if fixed >= 0 else seconds[-1] * wanted / rows[-1]


def probe(recipe: Recipe) -> Timing:
    """Loads the recipe's model and takes a few steps with few rows; leaves nothing behind."""
    began = time.perf_counter()
    sizes = probe_rows(recipe)
    jobs = [prepare_small(recipe, sizes[0])]
    jobs += [dataclasses.replace(jobs[0], recipe=small(recipe, rows)) for rows in sizes[1:]]
    set_seed(recipe.train.seed)
    policy = load_policy(recipe.model, device_of(recipe), dtype_of(recipe))
    setup = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder:
        measured = [_steps(job, policy, RunFolder.create(Path(folder), "probe")) for job in jobs]
    phases, evaluation = zip(*measured, strict=True)
    return Timing(sizes, phases, evaluation, setup)


def prepare_small(recipe: Recipe, rows: int) -> Job:
    return prepare(small(recipe, rows))


def probe_rows(recipe: Recipe) -> tuple[int, ...]:
    """Rows of the batches to try: whole prompts, and no more than the recipe's own."""
    t = recipe.train
    smaller = t.samples_per_prompt * max(1, _ROWS // t.samples_per_prompt)
    return (smaller, 2 * smaller) if 2 * smaller <= t.batch else (min(smaller, t.batch),)


def small(recipe: Recipe, rows: int) -> Recipe:
    """The recipe with `rows` captions a step, few steps, and nothing that is not a part of every step."""
    t = recipe.train
    micro = t.micro_batch if t.micro_batch and rows % t.micro_batch == 0 else None
    steps = {"steps": _STEPS, "batch": rows, "minibatches": 1, "micro_batch": micro, "warmup": 0, "save_every": 0}
    tripwire = recipe.reward.tripwire.model_copy(update={"action": "off"})
    return recipe.model_copy(
        update={
            "train": t.model_copy(update=steps),
            "eval": recipe.eval.model_copy(update={"samples": rows, "batch": rows, "every": 0}),
            "algorithm": recipe.ppo.model_copy(update={"target_kl": None}),
            "reward": recipe.reward.model_copy(update={"tripwire": tripwire}),
            "logging": recipe.logging.model_copy(update={"report_to": (), "samples_every": 0}),
        }
    )


def _steps(job: Job, policy: Policy, run: RunFolder) -> tuple[dict[str, float], float]:
    """Seconds of one step by phase, and of evaluating as many pictures."""
    if CRITIC in getattr(policy.model, "peft_config", {}):  # of the trainer before
        policy.model.delete_adapter(CRITIC)
    trainer = build_trainer(job, policy, run)
    trainer.remove_callback(ProgressReporter)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "time/step" in entry][1:]
    whole = sum(entry["time/step"] for entry in steps) / len(steps)
    phases = {name: sum(entry.get(f"time/{name}", 0.0) for entry in steps) / len(steps) for name in (*PHASES, "encode")}
    phases["other"] = max(0.0, whole - sum(phases[name] for name in PHASES))
    rows = eval_rows(job)
    began = time.perf_counter()
    captions, ended = caption_rows(policy, rows, job.recipe, trainer)
    evaluate_captions(captions, rows, job.reward, ended)
    job.reward.reference_reward(rows, leave_one_out=False)
    return phases, time.perf_counter() - began
