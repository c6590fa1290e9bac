"""People's own pictures: a folder of picture files, with captions in an optional `metadata.jsonl` or `metadata.csv`.

The layout is that of Hugging Face's `imagefolder`; see docs/data.md. Nothing is decoded before it is asked for.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from PIL.Image import Image

from mmft.data.bad_rows import BadRows, describe
from mmft.data.metadata import (
    Accept,
    BadRow,
    answers_of,
    check_needs,
    csv_rows,
    file_name_of,
    numbered_lines,
    parse_line,
    resolve_columns,
    take_any,
    text_of,
    texts_of,
)
from mmft.data.pictures import UNREADABLE, load_picture, unreadable, verify_picture
from mmft.types import NOTHING_NEEDED, Needs, Row, UserError

METADATA = "metadata.jsonl"
CSV = ("metadata.csv", "metadata.tsv")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
QUESTION = "{question}"
SPLITS = ("train", "heldout", "all")


@dataclass(frozen=True)
class Entry:
    """One row before its picture is decoded. `line` is its 1-based line of the metadata, None where it has none."""

    id: str
    file_name: str
    line: int | None = None
    references: tuple[str, ...] = ()
    question: str | None = None
    answer: str | None = None
    answers: tuple[str, ...] = ()


class ImageFolder:
    """A map-style dataset of `Row`s over a folder of pictures.

    Args:
        path: the folder. Its `metadata.jsonl` has one JSON object a line: `file_name` relative to the folder, and
            optionally `caption` (text or list of texts; also `captions`, `references`), `question`, `answer`.
            Pictures without a line are rows without references. A `metadata.csv` (or .tsv) has these as columns;
            its rows of one picture are several references of it.
        prompt: what a picture is asked. A row with a question asks that, in place of `{question}` where the prompt
            has it (then every row needs one), of the whole prompt where it does not.
        columns: other names for the columns `image`, `references`, `question`, `answer`.
        split: `train`, `heldout` or `all`. A picture's side depends on its file name and `seed` alone, so it stays
            when pictures are added, and all rows of one picture are on one side.
        eval_fraction: the share held out, in [0, 1).
        on_bad_row: `skip` leaves bad rows out and lists them in `bad_rows`; `raise` stops at the first.
        max_bad_fraction: share of rows that may be left out.
        needs: what each row must hold; one that lacks it is bad.

    Raises:
        UserError: no folder, no usable row in the split, or (`raise`) a bad row: names file, row and key.
    """

    def __init__(
        self,
        path: str | Path,
        prompt: str = "Describe the picture.",
        columns: Mapping[str, str | None] | None = None,
        split: str = "train",
        eval_fraction: float = 0.1,
        seed: int = 0,
        on_bad_row: str = "skip",
        max_bad_fraction: float = 1.0,
        needs: Needs = NOTHING_NEEDED,
    ) -> None:
        if split not in SPLITS:
            raise UserError(f"split: {split!r} is not one of {', '.join(SPLITS)}")
        if on_bad_row not in ("skip", "raise"):
            raise UserError(f"on_bad_row: {on_bad_row!r} is not one of skip, raise")
        if not 0.0 <= eval_fraction < 1.0:
            raise UserError(f"eval_fraction: {eval_fraction} is not in [0, 1)")
        self.path = Path(path)
        self.prompt = prompt
        self.split = split
        self.on_bad_row = on_bad_row
        self.bad_rows = BadRows(None, 1.0, on_bad_row == "raise")
        self._accept: Accept = take_any
        self._columns, self._needs = resolve_columns(columns), needs
        entries = self._verified(self._read())
        if not entries:
            raise UserError(f"{self.path}: no usable rows" + self._first_reason())
        self.bad_rows.total, self.bad_rows.max_fraction = len(entries) + len(self.bad_rows), max_bad_fraction
        self.bad_rows.judge()
        self._entries = self._side(entries, eval_fraction, seed)
        if not self._entries:
            raise UserError(
                f"{self.path}: no pictures in split {split!r}: eval_fraction is {eval_fraction} "
                f"and the folder has {len({entry.file_name for entry in entries})} usable picture(s)"
            )

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Row:
        """Row `index`, its picture decoded now.

        A picture that passed its header check may still be cut short. Under `skip` it is listed in `bad_rows` and
        the next readable row stands in, so that a long run neither stops nor changes its length; the stand-in
        depends on the index alone, so a resumed run sees the same rows.
        """
        n = len(self._entries)
        if not -n <= index < n:
            raise IndexError(f"row {index} of {n}")
        for step in range(n):
            entry = self._entries[(index + step) % n]
            try:
                row = self._row(entry, load_picture(self.path / entry.file_name))
            except UNREADABLE as error:
                self._bad(entry.line, unreadable(error), entry.file_name)
                continue
            try:
                self._accept(row)
            except BadRow as bad:
                self._bad(entry.line, str(bad), entry.file_name)
            else:
                return row
        raise UserError(f"{self.path}: no readable picture" + self._first_reason())

    def accept_only(self, accept: Accept) -> None:
        """From now on a row that `accept` raises BadRow for is bad, as one whose picture cannot be read."""
        self._accept = accept

    def references(self) -> list[tuple[str, ...]]:
        """The references of every row, without decoding a picture."""
        return [entry.references for entry in self._entries]

    @property
    def picture_count(self) -> int:
        """Distinct pictures; a picture with several questions has as many rows."""
        return len({entry.file_name for entry in self._entries})

    def rows_without_pictures(self, limit: int | None = None) -> Iterator[Row]:
        """The first rows with `image=None`: what fitting a reward's statistics or checking its references needs."""
        return (self._row(entry, None) for entry in self._entries[:limit])

    def _row(self, entry: Entry, image: Image | None) -> Row:
        return Row(
            id=entry.id,
            image=image,
            prompt=self._prompt(entry.question),
            references=entry.references,
            question=entry.question,
            answer=entry.answer,
            answers=entry.answers,
        )

    def _prompt(self, question: str | None) -> str:
        if question is None:
            return self.prompt
        return self.prompt.replace(QUESTION, question) if QUESTION in self.prompt else question

    def _side(self, entries: list[Entry], eval_fraction: float, seed: int) -> list[Entry]:
        return take_split(entries, self.split, eval_fraction, seed)

    # -- reading -------------------------------------------------------------------------------------------------

    def _read(self) -> list[Entry]:
        """Rows in the metadata's order, then the pictures it does not mention, by name."""
        files = list_files(self.path)
        self.metadata = next((self.path / name for name in (METADATA, *CSV) if name in files), self.path / METADATA)
        entries: list[Entry] = []
        mentioned: dict[str, int] = {}
        for line, raw in self._lines(files):
            name = None
            try:
                record = parse_line(raw) if isinstance(raw, bytes) else raw
                name = file_name_of(record, self._columns["image"])
                count = mentioned[name] = mentioned.get(name, 0) + 1
                entry_id = name if count == 1 else f"{name}#{count}"  # several questions to one picture
                entries.append(self._entry(record, entry_id, name, line, files))
            except BadRow as bad:
                self._bad(line, str(bad), name)
        if self.metadata.name in CSV:
            entries = _together(entries)
        unmentioned = (name for name in sorted(files) if name not in mentioned)
        pictures = [name for name in unmentioned if PurePosixPath(name).suffix.lower() in SUFFIXES]
        if QUESTION in self.prompt:  # nothing to ask of a picture without a line
            return entries
        for name in pictures:
            try:
                check_needs(self._needs)
                entries.append(Entry(id=name, file_name=name))
            except BadRow as bad:
                self._bad(None, str(bad), name)
        return entries

    def _lines(self, files: frozenset[str]) -> Iterator[tuple[int, Any]]:
        if self.metadata.name not in files:
            return iter(())
        return numbered_lines(self.metadata) if self.metadata.name == METADATA else csv_rows(self.metadata)

    def _entry(self, record: dict[str, Any], entry_id: str, name: str, line: int, files: frozenset[str]) -> Entry:
        # A file behind a linked folder is not in the listing, hence the second look.
        if name not in files and not os.path.isfile(self.path / name):
            raise BadRow(f"{self._columns['image'][0]}: no picture {name[:200]!r} in the folder")
        question = text_of(record, self._columns["question"])
        if question is None and QUESTION in self.prompt:
            raise BadRow(f"{self._columns['question'][0]}: missing, and the prompt has {QUESTION}")
        references = texts_of(record, self._columns["references"])
        answer, answers = answers_of(record, self._columns["answer"])
        check_needs(self._needs, references, answer is not None)
        return Entry(entry_id, name, line, references, question, answer, answers)

    def _verified(self, entries: Sequence[Entry]) -> list[Entry]:
        """The entries whose picture has a sound header. Reading headers waits on the disk, hence the threads."""
        names = list(dict.fromkeys(entry.file_name for entry in entries))
        with ThreadPoolExecutor(max_workers=8) as pool:
            reasons = dict(zip(names, pool.map(self._why_unreadable, names), strict=True))
        kept = []
        for entry in entries:
            reason = reasons[entry.file_name]
            if reason is None:
                kept.append(entry)
            else:
                self._bad(entry.line, reason, entry.file_name)
        return kept

    def _why_unreadable(self, name: str) -> str | None:
        try:
            verify_picture(self.path / name)
        except UNREADABLE as error:
            return unreadable(error)
        return None

    # -- bad rows ------------------------------------------------------------------------------------------------

    def _bad(self, line: int | None, reason: str, name: str | None) -> None:
        """Lists a bad row once, or raises. `row` is the metadata's line; a picture without a line is its own file."""
        file = str(self.metadata) if line is not None else str(self.path / (name or ""))
        if line is not None and name is not None and name not in reason:
            reason = f"{name}: {reason}"
        self.bad_rows.add(file, line, reason)

    def _first_reason(self) -> str:
        if not self.bad_rows:
            return f": no {METADATA} and no picture files ({', '.join(sorted(SUFFIXES))})"
        more = len(self.bad_rows) - 1
        return f"; the first bad row: {describe(self.bad_rows[0])}" + (f" (and {more} more)" if more else "")


