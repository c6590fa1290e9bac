"""The next batch of rows, made ready in threads while the model computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from mmft.data.cursor import Pending, RowCursor

T = TypeVar("T")


class Prefetch(Generic[T]):
    """Batches of `count` rows of a cursor, of which `mine` are decoded; one batch is made ready ahead.

    workers: threads that decode; with 0, `next` decodes itself. The rows are the same either way.
    prepare: what is made of a row, in the thread that decoded it.
    """

    def __init__(
        self,
        cursor: RowCursor,
        count: int,
        workers: int = 0,
        mine: slice | None = None,
        prepare: Callable[[Any], T] | None = None,
    ):
        self.cursor, self.count = cursor, count
        self.mine = slice(None) if mine is None else mine
        self.prepare = prepare
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="rows") if workers else None
        self._ahead: list[Future[T]] | None = None
        self._state = cursor.state_dict()

    def next(self) -> list[T]:
        """The next batch. Raises what decoding raised."""
        if self._pool is None:
            batch = [self._make(pending) for pending in self._draw()]
            self._state = self.cursor.state_dict()
            return batch
        waiting = self._ahead or self._submit(self._pool)
        self._ahead = None
        ready = [future.result() for future in waiting]
        self._state = self.cursor.state_dict()
        self._ahead = self._submit(self._pool)
        return ready

    def state_dict(self) -> Mapping[str, Any]:
        """The cursor's state from which `next` goes on: that before the batch made ready ahead."""
        return self._state

    def close(self) -> None:
        """Ends the threads; rows not yet decoded are let go."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool, self._ahead = None, None

    def _draw(self) -> list[Pending]:
        return self.cursor.draw(self.count)[self.mine]

    def _submit(self, pool: ThreadPoolExecutor) -> list[Future[T]]:
        return [pool.submit(self._make, pending) for pending in self._draw()]

    def _make(self, pending: Pending) -> T:
        row: Any = pending()
        return row if self.prepare is None else self.prepare(row)
