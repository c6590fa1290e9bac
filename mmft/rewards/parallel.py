"""Reward terms in parallel processes, for terms that are slow in Python."""

from __future__ import annotations

import dataclasses
import importlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import pairwise
from multiprocessing.connection import wait
from types import TracebackType
from typing import Any

from mmft.rewards.terms import Term, build_term
from mmft.types import Row, UserError


class WorkerDied(UserError):
    """A worker process ended before its work did."""


class ParallelTerm(Term):
    """A term whose batches are split over worker processes; in all else the term itself.

    For terms that score each caption by itself: values, their order and errors are then those of the term in one
    process. Workers start at the first call (about as long as importing mmft takes), hold the fitted term, and are
    replaced when `fit` or `load_state_dict` changes it. Rows are sent without pictures unless the term's class says
    `needs_images = True`. Workers end on `close`, at the end of a `with` block, with the program, and when it is
    killed; after `close` the next call starts them again.

    Args:
        kind, options: as for `build_term`.
        workers: processes, at least 1.

    Raises:
        WorkerDied: in a call; else what the term raises.
    """

    def __init__(self, kind: str, options: Mapping[str, Any] | None = None, workers: int = 2):
        if workers < 1:
            raise UserError(f"reward term {kind!r}: workers must be at least 1, not {workers}")
        self.kind, self.options, self.workers = kind, dict(options or {}), workers
        self.term = build_term(kind, **self.options)
        self.sign = self.term.sign
        self._pool: ProcessPoolExecutor | None = None

    @property
    def needs_references(self) -> bool:  # type: ignore[override]
        return self.term.needs_references

    @property
    def needs_answers(self) -> bool:  # type: ignore[override]
        return self.term.needs_answers

    @property
    def needs_fit(self) -> bool:  # type: ignore[override]
        return self.term.needs_fit

    @property
    def needs_images(self) -> bool:  # type: ignore[override]
        return self.term.needs_images

    def fit(self, rows: Sequence[Row]) -> None:
        self.term.fit(rows)
        self.close()

    def state_dict(self) -> dict[str, Any]:
        return self.term.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.term.load_state_dict(state)
        self.close()

    def __call__(
        self, captions: Sequence[str], rows: Sequence[Row], finished: Sequence[bool] | None = None
    ) -> list[float]:
        if len(captions) != len(rows) or (finished is not None and len(finished) != len(rows)):
            raise ValueError(f"{len(captions)} captions, {len(rows)} rows: not the same number of samples")
        if not self.needs_images:
            rows = [dataclasses.replace(row, image=None) for row in rows]
        pool = self._start()
        futures = []
        try:
            for part in _parts(len(captions), self.workers):
                end = None if finished is None else list(finished[part])
                futures.append(pool.submit(_score, list(captions[part]), list(rows[part]), end))
            return [value for future in futures for value in future.result()]
        except BrokenProcessPool as error:
            self.close()
            raise WorkerDied(
                f"reward term {self.kind!r}: a worker process died; it was killed, ran out of memory, "
                'or the script lacks `if __name__ == "__main__":`'
            ) from error
        except Exception:
            for future in futures:
                future.cancel()
            raise
        except BaseException:  # Ctrl-C: don't wait for what the workers are at
            self._terminate()
            raise

    def close(self) -> None:
        """Ends the workers and waits for that. A term that is collected or still open at exit is closed by itself."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def __enter__(self) -> ParallelTerm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> ProcessPoolExecutor:
        if self._pool is None:
            # spawn: a fork of a process that runs torch's threads can deadlock, and copies a model's memory.
            self._pool = ProcessPoolExecutor(
                self.workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start_worker,
                initargs=(type(self.term).__module__, self.kind, self.options, self.term.state_dict()),
            )
        return self._pool

    def _terminate(self) -> None:
        if self._pool is not None:
            # Python has no public way to this before 3.14 (`terminate_workers`).
            for process in list((self._pool._processes or {}).values()):
                process.terminate()
        self.close()


def _parts(count: int, parts: int) -> list[slice]:
    """At most `parts` slices of nearly equal size that cover range(count) in order; none is empty."""
    parts = min(parts, count)
    edges = [count * i // parts for i in range(parts + 1)] if parts else []
    return [slice(low, high) for low, high in pairwise(edges)]


# In a worker: its term, or what was wrong with building it, told at the first call (an error while a worker starts
# would reach the parent as a broken pool without a reason).
_term: Term | UserError = UserError("the worker was not started")


def _start_worker(module: str, kind: str, options: dict[str, Any], state: dict[str, Any]) -> None:
    global _term
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C reaches all processes; the parent alone decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        if module != "__main__":
            importlib.import_module(module)  # where a term of the user's own is registered
        _term = build_term(kind, **options)
        _term.load_state_dict(state)
    except UserError as error:
        _term = error
    except Exception as error:
        _term = UserError(f"reward term {kind!r} cannot be built in a worker process: {type(error).__name__}: {error}")


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)  # the parent was killed; nobody is left to ask this process to end


def _score(captions: list[str], rows: list[Row], finished: list[bool] | None) -> list[float]:
    if isinstance(_term, UserError):
        raise _term
    try:
        return _term(captions, rows, finished)
    except Exception as error:
        plain = all(isinstance(value, str | int | float | bytes | None) for value in error.args)
        if isinstance(error, UserError) or (type(error).__module__ == "builtins" and plain):
            raise
        raise UserError(f"{type(error).__name__}: {error}") from None  # another may not survive the way to its parent
