"""Reading preferences and ratings: JSONL or parquet, by suffix, each fault named by file, row and key.

The schema is described in docs/data.md. The items of `mmft.rewards.judgements` and the writers of
`mmft.rewards.judgement_files` can be had from here too.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic

from mmft.data.metadata import BadRow, file_name_of, numbered_lines, parse_line, text_of, texts_of
from mmft.data.pictures import UNREADABLE, unreadable
from mmft.rewards.judgement_files import KIND_NAMES, check_suffix, write_preferences, write_ratings
from mmft.rewards.judgements import PROMPT, J, Judgement, Picture, Preference, Rating, split_by_picture
from mmft.types import UserError

__all__ = [
    "Judgement", "Judgements", "Picture", "Preference", "Rating", "read_judgements", "read_preferences",
    "read_ratings", "split_by_picture", "write_preferences", "write_ratings",
]  # fmt: skip

_ROWS_AT_ONCE = 256  # of a parquet file


class Judgements(list[J], Generic[J]):
    """The items of a file, and the rows that could not be used: {"file", "row" (from 1), "reason"} each."""

    def __init__(self, items: Sequence[J] = (), bad_rows: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__(items)
        self.bad_rows = list(bad_rows)


def read_preferences(path: str | Path, on_bad_row: str = "raise", prompt: str = PROMPT) -> Judgements[Preference]:
    """The preferences of a JSONL or parquet file, in its order.

    on_bad_row: `raise` stops at the first bad row; `skip` leaves bad rows out and lists them in `bad_rows`. prompt: of
    rows that name none.

    Raises:
        UserError: no file, not one of the two formats, no usable row, or (`raise`) a bad row: names file, row and key.
    """
    return _Reader(path, on_bad_row, prompt).read(Preference)


def read_ratings(path: str | Path, on_bad_row: str = "raise", prompt: str = PROMPT) -> Judgements[Rating]:
    """As `read_preferences`, for ratings."""
    return _Reader(path, on_bad_row, prompt).read(Rating)


def read_judgements(
    path: str | Path, on_bad_row: str = "raise", prompt: str = PROMPT
) -> Judgements[Preference] | Judgements[Rating]:
    """What the file holds, preferences or ratings. Raises UserError as they do, and for a file that holds both."""
    reader = _Reader(path, on_bad_row, prompt)
    return reader.read(Preference) if reader.holds() is Preference else reader.read(Rating)


class _Reader:
    """One file, its rows parsed and its pictures read once each."""

    def __init__(self, path: str | Path, on_bad_row: str, prompt: str) -> None:
        if on_bad_row not in ("skip", "raise"):
            raise UserError(f"on_bad_row: {on_bad_row!r} is not one of skip, raise")
        self.path = Path(path)
        self.on_bad_row, self.prompt = on_bad_row, prompt
        self.bad_rows: list[dict[str, Any]] = []
        check_suffix(self.path)
        if not self.path.is_file():
            raise UserError(f"{self.path}: " + ("not a file" if self.path.exists() else "no such file"))
        self._embedded: dict[str, Picture] = {}  # one copy of pictures that many rows have
        self.records = list(self._jsonl() if self.path.suffix.lower() == ".jsonl" else self._parquet())
        if not self.records and not self.bad_rows:
            raise UserError(f"{self.path}: no rows")

    def holds(self) -> type[Judgement]:
        """What the rows show themselves to be. Raises UserError where they disagree, or none shows it."""
        first: tuple[int, type[Judgement]] | None = None
        for row, record in self.records:
            for item_type in KIND_NAMES:
                if not any(record.get(key) is not None for key in item_type.OWN):
                    continue
                if first is not None and first[1] is not item_type:
                    raise UserError(
                        f"{self.path}: row {row} is one of {KIND_NAMES[item_type]}, row {first[0]} one of "
                        f"{KIND_NAMES[first[1]]}; keep them in two files"
                    )
                first = first or (row, item_type)
        if first is None:
            raise UserError(f"{self.path}: no row has chosen and rejected, nor caption and rating{self._first_bad()}")
        return first[1]

    def read(self, item_type: type[J]) -> Judgements[J]:
        checked = []
        for row, record in self.records:
            try:
                checked.append((row, {"prompt": self.prompt} | _fields(item_type, record)))
            except BadRow as bad:
                self._bad(row, bad)
        pictures = self._pictures({fields["picture"] for _, fields in checked if isinstance(fields["picture"], str)})
        items = []
        for row, fields in checked:
            try:
                if isinstance(fields["picture"], str):
                    fields["picture"] = _known(pictures[fields["picture"]])
                items.append(item_type(**fields))
            except BadRow as bad:
                self._bad(row, bad)
        if not items:
            raise UserError(f"{self.path}: no usable rows{self._first_bad()}")
        return Judgements(items, sorted(self.bad_rows, key=lambda bad: bad["row"]))

    def _jsonl(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for row, raw in numbered_lines(self.path):
            try:
                yield row, parse_line(raw)
            except BadRow as bad:
                self._bad(row, bad)

    def _parquet(self) -> Iterator[tuple[int, dict[str, Any]]]:
        import pyarrow
        import pyarrow.parquet

        row = 0
        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
                    for record in batch.to_pylist():
                        row += 1
                        try:
                            yield row, record | self._unpacked(record)
                        except BadRow as bad:
                            self._bad(row, bad)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{self.path}: cannot read as parquet ({' '.join(str(error).split())})") from error

    def _unpacked(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """The picture of a parquet row, which `datasets` writes as {bytes, path}."""
        image = record.get("image")
        if isinstance(image, dict):
            image = image.get("bytes") or image.get("path")
        if isinstance(image, bytes):
            picture = _known(_picture(image))
            image = self._embedded.setdefault(picture.key, picture)
        return {} if image is None else {"image": image}

    def _pictures(self, names: set[str]) -> dict[str, Picture | str]:
        """Each file's picture, or why there is none. Reading files waits on the disk, hence the threads."""
        ordered = sorted(names)
        with ThreadPoolExecutor(max_workers=8) as pool:
            return dict(zip(ordered, pool.map(lambda name: _picture(self.path.parent / name), ordered), strict=True))

    def _bad(self, row: int, reason: BadRow) -> None:
        if self.on_bad_row == "raise":
            raise UserError(f"{self.path}: row {row}: {reason}")
        self.bad_rows.append({"file": str(self.path), "row": row, "reason": str(reason)})

    def _first_bad(self) -> str:
        if not self.bad_rows:
            return ""
        first = min(self.bad_rows, key=lambda bad: bad["row"])
        return f"; the first bad row: row {first['row']}: {first['reason']}"


