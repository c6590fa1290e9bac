"""The guard against reward hacking in a run: measures, logs, warns, keeps the best weights, stops if it is told to."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from mmft.config import TripwireConfig
from mmft.eval.evaluator import evaluate_captions
from mmft.report.console import say
from mmft.report.folder import CHECKPOINTS, RunFolder, read_json
from mmft.rewards.combine import RewardFunction
from mmft.rewards.parallel import ParallelTerm
from mmft.rewards.terms import TERMS
from mmft.train.checkpoint import write_checkpoint
from mmft.train.experience import Rollout
from mmft.train.ppo import VisionPPOTrainer
from mmft.train.sharding import full, put
from mmft.train.tripwire import Tripwire
from mmft.types import Row, UserError

PREFIX = "guard/"
STATE, BEST = "guard.json", "guard.safetensors"
_LESS_IS_BETTER = ("oracle_hallucination", "repetition", "bad_ending")


def kinds_of(reward: RewardFunction) -> set[str]:
    """The registered names of the terms that count in a reward, whatever they are called in it."""
    names = {cls: name for name, cls in TERMS.items()}
    terms = [entry.term for entry in reward.terms.values() if entry.weight]
    plain = [term.term if isinstance(term, ParallelTerm) else term for term in terms]
    return {names[type(term)] for term in plain if type(term) in names}


def choose_metric(wanted: str, row: Row, terms: Collection[str]) -> str | None:
    """The metric to watch on rows like `row`: not one of the reward's `terms`, and one that can be measured.

    Returns None where `auto` finds none. Raises UserError for a metric that does not exist, that the reward contains,
    or that these rows do not allow.
    """
    inside = {"bleu_4" if kind == "bleu" else kind for kind in terms}
    measured = evaluate_captions(["a"], [row], finished=[True])
    possible = [name for name in measured if name != "cider_d"]  # which is a measure of a whole set
    if wanted == "auto":
        outside = (name for name in ("oracle_f1", "rouge_l", "bleu_4", "chrf") if name not in inside)
        return next((name for name in outside if name in possible), None)
    if wanted not in possible:
        near = difflib.get_close_matches(wanted, possible, n=1)
        hint = f"did you mean {near[0]}?" if near else f"these pictures allow {', '.join(possible)}"
        raise UserError(f"reward.tripwire.metric: {wanted!r} cannot be measured here; {hint}")
    if wanted in inside:
        raise UserError(f"reward.tripwire.metric: {wanted!r} is in the reward, so it cannot guard it")
    return wanted


class RewardGuard(TrainerCallback):
    """Feeds a tripwire with each step's reward and held-out metric, as they are logged: means over all processes.

    The weights after the step whose window of the metric was best are kept in memory, and written to checkpoints/best
    when the wire trips.
    """

    def __init__(
        self,
        metric: str,
        config: TripwireConfig,
        run: RunFolder,
        trainer: VisionPPOTrainer,
        save: Callable[[Path], None],
    ):
        self.metric, self.config, self.run, self.trainer, self.save = metric, config, run, trainer, save
        self.sign = -1.0 if metric in _LESS_IS_BETTER else 1.0
        self.wire = Tripwire(config.threshold, config.window)
        self.best: dict[str, torch.Tensor] = {}
        self.tripped = False

    @property
    def has_stopped(self) -> bool:
        """Whether training has ended here: the best weights are back, and nothing may move them again."""
        return self.tripped and self.config.action == "stop"

    def save_state(self, folder: Path) -> None:
        """What a checkpoint needs to go on watching."""
        state = {"metric": self.metric, "tripped": self.tripped, "wire": self.wire.state_dict()}
        (folder / STATE).write_text(json.dumps(state), encoding="utf-8")
        save_file({name: tensor.contiguous() for name, tensor in self.best.items()}, folder / BEST)

    def load_state(self, folder: Path) -> None:
        """Takes back what `save_state` wrote; a watch over another metric, or none, begins anew."""
        state = read_json(folder / STATE)
        if state is None or state["metric"] != self.metric:
            return
        self.tripped = state["tripped"]
        self.wire.load_state_dict(state["wire"])
        self.best = load_file(folder / BEST)

    def watch(self, rollout: Rollout) -> dict[str, float]:
        """The metric of a batch, to be logged with it."""
        scores = evaluate_captions(rollout.captions, rollout.rows, None, rollout.finished_B.tolist(), self.metric)
        values = scores.get(self.metric, np.array([math.nan]))
        defined = values[np.isfinite(values)]
        return {PREFIX + self.metric: float(defined.mean()) if len(defined) else math.nan}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or PREFIX + self.metric not in logs:
            return
        reward, metric = logs.get("objective/scores"), logs[PREFIX + self.metric]
        metric = math.nan if metric is None else self.sign * metric
        seen = self.wire.update(state.global_step, math.nan if reward is None else reward, metric)
        if seen.is_best and not self.tripped:
            self.best = {name: full(p.detach()).to("cpu", copy=True) for name, p in self._trained()}
        if not seen.trips_now:
            return
        self.tripped = True
        message = f"step {state.global_step}: {seen.describe(self.metric)}"
        if state.is_world_process_zero:
            say(Console(stderr=True), message, "tripwire")
        folder = self.run / CHECKPOINTS / "best"
        now = {name: full(p.detach()).clone() for name, p in self._trained()}
        self._put(self.best)
        if state.is_world_process_zero:
            write_checkpoint(folder, self.save)
        else:
            self.save(folder)
        if state.is_world_process_zero:
            record = {"step": state.global_step, "metric": self.metric, "message": message, **vars(seen)}
            self.run.write_text("tripwire.json", json.dumps(record, indent=2) + "\n")
        if self.config.action == "stop":
            control.should_training_stop = True  # and the best weights stay: they are what is saved
        else:
            self._put(now)

    def _trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]

    @torch.no_grad()
    def _put(self, weights: dict[str, torch.Tensor]) -> None:
        for name, parameter in self._trained():
            put(parameter, weights[name])
        self.trainer.engine.weights_changed()
