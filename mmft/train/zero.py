"""DeepSpeed's ZeRO: gradients and the optimizer's state in parts over processes, with stage 3 the frozen weights too.

Source: Rajbhandari, Rasley, Ruwase and He, ZeRO: memory optimizations toward training trillion parameter models, SC
2020. DeepSpeed gets a minibatch's gradients at once, when all its micro-batches are through: so processes may have
different numbers of them, and a minibatch can still be given up. What trains (adapters, the critic) stays whole in
every process, also in stage 3.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmft.models.interface import bare
from mmft.models.structure import output_head
from mmft.train.engine import Engine, State
from mmft.train.sharding import Sharding
from mmft.types import UserError

if TYPE_CHECKING:
    from mmft.train.ppo import VisionPPOTrainer

_FLAG, _OURS = "ACCELERATE_USE_DEEPSPEED", "MMFT_DEEPSPEED"
_FOREIGN = ("optimizer", "scheduler", "train_batch_size", "bf16", "fp16", "amp")  # a recipe's, not a config's
_MOMENTS = ("exp_avg", "exp_avg_sq")


def take_settings() -> dict[str, Any] | None:
    """The DeepSpeed config that this process was launched with, as accelerate reads it; None without one.

    From the first call on accelerate takes the processes for plain ones: it would wrap a model in which no weight
    trains yet, and TRL reward functions that have no weights. Raises UserError where DeepSpeed is not installed, or
    the config asks for what mmft does not do.
    """
    if os.environ.get(_FLAG, "false").lower() == "true":
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        try:
            import deepspeed  # noqa: F401
            from accelerate.utils import DeepSpeedPlugin

            config = DeepSpeedPlugin().deepspeed_config
        except ImportError as error:
            raise UserError("accelerate: DeepSpeed is not installed: pip install deepspeed, or use fsdp2") from error
        offload = config.get("zero_optimization", {}).get("offload_optimizer") or {}
        if offload.get("device", "none") not in ("none", None):
            raise UserError("accelerate: mmft does not offload the optimizer; set offload_optimizer_device: none")
        os.environ |= {_FLAG: "false", _OURS: json.dumps(config)}
    text = os.environ.get(_OURS)
    return json.loads(text) if text else None


class ZeroSharding(Sharding):
    """Frozen weights cut by stage 3, each gathered for the modules that need it; the output layer's stay whole."""

    def __init__(self, engine: Any):
        super().__init__(engine.module)
        self.engine = engine
        if self:
            head = set(output_head(bare(engine.module.policy)).parameters())  # its weights are used without its forward
            self.kept = [p for p in engine.module.parameters() if p.requires_grad or p in head]
            self.keep_whole()

    def __bool__(self) -> bool:
        return int(self.engine.zero_optimization_stage()) == 3

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        import deepspeed
        from trl.models.utils import add_hooks, remove_hooks

        kept = set(self.kept)
        with deepspeed.zero.GatheredParameters([p for p in self.engine.module.parameters() if p not in kept]):
            remove_hooks(self.engine)  # they would cut a layer's weights again once it has run
            try:
                yield
            finally:
                add_hooks(self.engine)
                self.keep_whole()

    def keep_whole(self) -> None:
        """To be called when DeepSpeed has cut all. It cuts its "persistent" weights too, after every module, while the
        order of modules is not always the same; those that a module is still busy with stay.
        """
        if self:
            self.kept[0].all_gather(self.kept)
            for parameter in self.kept:
                parameter.ds_active_sub_modules.add(_OURS)


