"""Several processes in one run: one decides and writes, all know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from rich.console import Console

from mmft.train.zero import take_settings
from mmft.types import UserError

T = TypeVar("T")


class Processes:
    """The processes that `accelerate launch` started; one where nothing did."""

    def __init__(self, cpu: bool):
        take_settings()
        self._state = PartialState(cpu=cpu)
        self.count = int(self._state.num_processes)
        self.index = int(self._state.process_index)

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def console(self) -> Console:
        """Where a run speaks to people: nobody wants to hear it once a process."""
        return Console(stderr=True, quiet=not self.is_main)

    def from_main(self, function: Callable[[], T]) -> T:
        """What the first process's `function` gives, in all of them; its UserError is raised in all of them."""
        if self.count == 1:
            return function()
        answer: list[Any] = [None, None]
        if self.is_main:
            try:
                answer[0] = function()
            except UserError as error:
                answer[1] = str(error)
        broadcast_object_list(answer)
        if answer[1] is not None:
            raise UserError(answer[1])
        return answer[0]

    def wait(self) -> None:
        """Until all have come here."""
        self._state.wait_for_everyone()
