"""One progress bar for a training run, with the numbers that tell whether it is going well."""

from __future__ import annotations

import atexit
import math
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

# Shown as, then the keys it may be logged under: ours, then TRL's.
SHOWN: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("reward", ("reward/mean", "objective/scores")),
    ("kl", ("objective/kl",)),
    ("entropy", ("policy/entropy", "objective/entropy", "policy/entropy_avg")),
    ("s/step", ("time/step",)),
)
LINES_WITHOUT_TERMINAL = 20  # a log file gets so many lines, not a thousand redrawn bars


class ProgressReporter(TrainerCallback):
    """Live reward, KL and entropy on one bar; plain lines where the output is not a terminal.

    Only the main process prints. `close` is safe to call twice, and runs at exit as well: a run that stops
    half-way must give the terminal its cursor back.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._first_reward: float | None = None
        self._last_line = -1
        self._numbers = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()
        self._first_reward, self._last_line, self._numbers = None, -1, ""
        if not state.is_world_process_zero or not self.console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("[bold]train"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}", markup=False),
            console=self.console,
        )
        self._task = self._progress.add_task("train", total=state.max_steps or None, numbers="")
        self._progress.start()
        atexit.register(self.close)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._show(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        numbers = self._format(logs or {})
        if not numbers:  # an evaluation's or the last summary's log: the training numbers stay
            return
        self._numbers = numbers
        self._show(state)
        if self._progress is None:
            self._print_line(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._show(state)
        self.close()

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress, self._task = None, None
            atexit.unregister(self.close)

    def _show(self, state: Any) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=state.global_step, numbers=self._numbers)

    def _print_line(self, state: Any) -> None:
        every = max(1, (state.max_steps or 0) // LINES_WITHOUT_TERMINAL)
        step = state.global_step
        if step != self._last_line and (step % every == 0 or step == state.max_steps or self._last_line < 0):
            self._last_line = step
            total = f"/{state.max_steps}" if state.max_steps else ""
            self.console.print(f"step {step}{total}  {self._numbers}", markup=False, highlight=False)

    def _format(self, logs: dict[str, Any]) -> str:
        parts = []
        for name, keys in SHOWN:
            value = next((_number(logs[key]) for key in keys if key in logs), None)
            if value is None:
                continue
            parts.append(f"{name} {value:.3f}")
            if name == "reward":
                if self._first_reward is None:
                    self._first_reward = value
                else:
                    parts[-1] += f" ({value - self._first_reward:+.3f})"
        return "  ".join(parts)


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
