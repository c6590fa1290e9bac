"""What a run saves: the adapter that people use, and checkpoints from which it goes on to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file
from transformers import TrainerCallback

from mmft.models.adapter_io import save_adapter
from mmft.models.policy import Policy
from mmft.models.value_adapter import save_value_adapter
from mmft.report.console import say
from mmft.report.folder import CHECKPOINTS, RunFolder, write_atomic
from mmft.rewards.combine import RewardFunction
from mmft.run.guard import RewardGuard
from mmft.train.checkpoint import remove_checkpoint, steps_of, thin_out, write_checkpoint
from mmft.train.ppo import VisionPPOTrainer
from mmft.train.sharding import full
from mmft.train.trainer_state import load_state, save_state
from mmft.types import Row


class Checkpoints(TrainerCallback):
    """Every `train.save_every` steps a checkpoint under checkpoints/step-N, of which the newest `keep` stay.

    To be the last of a trainer's callbacks: a checkpoint remembers how far the run's files had got.
    """

    def __init__(
        self,
        run: RunFolder,
        trainer: VisionPPOTrainer,
        every: int,
        keep: int,
        guard: RewardGuard | None,
        save_models: Callable[[Path], None],
    ):
        self.run, self.trainer, self.every, self.keep = run, trainer, every, keep
        self.guard, self.save_models = guard, save_models

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.every and state.global_step % self.every == 0:
            self.save()

    def save(self) -> Path:
        """A checkpoint of now, if there is none yet. All processes take part, the first writes."""
        step = self.trainer.state.global_step
        folder = self.run / CHECKPOINTS / f"step-{step}"
        ranks = self.trainer.ranks
        if ranks.any(ranks.is_main and folder in steps_of(folder.parent).values()):  # as the first process sees it
            return folder
        positions = self.run.positions() if ranks.is_main else {}

        def fill(aside: Path) -> None:
            save_state(self.trainer, aside, {"positions": positions})
            self.save_models(aside)
            if ranks.is_main and self.guard is not None:
                self.guard.save_state(aside)

        if ranks.is_main:
            write_checkpoint(folder, fill)
            thin_out(folder.parent, self.keep)
        else:
            fill(folder)
        return folder

    def load(self, checkpoint: Path | None, console: Console) -> None:
        """Puts the trainer and the run's files where they were at a checkpoint; None: at the start."""
        positions: dict[str, int] = {}
        if checkpoint is not None:
            positions = load_state(self.trainer, checkpoint)["positions"]
            if self.guard is not None:
                self.guard.load_state(checkpoint)
        if self.trainer.ranks.is_main:
            self.run.rewind(positions)
            for step, later in steps_of(self.run / CHECKPOINTS).items():
                if step > self.trainer.state.global_step:
                    remove_checkpoint(later)
        say(console, f"going on after step {self.trainer.state.global_step}")


def save(
    folder: Path, policy: Policy, trainer: VisionPPOTrainer, reward: RewardFunction, row: Row, critic: bool = True
) -> None:
    """Adapter (checked by reading it back), critic if there is one, and the reward's learned state, under `folder`. All
    processes call it, the first writes.
    """
    module = trainer.accelerator.unwrap_model(trainer.model)
    head = {name: full(tensor).contiguous() for name, tensor in module.value_model.state_dict().items()}
    weights = None
    if trainer.sharding:
        wanted = [(n, p) for n, p in policy.model.named_parameters() if p.requires_grad or not trainer.is_peft_model]
        weights = {name: full(parameter.detach()).cpu() for name, parameter in wanted}
    if not trainer.ranks.is_main:
        return
    interface = trainer.interface
    token = torch.full((1, 1), interface.pad_id, device=interface.device)
    probe = {}
    if weights is None:
        ones = torch.ones_like(token, dtype=torch.bool)
        probe = interface.pack([interface.builder(row)], token, ones, share=False).inputs
    save_adapter(policy.model, folder / "adapter", probe, weights)
    for name in ("critic", "reward")[not critic :]:
        (folder / name).mkdir(exist_ok=True)
    if critic:
        save_file(head, folder / "critic" / "value_head.safetensors")
    if critic and module.critic_adapter:
        save_value_adapter(policy.model, folder / "critic" / "adapter", weights)
    write_atomic(folder / "reward" / "state.json", json.dumps(reward.state_dict()).encode())
