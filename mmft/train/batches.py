"""The batches of a run: which rows are next, this process's part of them, and where the data stands."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from mmft.data.cursor import RowCursor
from mmft.data.prefetch import Prefetch

Collator = Callable[[list[Any]], dict[str, Any]]


class Batches:
    """Endless batches of `count` rows over all processes, of which this one gets `mine`; made ready by `workers`
    threads while the model computes.
    """

    def __init__(self, cursor: RowCursor, count: int, mine: slice, workers: int, collate: Collator):
        self.collate = collate
        self._open = lambda: Prefetch(cursor, count, workers, mine)
        self._ahead = self._open()
        self._cursor = cursor

    def next(self) -> dict[str, Any]:
        return self.collate(self._ahead.next())

    def state_dict(self) -> dict[str, Any]:
        """Where `next` goes on; what was made ready ahead is drawn again after a resume."""
        return self._ahead.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._ahead.close()
        self._cursor.load_state_dict(state)
        self._ahead = self._open()

    def close(self) -> None:
        self._ahead.close()


class LoaderBatches:
    """TRL's own data loader, whose place cannot be saved."""

    def __init__(self, loader: Iterable[dict[str, Any]]):
        self._batches = _endless(loader)

    def next(self) -> dict[str, Any]:
        return next(self._batches)

    def close(self) -> None:
        pass


def _endless(loader: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    while True:
        yield from loader
