"""Data sets larger than memory: training rows from shuffled windows of a stream, held-out rows kept undecoded."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mmft.config import HubDataConfig, TableConfig
from mmft.data.bad_rows import BadRows
from mmft.data.cursor import Pending
from mmft.data.imagefolder import QUESTION, picture_place
from mmft.data.metadata import (
    DEFAULT_COLUMNS,
    Accept,
    BadRow,
    answers_of,
    check_needs,
    find_value,
    take_any,
    text_of,
    texts_of,
)
from mmft.data.pictures import UNREADABLE, load_picture, unreadable
from mmft.data.records import HubRecords, Record, Records, TableRecords
from mmft.types import NOTHING_NEEDED, Needs, Row, UserError

IMAGE_COLUMNS = ("image", "picture", "img", "file_name", "image_path", "image_bytes", "jpg", "png")
# Beside those of metadata files: what hub sets call their captions.
REFERENCE_COLUMNS = (*DEFAULT_COLUMNS["references"], "sentences", "sentence", "text", "txt", "description")
_WINDOW_BYTES = 2**28  # undecoded rows that are shuffled at once take no more
_ROWS = 1000  # rows, where nobody says how many
_FIRST_BYTES = 2**28  # read for a reward's statistics and no more


class RowMaker:
    """Makes rows of records; what a record lacks is said as BadRow."""

    def __init__(self, config: TableConfig | HubDataConfig, folder: Path, needs: Needs = NOTHING_NEEDED):
        self.prompt, self.folder, self.needs = config.prompt, folder, needs
        chosen = config.columns
        self.image = (chosen.image,) if chosen.image else IMAGE_COLUMNS
        names = {"references": chosen.references, "question": chosen.question, "answer": chosen.answer}
        usual = DEFAULT_COLUMNS | {"references": REFERENCE_COLUMNS}
        self.columns = {key: (name,) if name else usual[key] for key, name in names.items()}
        self.accept: Accept = take_any

    def texts(self, record: Record) -> Row:
        """The row without its picture."""
        question = text_of(record.data, self.columns["question"])
        if question is None and QUESTION in self.prompt:
            raise BadRow(f"{self.columns['question'][0]}: missing, and the prompt has {QUESTION}")
        prompt = self.prompt
        if question is not None:
            prompt = prompt.replace(QUESTION, question) if QUESTION in prompt else question
        references = texts_of(record.data, self.columns["references"])
        answer, answers = answers_of(record.data, self.columns["answer"])
        check_needs(self.needs, references, answer is not None)
        name = f"{Path(record.file).name}:{record.row}"
        return Row(name, None, prompt, references, question, answer, answers=answers)

    def whole(self, record: Record) -> Row:
        """The row with its picture, decoded now."""
        row, value = self.texts(record), self._picture(record)
        try:
            image = load_picture(io.BytesIO(value) if isinstance(value, bytes) else self.folder / value)
        except UNREADABLE as error:
            raise BadRow(unreadable(error)) from error
        row = replace(row, image=image)
        self.accept(row)
        return row

    def place(self, record: Record, seed: int) -> float:
        """Where in [0, 1) the picture lies: rows of one picture are on one side of any split."""
        value = self._picture(record)
        name = hashlib.blake2b(value, digest_size=16).hexdigest() if isinstance(value, bytes) else str(value)
        return picture_place(name, seed)

    def _picture(self, record: Record) -> bytes | str:
        """The picture's bytes, or its path."""
        key, value = find_value(record.data, self.image, IMAGE_COLUMNS)
        if isinstance(value, Mapping):  # as `datasets` keeps pictures
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes) and value:
            return value
        if not isinstance(value, str) or not value.strip() or "\0" in value:
            there = ", ".join(sorted(record.data)[:12])
            raise BadRow(f"{key}: no picture: expected a path, bytes or base64 text; the columns are {there}")
        if len(value) < 4096 and os.path.isfile(self.folder / value):
            return value
        try:
            return base64.b64decode(value.partition(",")[2] if value.startswith("data:") else value, validate=True)
        except (binascii.Error, ValueError) as error:
            raise BadRow(f"{key}: no such file, and not base64: {value[:60]!r}") from error


