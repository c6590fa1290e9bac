"""One progress bar for a training run, with the numbers that tell whether it is going well."""

from __future__ import annotations

import atexit
import math
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

# Shown as, then the keys it may be logged under: ours, then TRL's.
SHOWN: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("reward", ("reward/mean", "objective/scores")),
    ("kl", ("objective/kl",)),
    ("entropy", ("policy/entropy", "objective/entropy", "policy/entropy_avg")),
    ("s/step", ("time/step",)),
)
LINES_WITHOUT_TERMINAL = 20  # a log file gets so many lines, not a thousand redrawn bars


class Bar:
    """Steps of long work with numbers beside them; plain lines where the output is not a terminal.

    `close` is safe to call twice, and runs at exit as well: work that stops half-way must give the terminal its cursor
    back.
    """

    def __init__(self, title: str, total: int | None, console: Console):
        self.title, self.total, self.console = title, total, console
        self._last_line = -1
        self._progress: Progress | None = None
        if console.is_terminal:
            self._progress = Progress(
                TextColumn(f"[bold]{title}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}", markup=False),
                console=console,
            )
            self._task = self._progress.add_task(title, total=total, numbers="")
            self._progress.start()
            atexit.register(self.close)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def move(self, step: int, numbers: str) -> None:
        """Moves the bar; prints nothing where there is none."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step, numbers=numbers)

    def show(self, step: int, numbers: str) -> None:
        """Moves the bar, or prints a line every so many steps."""
        self.move(step, numbers)
        every = max(1, (self.total or 0) // LINES_WITHOUT_TERMINAL)
        due = step % every == 0 or step == self.total or self._last_line < 0
        if self._progress is None and step != self._last_line and due:
            self._last_line = step
            total = f"/{self.total}" if self.total else ""
            name = "" if self.title == "train" else f"{self.title} "
            self.console.print(f"{name}step {step}{total}  {numbers}", markup=False, highlight=False)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
            atexit.unregister(self.close)


class ProgressReporter(TrainerCallback):
    """Live reward, KL and entropy of a run. Only the main process prints."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._bar: Bar | None = None
        self._first_reward: float | None = None
        self._numbers = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()
        self._first_reward, self._numbers = None, ""
        if state.is_world_process_zero:
            self._bar = Bar("train", state.max_steps or None, self.console)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.move(state.global_step, self._numbers)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        numbers = self._format(logs or {})
        if self._bar is None or not numbers:  # an evaluation's or the last summary's log: the training numbers stay
            return
        self._numbers = numbers
        self._bar.show(state.global_step, numbers)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

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
