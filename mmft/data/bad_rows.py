"""Rows that cannot be used: each listed once, told at once, and too many of them stop the run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

from mmft.types import UserError

_FIRST_JUDGED = 100  # rows of a stream of unknown length that are read before its share of bad ones means anything


class BadRows:
    """A list of {"file", "row", "reason"}, safe to add to from any thread.

    Args:
        total: rows there are; None for a stream, which counts them by `seen`.
        max_fraction: share of rows that may be bad (`data.max_bad_fraction`).
        raise_at_once: the first bad row is an error (`data.on_bad_row: raise`).

    `tell` names a function that is called with each row.
    """

    def __init__(self, total: int | None, max_fraction: float = 1.0, raise_at_once: bool = False):
        self.total, self.max_fraction, self.raise_at_once = total, max_fraction, raise_at_once
        self.rows: list[dict[str, Any]] = []
        self._known: set[tuple[str, int | None]] = set()
        self._seen = 0
        self._sink: Callable[[dict[str, Any]], None] | None = None
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    def __eq__(self, other: object) -> bool:
        return self.rows == (other.rows if isinstance(other, BadRows) else other)

    def __getstate__(self) -> dict[str, Any]:
        """What goes to another process: neither the lock nor who is told."""
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_sink")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.RLock(), _sink=None)

    def tell(self, sink: Callable[[dict[str, Any]], None], known: bool = True) -> None:
        """Calls `sink` with each row from now on, and with those `known` by now."""
        with self._lock:
            self._sink = sink
            for row in self.rows if known else []:
                sink(row)

    def seen(self, count: int) -> None:
        """Rows of a stream that were read, good or bad."""
        with self._lock:
            self._seen += count
            self.judge()

    def add(self, file: str, row: int | None, reason: str) -> None:
        """Lists a bad row, once. Raises UserError where it is one too many."""
        bad = {"file": file, "row": row, "reason": reason}
        with self._lock:
            if self.raise_at_once:
                raise UserError(describe(bad))
            if (file, row) in self._known:
                return
            self._known.add((file, row))
            self.rows.append(bad)
            if self._sink is not None:
                self._sink(bad)
            self.judge()

    def judge(self) -> None:
        """Raises UserError where more than the allowed share of rows is bad."""
        of = self.total if self.total is not None else self._seen
        if self.total is None and of < _FIRST_JUDGED:
            return
        if self.max_fraction < 1.0 and len(self.rows) > self.max_fraction * of:
            raise UserError(
                f"{len(self.rows)} of {of} rows are bad, more than data.max_bad_fraction {self.max_fraction:g} allows; "
                f"the first: {describe(self.rows[0])}"
            )


def describe(bad: dict[str, Any]) -> str:
    """One line for people."""
    row = "" if bad["row"] is None else f"row {bad['row']}: "
    return f"{bad['file']}: {row}{bad['reason']}"