class TableStream:
    """Training rows of a table or hub set, read as they are needed.

    `cursor` gives them shuffled; `rows_without_pictures` and `first` read from the start.
    """

    def __init__(
        self,
        config: TableConfig | HubDataConfig,
        records: Records,
        bad_rows: BadRows,
        needs: Needs = NOTHING_NEEDED,
    ):
        self.config, self.records, self.bad_rows = config, records, bad_rows
        self.maker = RowMaker(config, records.folder, needs)
        self._texts: list[Row] | None = None
        self.read_to_the_end = False

    def accept_only(self, accept: Accept) -> None:
        """From now on a row that `accept` raises BadRow for is bad, as one whose picture cannot be read."""
        self.maker.accept = accept

    def usable(self, records: Iterator[Record]) -> Iterator[Record]:
        """Those of the training side that have a picture."""
        for record in records:
            try:
                if not self.held_out(record):
                    yield record
            except BadRow as error:
                self.bad_rows.add(record.file, record.row, str(error))

    def held_out(self, record: Record) -> bool:
        """Which side a record is on, where one data set has both."""
        return self.maker.place(record, self.config.seed) < (
            0.0 if heldout_apart(self.config) else self.config.eval_fraction
        )

    def rows_without_pictures(self, limit: int | None = None) -> Iterator[Row]:
        """The first rows, as many as fit a fixed reading budget; afterwards `read_to_the_end` says if that was all."""
        if self._texts is None or (limit is not None and len(self._texts) < limit):
            self._texts = list(self._made(self.maker.texts, limit, _FIRST_BYTES))
        return iter(self._texts[:limit])

    def first(self, count: int) -> list[Row]:
        """The first rows, with their pictures."""
        return list(self._made(self.maker.whole, count, _FIRST_BYTES))

    def rows(self) -> Iterator[Row]:
        """All rows from the start, with their pictures, one at a time."""
        return self._made(self.maker.whole, None, sys.maxsize)

    def _made(self, make: Callable[[Record], Row], limit: int | None, budget: int) -> Iterator[Row]:
        made = 0
        for record in self.usable(iter(self.records.start())):
            if made == limit or budget < 0:
                return
            budget -= record.size
            try:
                row = make(record)
            except BadRow as error:
                self.bad_rows.add(record.file, record.row, str(error))
                continue
            made += 1
            yield row
        self.read_to_the_end = True

    def row_or_next(self, records: Sequence[Record], index: int) -> Row:
        """The record's row, or where it is bad the next usable one of `records`: always the same."""
        for step in range(len(records)):
            record = records[(index + step) % len(records)]
            try:
                return self.maker.whole(record)
            except BadRow as error:
                self.bad_rows.add(record.file, record.row, str(error))
        raise UserError(f"{self.config.path}: no readable picture in {len(records)} rows")

    def cursor(self, seed: int) -> WindowCursor:
        return WindowCursor(self, seed)


