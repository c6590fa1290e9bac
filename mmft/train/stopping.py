"""Leaving a run early without losing it: the first SIGTERM or Ctrl-C asks, the second Ctrl-C does not."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from mmft.types import Stopped

_SAME_PRESS = 0.3  # seconds within which a Ctrl-C reaches a process twice: from the terminal, and from its launcher


class StopSignals:
    """While it is entered, remembers SIGINT and SIGTERM instead of dying of them; a second Ctrl-C ends the process.

    on_first: called once, in the handler, with the signal's number. Outside the main thread nothing can be installed
    and nothing is.
    """

    def __init__(self, on_first: Callable[[int], None] | None = None):
        self.on_first = on_first
        self.received: int | None = None
        self._pressed = 0.0
        self._before: dict[int, Any] = {}

    def check(self) -> None:
        """Raises Stopped where a signal has come."""
        if self.received is not None:
            raise Stopped(self.received)

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        again = self._pressed and now - self._pressed > _SAME_PRESS
        if signum == signal.SIGINT:
            if again:
                leave_at_once(128 + signum)
            self._pressed = self._pressed or now
        if self.received is None:
            self.received = signum
            if self.on_first is not None:
                self.on_first(signum)


def leave_at_once(status: int) -> None:
    """Ends the process here and now: nothing is saved, and what is on disk stays as it is."""
    if sys.stderr.isatty():
        os.write(2, b"\x1b[?25h\n")  # a progress bar hides the cursor
    os._exit(status)
