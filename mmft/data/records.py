"""Records of data sets larger than memory: JSON lines, CSV, parquet, and hub sets, one after the other, from any place.

Nothing is scanned beforehand. A JSONL file is cut at byte positions, and a part holds the lines that begin in it; a
parquet file is cut into its row groups; a CSV is one part, for a line may be the middle of a quoted field. Parts come
in an order of their own in each epoch.
"""

from __future__ import annotations

import copy
import glob
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mmft.data.bad_rows import BadRows
from mmft.data.metadata import BadRow, csv_rows, parse_line
from mmft.types import UserError

SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
_PART = 2**23  # bytes of a JSONL file
_BATCH = 64  # rows that are read from a parquet file at once


@dataclass(frozen=True)
class Record:
    """One row as it was read. row: the line's first byte in a JSONL file, else the row's number. size: bytes, about."""

    file: str
    row: int
    data: dict[str, Any]
    size: int


class RecordStream(Protocol):
    """Records from a position on; `state_dict` says where the next one is, JSON-ready."""

    def __iter__(self) -> Iterator[Record]: ...

    def state_dict(self) -> dict[str, Any]: ...


class Records(Protocol):
    """A data set of records. `order` shuffles its parts; None leaves them as they are. `folder`: where its pictures'
    paths begin.
    """

    folder: Path

    def start(self, order: tuple[int, ...] | None = None, state: Mapping[str, Any] | None = None) -> RecordStream: ...


@dataclass(frozen=True)
class _Part:
    file: Path
    start: int  # a byte of a JSONL file, or a row group
    end: int
    first_row: int = 0


class TableRecords:
    """Records of JSONL and parquet files: a file, a folder or a glob. Lines that cannot be read go to `bad_rows`.

    Raises UserError where there is no such file, or a parquet file that cannot be read.
    """

    def __init__(self, path: str, bad_rows: BadRows):
        self.files = _files(path)
        self.bad_rows = bad_rows
        self.folder = self.files[0].parent
        self.parts = [part for file in self.files for part in _parts(file)]

    def start(self, order: tuple[int, ...] | None = None, state: Mapping[str, Any] | None = None) -> _TableStream:
        return _TableStream(self, order, state)


class _TableStream:
    def __init__(self, records: TableRecords, order: tuple[int, ...] | None, state: Mapping[str, Any] | None):
        self.records = records
        count, self.counts = len(records.parts), _first_time(order)
        self.order = np.arange(count) if order is None else np.random.default_rng(order).permutation(count)
        self.part, self.skip = (0, 0) if state is None else (int(state["part"]), int(state["skip"]))

    def state_dict(self) -> dict[str, Any]:
        return {"part": self.part, "skip": self.skip}

    def __iter__(self) -> Iterator[Record]:
        while self.part < len(self.order):
            part = self.records.parts[self.order[self.part]]
            lines: Iterator[tuple[int, Any, int]]
            lines = _READERS.get(part.file.suffix, _read_csv)(part)
            for number, (row, data, size) in enumerate(lines):
                if number < self.skip:
                    continue
                self.skip = number + 1
                if self.counts:
                    self.records.bad_rows.seen(1)
                try:
                    record: Any = parse_line(data) if isinstance(data, bytes) else data
                    yield Record(str(part.file), row, record, size)
                except BadRow as error:
                    self.records.bad_rows.add(str(part.file), row, str(error))
            self.part, self.skip = self.part + 1, 0


def _first_time(order: tuple[int, ...] | None) -> bool:
    """Whether rows are read that were not read before: in the epochs after the first, none is."""
    return order is None or order[-1] == 0


def _files(path: str) -> list[Path]:
    given = Path(path)
    if given.is_file():
        found = [given]
    elif given.is_dir():
        found = [file for file in sorted(given.rglob("*")) if file.suffix in SUFFIXES and file.is_file()]
    else:
        found = [Path(name) for name in sorted(glob.glob(path, recursive=True))]
    if not found:
        raise UserError(f"data.path: {path}: no {' or '.join(SUFFIXES)} file there")
    for file in found:
        if file.suffix not in SUFFIXES:
            raise UserError(f"data.path: {file}: not one of {', '.join(SUFFIXES)}")
    return found


