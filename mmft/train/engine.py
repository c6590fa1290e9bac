"""What stands between a loss and a step: where gradients add up, over processes too, and who keeps what state.

`Engine` is the plain way: gradients lie at the weights, `Ranks` or FSDP2 adds them up, each process steps. DeepSpeed's
ZeRO is in `mmft.train.zero`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmft.train.sharding import Sharding, full, part_of

if TYPE_CHECKING:
    from mmft.train.ppo import VisionPPOTrainer

State = dict[int, dict[str, Tensor]]  # of the optimizer: by the parameter's place, by name


class Engine:
    """Gradients and steps of a trainer."""

    def __init__(self, trainer: VisionPPOTrainer):
        self.trainer: Any = trainer
        self.sharding = self._sharding()

    def _sharding(self) -> Sharding:
        return Sharding(self.trainer.model)

    @property
    def averages(self) -> bool:
        """Whether gradients become means over processes, where their sum is wanted: losses are to be larger then."""
        return bool(self.sharding)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """What the optimizer moves, in its order."""
        return [p for group in self.trainer.optimizer.param_groups for p in group["params"]]

    def backward(self, loss: Tensor) -> None:
        """Adds a micro-batch's gradients to those of its minibatch."""
        # accelerate divides by the accumulation steps; shares of the minibatch have done that already
        self.trainer.accelerator.backward(loss * self.trainer.accelerator.gradient_accumulation_steps)

    def clip(self, limit: float) -> float:
        """The minibatch's gradients over all processes, at most `limit` long; returns how long they were."""
        if not self.sharding:
            self.trainer.ranks.sum_gradients(self.parameters)
        return float(full(self.trainer.accelerator.clip_grad_norm_(self.parameters, limit)))

    def step(self) -> None:
        """Moves the weights and forgets the gradients."""
        self.trainer.optimizer.step()
        self.clear()

    def clear(self) -> None:
        """Forgets the gradients."""
        self.trainer.optimizer.zero_grad()

    def weights_changed(self) -> None:
        """To be called when weights were written from outside."""

    def state(self) -> State:
        """The optimizer's state, whole. All processes take part."""
        states = self.trainer.optimizer.state_dict()["state"]
        return {i: {name: full(torch.as_tensor(v)) for name, v in state.items()} for i, state in states.items()}

    def load_state(self, state: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Takes back what `state` gave."""
        like = self.parameters
        parts = {
            i: {name: part_of(value, like[i]) if value.dim() else value.clone() for name, value in values.items()}
            for i, values in state.items()
        }
        groups = self.trainer.optimizer.state_dict()["param_groups"]  # the learning rate is the schedule's
        self.trainer.optimizer.load_state_dict({"state": parts, "param_groups": groups})
