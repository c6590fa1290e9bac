"""Training rows in an endless, seeded order, from a position that can be saved and taken up again to the bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mmft.types import Row, UserError

if TYPE_CHECKING:
    from mmft.data.sources import Source

Pending = Callable[[], Row]  # a row whose place in the order is settled; the call decodes its picture


class RowCursor(Protocol):
    """Where training has got to in its data.

    `draw` settles which rows come next without decoding a picture, so that several processes can draw the same rows
    and decode a part each. A pending row always gives the same row, whichever thread calls it and when. `state_dict`
    is JSON-ready and says what the next `draw` gives.
    """

    def draw(self, count: int) -> list[Pending]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Shuffled:
    """A map-style source in a new order each epoch; the order depends on seed and epoch alone.

    An epoch's last rows and the next one's first may share a batch: no row is left out, however small the data.
    """

    def __init__(self, source: Source, seed: int):
        if not len(source):
            raise UserError("the data has no rows")
        self.source, self.seed = source, seed
        self.epoch = self.place = 0
        self._order = self._shuffle()

    def _shuffle(self) -> np.ndarray:
        return np.random.default_rng((self.seed, self.epoch)).permutation(len(self.source))

    def draw(self, count: int) -> list[Pending]:
        drawn: list[Pending] = []
        while len(drawn) < count:
            if self.place == len(self._order):
                self.epoch, self.place = self.epoch + 1, 0
                self._order = self._shuffle()
            drawn.append(_at(self.source, int(self._order[self.place])))
            self.place += 1
        return drawn

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "place": self.place}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch, self.place = int(state["epoch"]), int(state["place"])
        self._order = self._shuffle()


def _at(source: Source, index: int) -> Pending:
    return lambda: source[index]
