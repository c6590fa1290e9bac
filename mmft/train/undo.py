"""Steps that happen whole or not at all, so that a run may be asked to leave at any moment."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from mmft.train import trainer_state
from mmft.train.stopping import StopSignals
from mmft.types import Stopped

if TYPE_CHECKING:
    from mmft.train.ppo import VisionPPOTrainer


class WholeSteps:
    """Looks at `signals` between micro-batches, and undoes a step that stops half-way.

    Copies of an adapter are cheap; a model that trains whole finishes its update instead. Of several processes none
    leaves alone: they look at their signals together, between steps.
    """

    def __init__(self, trainer: VisionPPOTrainer):
        self.trainer = trainer
        self.signals: StopSignals | None = None
        self._undoable = False
        self._weights: dict[str, Tensor] | None = None

    @property
    def _alone(self) -> bool:
        return self.signals is not None and self.trainer.ranks.count == 1

    def run(self, step: Callable[[], None]) -> None:
        """Runs `step`. Raises Stopped, with everything as it was before, where a signal came in its midst."""
        if not self._alone:
            return step()
        before = trainer_state.numbers_of(self.trainer)
        self._undoable = True
        try:
            step()
        except Stopped:
            trainer_state.load_numbers(self.trainer, before)
            if self._weights is not None:
                trainer_state.load_tensors(self.trainer, self._weights)
            self.trainer.engine.clear()
            raise
        finally:
            self._undoable, self._weights = False, None

    def weights_will_change(self) -> None:
        """To be called within a step before the optimizer's first."""
        if self._alone:
            self._undoable = self.trainer.is_peft_model
            self._weights = trainer_state.tensors_of(self.trainer) if self._undoable else None

    def between(self) -> None:
        """To be called between micro-batches: leaves where that was asked for."""
        if self._undoable and self.signals is not None:
            self.signals.check()

    def leave_if_asked(self) -> None:
        """To be called between steps."""
        if self.signals is not None and self.trainer.ranks.any(self.signals.received is not None):
            raise Stopped(self.signals.received or signal.SIGTERM)
