"""Weights cut into parts over processes (FSDP2): when they must be whole, and how parts are read and written.

accelerate shards the model. Sampling, encoding and scoring run with whole weights, gathered once a rollout: gathering
layer by layer for each token would cost more than the pass. The update gathers a layer at a time, forward and backward.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def allow_on_cpu(accelerator: Accelerator) -> None:
    """accelerate takes an FSDP config on GPUs alone; torch shards on processors just as well, which is enough for tests
    of everything but speed.
    """
    state = accelerator.state
    wanted = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if wanted and state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin()


class Sharding:
    """The sharded units of a model; without any, everything here does nothing."""

    def __init__(self, model: nn.Module):
        self.units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._depth = 0

    def __bool__(self) -> bool:
        return bool(self.units)

    @property
    def cut(self) -> bool:
        """Whether weights lie in parts right now."""
        return bool(self) and self._depth == 0

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, all weights are whole in every process. All processes enter it."""
        self._depth += 1
        try:
            with self._gathered() if self and self._depth == 1 else nullcontext():
                yield
        finally:
            self._depth -= 1

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        # The root must know its units before one of them runs by itself; torch has no public call for that.
        self.units[0]._get_fsdp_state()._lazy_init()
        for unit in self.units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        try:
            yield
        finally:
            for unit in self.units:
                unit.set_reshard_after_forward(unit is not self.units[0], recurse=False)
                unit.reshard()


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be in parts. All processes take part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor cut as `like` is cut."""
    if not isinstance(like, DTensor):
        return tensor.to(like.device)
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


@torch.no_grad()
def put(parameter: Tensor, tensor: Tensor) -> None:
    """Writes a whole tensor into a parameter that may be in parts."""
    parameter.copy_(part_of(tensor, parameter))
