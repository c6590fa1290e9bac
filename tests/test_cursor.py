"""Where a run stands in its data, and the threads that make the next batch ready."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from mmft.data.cursor import Shuffled
from mmft.data.prefetch import Prefetch
from mmft.types import UserError


class Numbers:
    """A source of numbers that remembers what was asked for, and by which thread."""

    def __init__(self, count: int):
        self.count = count
        self.asked: list[int] = []
        self.threads: set[str] = set()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Any:
        self.asked.append(i)
        self.threads.add(threading.current_thread().name)
        return i


def test_epochs_hold_each_row_once_and_orders_differ() -> None:
    cursor = Shuffled(Numbers(10), seed=3)
    rows = [pending() for pending in cursor.draw(35)]
    epochs = [rows[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [p() for p in Shuffled(Numbers(10), seed=3).draw(35)] == rows
    assert [p() for p in Shuffled(Numbers(10), seed=4).draw(35)] != rows


def test_drawing_decodes_nothing() -> None:
    source = Numbers(5)
    pending = Shuffled(source, 0).draw(5)
    assert source.asked == []
    assert pending[2]() == pending[2]() and len(source.asked) == 2


@pytest.mark.parametrize("place", [0, 3, 10, 13])
def test_a_place_can_be_taken_up(place: int) -> None:
    whole = [p() for p in Shuffled(Numbers(10), 0).draw(30)]
    cursor = Shuffled(Numbers(10), 0)
    cursor.draw(place)
    again = Shuffled(Numbers(10), 0)
    again.load_state_dict(cursor.state_dict())
    assert [p() for p in again.draw(30 - place)] == whole[place:]


def test_no_rows_no_cursor() -> None:
    with pytest.raises(UserError, match="the data has no rows"):
        Shuffled(Numbers(0), 0)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_are_the_same_however_many_threads(workers: int) -> None:
    whole = [p() for p in Shuffled(Numbers(10), 0).draw(12)]
    source = Numbers(10)
    ahead = Prefetch(Shuffled(source, 0), 4, workers, prepare=lambda i: i * 10)
    batches = [ahead.next() for _ in range(3)]
    ahead.close()
    assert [i for batch in batches for i in batch] == [i * 10 for i in whole]
    assert ("MainThread" in source.threads) == (workers == 0)


def test_a_part_of_each_batch_is_decoded() -> None:
    source = Numbers(10)
    whole = [p() for p in Shuffled(source, 0).draw(8)]
    source.asked.clear()
    ahead = Prefetch(Shuffled(source, 0), 4, 0, slice(2, 4))
    assert ahead.next() + ahead.next() == whole[2:4] + whole[6:8]
    assert len(source.asked) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_what_was_made_ready_ahead_is_not_lost(workers: int) -> None:
    """Its state is that before the batch made ready."""
    whole = [p() for p in Shuffled(Numbers(10), 0).draw(16)]
    ahead = Prefetch(Shuffled(Numbers(10), 0), 4, workers)
    ahead.next()
    state = dict(ahead.state_dict())
    ahead.close()
    cursor = Shuffled(Numbers(10), 0)
    cursor.load_state_dict(state)
    again = Prefetch(cursor, 4, workers)
    assert again.next() + again.next() == whole[4:12]
    again.close()


def test_the_next_batch_is_made_while_nobody_asks() -> None:
    source = Numbers(10)
    ahead = Prefetch(Shuffled(source, 0), 4, 2)
    ahead.next()
    deadline = time.monotonic() + 10
    while len(source.asked) < 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(source.asked) == 8
    ahead.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_what_decoding_raises_comes_out(workers: int) -> None:
    class Broken(Numbers):
        def __getitem__(self, i: int) -> Any:
            raise UserError(f"row {i} is broken")

    ahead = Prefetch(Shuffled(Broken(4), 0), 2, workers)
    with pytest.raises(UserError, match="is broken"):
        ahead.next()
    ahead.close()