def _picture(source: Path | bytes) -> Picture | str:
    try:
        return Picture.of(source)
    except FileNotFoundError:
        assert isinstance(source, Path)
        return f"image: no picture {source.name!r} in {str(source.parent)!r}"
    except UNREADABLE as error:
        return _named(source, unreadable(error))


def _named(source: Path | bytes, reason: str) -> str:
    return f"image: {source.name}: {reason}" if isinstance(source, Path) else f"image: {reason}"


def _known(picture: Picture | str) -> Picture:
    if isinstance(picture, str):
        raise BadRow(picture)
    return picture


def _fields(item_type: type[Judgement], record: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an item, `picture` still a file's name where it is no embedded one."""
    for key in record:
        if key not in item_type.KEYS:
            raise BadRow(f"{key}: {_why_unknown(item_type, key)}")
    given = {key: value for key, value in record.items() if value is not None}
    for key in item_type.REQUIRED:
        if key not in given:
            raise BadRow(f"{key}: missing")
    image = given.pop("image")
    picture = image if isinstance(image, Picture) else file_name_of({"image": image}, ("image",))
    return {"picture": picture} | {key: _READ[key](given, key) for key in given}


def _why_unknown(item_type: type[Judgement], key: str) -> str:
    other = Rating if item_type is Preference else Preference
    if key in other.OWN:
        return f"a key of {KIND_NAMES[other]}, in a file read as {KIND_NAMES[item_type]}"
    return f"unknown key; did you mean {difflib.get_close_matches(key, item_type.KEYS, n=1, cutoff=0.0)[0]}?"


def _number(record: dict[str, Any], key: str) -> float:
    value = record[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadRow(f"{key}: expected a number, found {value!r:.40}")
    try:
        return float(value)
    except OverflowError:
        return math.inf  # which no item takes


def _flag(record: dict[str, Any], key: str) -> bool:
    if not isinstance(record[key], bool):
        raise BadRow(f"{key}: expected true or false, found {record[key]!r:.40}")
    return bool(record[key])


def _text(record: dict[str, Any], key: str) -> str:
    return text_of(record, (key,)) or ""


_READ: dict[str, Callable[[dict[str, Any], str], Any]] = {
    **dict.fromkeys(("prompt", "annotator", "kind", "chosen", "rejected", "caption"), _text),
    "references": lambda record, key: texts_of(record, (key,)),
    "margin": _number,
    "rating": _number,
    "tie": _flag,
}
