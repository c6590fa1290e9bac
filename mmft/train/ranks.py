"""Several processes as one: each samples and learns from its own rows of a global batch, and all know the whole of it.

What is small (tokens, log-probabilities, values, scores, texts) is gathered, so that advantages, statistics and metrics
are those of the global batch in every process, and equal those of one process with that batch. Gradients are summed
once a minibatch, without a wrapper around the model: a process whose rows hold no picture has no gradient of the
vision tower, and nobody waits for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from mmft.train.experience import Rollout
from mmft.types import RewardOutput

T = TypeVar("T")
_BUCKET = 2**24  # gradient elements that are sent at once


class Ranks:
    """The processes of a run. `rows`: of the global batch that are this process's own, set once a batch is known."""

    def __init__(self, accelerator: Accelerator, local_batch: int):
        self.accelerator = accelerator
        self.count: int = accelerator.num_processes
        self.index: int = accelerator.process_index
        self.rows = slice(self.index * local_batch, (self.index + 1) * local_batch)

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def own(self, rows: Tensor) -> Tensor:
        """Those of some rows of the global batch that are here, as rows of the local batch."""
        return rows[(rows >= self.rows.start) & (rows < self.rows.stop)] - self.rows.start

    def gather(self, tensor: Tensor, fill: float | bool = 0) -> Tensor:
        """(B, ...) of each process as one of all, in the order of ranks; a shorter second dimension is filled up."""
        if self.count == 1:
            return tensor
        tensor = tensor.to(self.accelerator.device)
        if tensor.dim() > 1:
            width = int(self.total(torch.tensor(tensor.shape[1]), "max"))
            tensor = torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]), value=fill)
        if tensor.dtype == torch.bool:  # not every backend carries it
            return self.gather(tensor.to(torch.uint8)).bool()
        return self.accelerator.gather(tensor.contiguous())

    def gather_list(self, values: Sequence[T]) -> list[T]:
        """The values of all processes, in the order of ranks."""
        return list(values) if self.count == 1 else list(gather_object(list(values)))

    def total(self, tensor: Tensor, how: str = "sum") -> Tensor:
        """The sum ("sum") or largest ("max") of a tensor over processes."""
        if self.count == 1:
            return tensor
        tensor = tensor.to(self.accelerator.device)
        if how == "sum":
            return self.accelerator.reduce(tensor, "sum")
        return self.accelerator.gather(tensor.reshape(1, *tensor.shape)).amax(0)

    def any(self, here: bool) -> bool:
        """Whether something is true in any process."""
        return here if self.count == 1 else bool(self.total(torch.tensor(int(here)), "max"))

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Each gradient becomes its sum over processes; a missing one counts as 0."""
        if self.count == 1:
            return
        by_type: dict[torch.dtype, list[torch.nn.Parameter]] = {}
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            by_type.setdefault(parameter.grad.dtype, []).append(parameter)
        for group in by_type.values():
            for bucket in _buckets(group):
                flat = self.accelerator.reduce(torch.cat([p.grad.flatten() for p in bucket]), "sum")
                for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                    parameter.grad.copy_(part.view_as(parameter))

    def everyone(self, rollout: Rollout) -> Rollout:
        """The rollout of the global batch. Prompts stay local, and pictures of other processes' rows where they are."""
        if self.count == 1:
            return rollout
        absent = [dataclasses.replace(row, image=None, more_images=()) for row in rollout.rows]
        rows = self.gather_list(absent)
        rows[self.rows] = rollout.rows if rows else []
        tensors: dict[str, Any] = {
            field.name: self.gather(value)
            for field in dataclasses.fields(rollout)
            if isinstance(value := getattr(rollout, field.name), Tensor)
        }
        reward = None if rollout.reward is None else self._of_all(rollout.reward, len(rollout.rows))
        return dataclasses.replace(
            rollout, rows=rows, captions=self.gather_list(rollout.captions), reward=reward, **tensors
        )

    def _of_all(self, reward: RewardOutput, rows: int) -> RewardOutput:
        """Rewards of the global batch."""
        (first, *others) = self.gather_list([(rows, reward)])
        whole, offset = first[1], first[0]
        for count, part in others:
            stages = {
                stage: {name: getattr(whole, stage)[name] + values for name, values in getattr(part, stage).items()}
                for stage in ("raw", "normalized", "weighted")
            }
            dropped = whole.dropped + tuple(offset + i for i in part.dropped)
            whole = dataclasses.replace(whole, total=whole.total + part.total, dropped=dropped, **stages)
            offset += count
        return whole


def _buckets(parameters: Sequence[torch.nn.Parameter]) -> Iterable[list[torch.nn.Parameter]]:
    bucket: list[torch.nn.Parameter] = []
    for parameter in parameters:
        if bucket and sum(p.numel() for p in bucket) + parameter.numel() > _BUCKET:
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket
