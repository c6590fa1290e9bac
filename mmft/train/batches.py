"""The batches of a run: which rows are next, this process's part of them, and where the data stands."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from mmft.data.cursor import RowCursor
from mmft.data.prefetch import Prefetch
from mmft.train.ranks import Ranks
from mmft.types import UserError

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


class NoRows:
    """Stands for a data set that is read through a cursor, where TRL's constructor asks for a length."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        raise IndexError("these rows come from a cursor")


def open_batches(
    args: Any, cursor: RowCursor | None, ranks: Ranks, loader: Any, collate: Collator
) -> Batches | LoaderBatches:
    """Ours draw the same rows for any number of processes; without a cursor they are TRL's. Raises UserError where
    TRL's loader has too few rows for a batch, and would never give one.
    """
    if cursor is None:
        rows = len(loader.dataset)
        if rows < args.batch_size:
            raise UserError(f"the data has {rows} rows, fewer than the {args.batch_size} that one batch needs")
        return LoaderBatches(loader)
    group = args.samples_per_prompt
    own = slice(ranks.rows.start // group, ranks.rows.stop // group)
    return Batches(cursor, args.batch_size // group, own, args.workers, collate)


def _endless(loader: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    while True:
        yield from loader