class WindowCursor:
    """Rows of a stream, shuffled window by window; see `mmft.data.cursor.RowCursor`.

    Its state is where the window began and how much of it was given: resuming reads the window again.
    """

    def __init__(self, stream: TableStream, seed: int):
        self.stream, self.seed = stream, seed
        self.epoch = self.window = self.given = 0
        self._started: dict[str, Any] | None = None  # the reader's state at the window's start
        self._reader: Any = None
        self._rows: list[Record] = []

    def draw(self, count: int) -> list[Pending]:
        drawn: list[Pending] = []
        while len(drawn) < count:
            if self.given == len(self._rows):
                self._next_window()
            drawn.append(self._pending(self._rows, self.given))
            self.given += 1
        return drawn

    def _next_window(self) -> None:
        if self._rows:
            self.window, self.given = self.window + 1, 0
        empty_epochs = 0
        while True:
            if self._reader is None:
                self._reader = self.stream.records.start((self.seed, self.epoch), self._started)
                self._iterator = self.stream.usable(iter(self._reader))
            self._started = self._reader.state_dict()
            if self._fill():
                return
            self.epoch, self.window, self._started, self._reader = self.epoch + 1, 0, None, None
            empty_epochs += 1
            if empty_epochs > 1:
                first = f"; the first bad row: {self.stream.bad_rows.rows[0]}" if len(self.stream.bad_rows) else ""
                raise UserError(f"{self.stream.config.path}: no usable rows for training{first}")

    def _fill(self) -> bool:
        """Reads the next window; False at the end of the data."""
        rows: list[Record] = []
        size = 0
        for record in self._iterator:
            rows.append(record)
            size += record.size
            if len(rows) == self.stream.config.shuffle_window or size > _WINDOW_BYTES:
                break
        order = np.random.default_rng((self.seed, self.epoch, self.window)).permutation(len(rows))
        self._rows = [rows[i] for i in order]
        return bool(rows)

    def _pending(self, rows: Sequence[Record], index: int) -> Pending:
        return lambda: self.stream.row_or_next(rows, index)

    def state_dict(self) -> dict[str, Any]:
        whole = self.given == len(self._rows) and self._rows
        return {
            "epoch": self.epoch,
            "window": self.window + 1 if whole else self.window,
            "given": 0 if whole else self.given,
            "reader": self._reader.state_dict() if whole else self._started,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch, self.window = int(state["epoch"]), int(state["window"])
        self._started, self._reader, self._rows, self.given = state["reader"], None, [], 0
        if state["given"]:
            self._next_window()
            self.given = int(state["given"])


class TableRows:
    """The first `samples` rows of one side, kept as they were read and decoded when they are asked for."""

    def __init__(self, stream: TableStream, samples: int, wanted: Callable[[Record], bool]):
        self.stream = stream
        self.bad_rows = stream.bad_rows
        self._records: list[Record] = []
        for record in iter(stream.records.start()):
            if len(self._records) == samples:
                break
            try:
                if wanted(record):
                    stream.maker.whole(record)  # what cannot be evaluated is found out now
                    self._records.append(record)
            except BadRow as error:
                stream.bad_rows.add(record.file, record.row, str(error))
        if not self._records:
            raise UserError(
                f"{stream.config.path}: no usable rows held out; raise data.eval_fraction or name held-out data apart"
            )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Row:
        return self.stream.row_or_next(self._records, index)

    def accept_only(self, accept: Accept) -> None:
        self.stream.accept_only(accept)

    def rows_without_pictures(self, limit: int | None = None) -> Iterator[Row]:
        return (self.stream.maker.texts(record) for record in self._records[:limit])


def open_stream(
    config: TableConfig | HubDataConfig, apart: str | None = None, needs: Needs = NOTHING_NEEDED
) -> TableStream:
    """Training rows, or those of held-out data `apart`. Raises UserError for what is not there."""
    bad_rows = BadRows(None, config.max_bad_fraction, config.on_bad_row == "raise")
    records: Records
    if isinstance(config, TableConfig):
        records = TableRecords(apart or config.path, bad_rows)
    else:
        records = HubRecords(config.path, config.subset, apart or config.split, bad_rows)
    return TableStream(config, records, bad_rows, needs)


def open_rows(
    config: TableConfig | HubDataConfig, split: str, samples: int | None, needs: Needs = NOTHING_NEEDED
) -> TableRows:
    """The first rows of one side. Raises UserError for what is not there."""
    apart = heldout_apart(config) if split == "heldout" else None
    stream = open_stream(config, apart, needs)
    if split == "heldout" and not apart:
        return TableRows(stream, samples or _ROWS, stream.held_out)
    return TableRows(stream, samples or _ROWS, lambda record: bool(apart) or not stream.held_out(record))


def heldout_apart(config: TableConfig | HubDataConfig) -> str | None:
    """Where held-out rows are by themselves."""
    return config.heldout_path if isinstance(config, TableConfig) else config.heldout_split