def _parts(file: Path) -> Iterator[_Part]:
    if file.suffix == ".jsonl":
        size = file.stat().st_size
        for start in range(0, size, _PART):
            yield _Part(file, start, min(start + _PART, size))
        return
    if file.suffix != ".parquet":
        yield _Part(file, 0, 1)
        return
    first = 0
    with _parquet(file) as table:
        for group in range(table.num_row_groups):
            yield _Part(file, group, group + 1, first)
            first += table.metadata.row_group(group).num_rows


def _read_jsonl(part: _Part) -> Iterator[tuple[int, bytes, int]]:
    """The lines that begin in the part; blank ones are none."""
    try:
        with open(part.file, "rb") as file:
            file.seek(max(0, part.start - 1))
            if part.start:  # the line that holds the byte before belongs to the part before
                file.readline()
            while (place := file.tell()) < part.end:
                line = file.readline()
                if line.strip():
                    yield place, line.removeprefix(b"\xef\xbb\xbf") if place == 0 else line, len(line)
    except OSError as error:
        raise UserError(f"{part.file}: cannot read ({error.strerror or error})") from error


def _read_csv(part: _Part) -> Iterator[tuple[int, dict[str, Any], int]]:
    for line, row in csv_rows(part.file):
        yield line, row, sum(map(len, row.values()))


def _read_parquet(part: _Part) -> Iterator[tuple[int, dict[str, Any], int]]:
    row = part.first_row
    with _parquet(part.file) as table:
        for batch in table.iter_batches(_BATCH, row_groups=[part.start], use_threads=False):
            size = batch.nbytes // max(1, batch.num_rows)
            for i in range(batch.num_rows):
                yield row, {name: batch.column(name)[i].as_py() for name in batch.schema.names}, size
                row += 1


_READERS: dict[str, Callable[[_Part], Iterator[tuple[int, Any, int]]]] = {
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _parquet(file: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file}: cannot be read as parquet ({' '.join(str(error).split())})") from error


class HubRecords:
    """Records of a data set that `datasets` streams: a hub id, or a folder that it knows how to load.

    Raises UserError with the reason that `datasets` gives, in one line.
    """

    folder = Path()

    def __init__(self, path: str, name: str | None, split: str, bad_rows: BadRows):
        from datasets import Image, load_dataset

        self.label, self.bad_rows = f"{path}:{split}", bad_rows
        try:
            data = load_dataset(path, name, split=split, streaming=True)
            features = data.features or {}
            for column, kind in features.items():
                if isinstance(kind, Image):  # decoded where the row is used, and not before
                    data = data.cast_column(column, Image(decode=False))
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise UserError(f"data.path: {path}: {' '.join(str(error).split())[:300]}") from error
        self.data = data

    def start(self, order: tuple[int, ...] | None = None, state: Mapping[str, Any] | None = None) -> _HubStream:
        return _HubStream(self, _first_time(order), state)


class _HubStream:
    def __init__(self, records: HubRecords, counts: bool, state: Mapping[str, Any] | None):
        self.records, self.row, self.counts = records, 0, counts
        # In the order of its files: `datasets` cannot take up a shuffled stream exactly. A copy: it holds its place.
        self.data = copy.deepcopy(records.data)
        if state is not None:
            self.row = int(state["row"])
            if state["data"] is not None:
                self.data.load_state_dict(dict(state["data"]))

    def state_dict(self) -> dict[str, Any]:
        return {"row": self.row, "data": self.data.state_dict() if self.row else None}

    def __iter__(self) -> Iterator[Record]:
        for data in self.data:
            self.row += 1
            if self.counts:
                self.records.bad_rows.seen(1)
            yield Record(self.records.label, self.row - 1, data, _size(data))


def _size(value: Any) -> int:
    if isinstance(value, bytes | str):
        return len(value)
    if isinstance(value, dict):
        return sum(_size(item) for item in value.values())
    return sum(_size(item) for item in value) if isinstance(value, list) else 8