class ZeroEngine(Engine):
    """An `Engine` over DeepSpeed's, which it makes of the trainer's model and optimizer."""

    def __init__(self, trainer: VisionPPOTrainer, config: Mapping[str, Any]):
        import deepspeed

        wrapped: Any = trainer.optimizer
        self._base = getattr(wrapped, "optimizer", wrapped)  # accelerate's wrapper steps when it pleases
        self._trained = [p for group in self._base.param_groups for p in group["params"]]
        self._held: list[Tensor | None] = [None] * len(self._trained)
        self.engine, self.zero, *_ = deepspeed.initialize(
            model=trainer.model, optimizer=self._base, config=self._config(config)
        )
        super().__init__(trainer)
        self._begin()

    def _config(self, given: Mapping[str, Any]) -> dict[str, Any]:
        zero = {name: value for name, value in given.get("zero_optimization", {}).items() if value != "auto"}
        # All that trains stays whole; small weights that do not are not worth a message either.
        largest = max(p.numel() for p in self._trained)
        zero |= {"overlap_comm": False, "stage3_param_persistence_threshold": largest}
        return {name: value for name, value in given.items() if name not in _FOREIGN and value != "auto"} | {
            "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": 0.0,
            "zero_optimization": zero, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        }  # fmt: skip

    def _sharding(self) -> ZeroSharding:
        return ZeroSharding(self.engine)

    def _begin(self) -> None:
        """A step that moves nothing: the optimizer's state is there from now on, and linked to the weights."""
        rates = [group["lr"] for group in self._base.param_groups]
        if not self.sharding:  # linked after the first group's step, so that of the others must be there before
            for part in (part for group in self._base.param_groups for part in group["params"]):
                moments = {moment: torch.zeros_like(part) for moment in _MOMENTS}
                self._base.state[part] = {"step": torch.tensor(0.0), **moments}
        for group in self._base.param_groups:
            group["lr"] = 0.0
        self.clip(float("inf"))
        self.step()
        for group, rate in zip(self._base.param_groups, rates, strict=True):
            group["lr"] = rate
        self.load_state({})

    @property
    def averages(self) -> bool:
        return False  # `clip` makes sums of DeepSpeed's means

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return self._trained

    def backward(self, loss: Tensor) -> None:
        for i, gradient in enumerate(torch.autograd.grad(loss, self._trained, allow_unused=True)):
            if gradient is not None:
                held = self._held[i]
                self._held[i] = gradient if held is None else held.add_(gradient)

    def clip(self, limit: float) -> float:
        held = [torch.zeros_like(p) if g is None else g for p, g in zip(self._trained, self._held, strict=True)]
        self._held = [None] * len(self._trained)
        # Its gradient is what is held, and comes to where DeepSpeed wants it.
        given = torch.stack([(p * g).sum() for p, g in zip(self._trained, held, strict=True)]).sum()
        self.engine.backward(given * self.trainer.ranks.count, scale_wrt_gas=False)
        parts = [part for group in self.zero.averaged_gradients.values() for part in group or ()]
        nothing = torch.zeros((), dtype=torch.float64, device=self._trained[0].device)  # a process may hold no part
        squares = sum((part.double().square().sum() for part in parts), nothing)
        norm = float(self.trainer.ranks.total(squares).sqrt())
        if norm > limit:
            for part in parts:
                part.mul_(limit / (norm + 1e-6))
        return norm

    def step(self) -> None:
        self.zero.step()
        self.sharding.keep_whole()

    def clear(self) -> None:
        self._held = [None] * len(self._trained)
        self.zero.zero_grad()
        self.zero.averaged_gradients = {}

    @torch.no_grad()
    def weights_changed(self) -> None:
        for parameter in self._trained:
            self._write(parameter, parameter.detach(), None)

    def state(self) -> State:
        from deepspeed.utils import safe_get_full_optimizer_state

        step = next(iter(self._base.state.values()))["step"]
        return {
            i: {"step": torch.as_tensor(step)} | {m: safe_get_full_optimizer_state(p, m) for m in _MOMENTS}
            for i, p in enumerate(self._trained)
        }

    @torch.no_grad()
    def load_state(self, state: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Takes back what any engine's `state` gave; what it does not know has not been moved yet."""
        step = max((float(values["step"]) for values in state.values()), default=0.0)
        for values in self._base.state.values():
            values["step"] = torch.full_like(values["step"], step)
        for i, parameter in enumerate(self._trained):
            for moment in _MOMENTS:
                value = state[i][moment] if i in state else torch.zeros_like(parameter)
                self._write(parameter, value.to(parameter.device), moment)

    def _write(self, parameter: Tensor, value: Tensor, moment: str | None) -> None:
        """Puts a whole value (of a weight, or of a moment of its gradient) to where DeepSpeed keeps this process's
        part of it.
        """
        from deepspeed import utils

        if self.sharding:
            part = parameter.ds_tensor
            flat = value.flatten().float()
            flat = torch.nn.functional.pad(flat, (0, part.numel() * self.trainer.ranks.count - flat.numel()))
            mine = flat.view(self.trainer.ranks.count, -1)[self.trainer.ranks.index]
            if moment is None:
                part.data.copy_(mine.view_as(part))
                utils.safe_set_local_fp32_param(parameter, mine)
            else:
                utils.safe_set_local_optimizer_state(parameter, mine, moment)
        elif moment is None:
            utils.safe_set_full_fp32_param(parameter, value.float())
        else:
            utils.safe_set_full_optimizer_state(parameter, value.float(), moment)