def _together(entries: Sequence[Entry]) -> list[Entry]:
    """Rows of one picture and question as one, with the references of all: a CSV has no lists."""
    found: dict[tuple[str, str | None], list[Entry]] = {}
    for entry in entries:
        found.setdefault((entry.file_name, entry.question), []).append(entry)
    return [_joined(of_one) for of_one in found.values()]


def _joined(entries: Sequence[Entry]) -> Entry:
    references = tuple(dict.fromkeys(text for entry in entries for text in entry.references))
    answers = tuple(entry.answer for entry in entries if entry.answer is not None)
    return replace(entries[0], references=references, answers=answers if len(answers) > 1 else ())


def list_files(folder: Path) -> frozenset[str]:
    """Every file below the folder, as POSIX paths relative to it; hidden files and folders left out."""
    if not folder.is_dir():
        raise UserError(f"{folder}: " + ("not a folder" if folder.exists() else "no such folder"))

    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot read folder ({error.strerror})")

    names = []
    for root, folders, files in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = Path(root).relative_to(folder)
        names += [(below / name).as_posix() for name in files if not name.startswith(".")]
    return frozenset(names)


def take_split(entries: list[Entry], split: str, eval_fraction: float, seed: int) -> list[Entry]:
    """The rows of one split. Chance must not leave a small folder with nothing on one side: where it would, and
    there are two pictures or more, the picture nearest the border crosses it."""
    if split == "all":
        return entries
    place = {entry.file_name: picture_place(entry.file_name, seed) for entry in entries}
    held = {name for name, at in place.items() if at < eval_fraction}
    if eval_fraction > 0 and len(place) > 1:
        if not held:
            held = {min(place, key=lambda name: (place[name], name))}
        elif len(held) == len(place):
            held.remove(max(place, key=lambda name: (place[name], name)))
    return [entry for entry in entries if (entry.file_name in held) == (split == "heldout")]


def picture_place(file_name: str, seed: int) -> float:
    """A picture's place in [0, 1): uniform, fixed by name and seed, the same on every machine and Python."""
    key = f"{seed}:{unicodedata.normalize('NFC', file_name)}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") / 2.0**64
