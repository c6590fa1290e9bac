"""Reading metadata, JSON lines or CSV: each column checked, each fault named by key."""

from __future__ import annotations

import csv
import difflib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmft.types import Needs, Row, UserError

# Looked up in this order where the recipe names no column.
DEFAULT_COLUMNS: dict[str, tuple[str, ...]] = {
    "image": ("file_name",),
    "references": ("caption", "captions", "references"),
    "question": ("question",),
    "answer": ("answer", "answers"),
}


csv.field_size_limit(2**26)  # a picture in base64 is more than the 128 KiB that Python allows

MOST_CHARACTERS = 20_000  # of a caption or question: longer ones are no captions, and take hours to compare


class BadRow(ValueError):
    """Why one row cannot be used; its text is the reason alone."""


Accept = Callable[[Row], None]  # raises BadRow for a row that cannot be used with the model at hand


def take_any(row: Row) -> None:
    """Accepts every row."""


def resolve_columns(columns: Mapping[str, str | None] | None) -> dict[str, tuple[str, ...]]:
    resolved = dict(DEFAULT_COLUMNS)
    for key, column in (columns or {}).items():
        if key not in resolved:
            near = difflib.get_close_matches(key, resolved, n=1, cutoff=0.0)[0]
            raise UserError(f"columns.{key}: unknown column; did you mean {near}?")
        if column is not None:
            resolved[key] = (column,)
    return resolved


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that are not blank. Bytes: one line that is not UTF-8 must not cost the rest of the file."""
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(file, start=1):
                line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
                if line.strip():
                    yield number, line
    except OSError as error:
        raise UserError(f"{path}: cannot read ({error.strerror})") from error


def csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a CSV, or of a TSV, each with the number of its last line; blank fields are left out.

    Raises UserError for a file without a header or not in UTF-8: which rows such a file has cannot be told.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
            if not reader.fieldnames:
                raise UserError(f"{path}: no header line that names the columns")
            for row in reader:
                yield reader.line_num, {name: value for name, value in row.items() if name and value}
    except OSError as error:
        raise UserError(f"{path}: cannot read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text; save it as UTF-8") from error
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num}: {error}") from error


def parse_line(raw: bytes) -> dict[str, Any]:
    try:
        record = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8 text (byte {error.start + 1})") from error
    except json.JSONDecodeError as error:
        raise BadRow(f"not JSON: {error.msg} (column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets thousands deep
        raise BadRow("not JSON: too large a number or nested too deeply") from error
    if not isinstance(record, dict):
        raise BadRow(f"expected a JSON object, found {_kind(record)}")
    return record


def _find(record: dict[str, Any], names: tuple[str, ...]) -> tuple[str, Any]:
    """The first of the columns that the row has, and its value. A column that a recipe names must be there."""
    for name in names:
        if name in record:
            return name, record[name]
    if len(names) == 1 and names not in DEFAULT_COLUMNS.values():
        near = difflib.get_close_matches(names[0], record, n=1)
        raise BadRow(f"{names[0]}: no such column" + (f"; did you mean {near[0]}?" if near else ""))
    return names[0], None


def find_value(record: dict[str, Any], names: tuple[str, ...], optional: tuple[str, ...]) -> tuple[str, Any]:
    """The first of the columns that the row has; none of `optional` need be there."""
    found = next(((name, record[name]) for name in names if record.get(name) is not None), None)
    if found is None and names is not optional:
        return _find(record, names)
    return found or (names[0], None)


def file_name_of(record: dict[str, Any], names: tuple[str, ...]) -> str:
    key, value = _find(record, names)
    if value is None:
        near = difflib.get_close_matches(key, record, n=1)
        raise BadRow(f"{key}: missing" + (f"; did you mean {near[0]}?" if near else ""))
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise BadRow(f"{key}: expected a file name, found {_kind(value)}")
    name = os.path.normpath(value.replace("\\", "/")).replace(os.sep, "/")
    if name.startswith(("/", "../")) or name == ".." or Path(name).is_absolute():
        raise BadRow(f"{key}: {value!r} is outside the folder")
    return name


def texts_of(record: dict[str, Any], names: tuple[str, ...]) -> tuple[str, ...]:
    key, value = _find(record, names)
    if value is None:
        return ()
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list):
        raise BadRow(f"{key}: expected text or a list of texts, found {_kind(value)}")
    items = [_nested(item) for item in items]
    for item in items:
        if not isinstance(item, str):
            raise BadRow(f"{key}: expected text or a list of texts, found {_kind(item)} in it")
        if not item.strip():
            raise BadRow(f"{key}: empty text")
        _check_unicode(key, item)
    return tuple(item.strip() for item in items)


def _nested(item: Any) -> Any:
    """The text in an object: hub sets have sentences of {"raw": ...}, answers of {"answer": ...}."""
    if not isinstance(item, dict):
        return item
    return next((item[name] for name in ("raw", "caption", "text", "answer") if isinstance(item.get(name), str)), item)


def answers_of(record: dict[str, Any], names: tuple[str, ...]) -> tuple[str | None, tuple[str, ...]]:
    """(the answer that most people gave, everybody's answers where there are several); None where there is none."""
    if not isinstance(_find(record, names)[1], list):
        return text_of(record, names), ()
    answers = texts_of(record, names)
    return (Counter(answers).most_common(1)[0][0] if answers else None), (answers if len(answers) > 1 else ())


def check_needs(needs: Needs, references: Sequence[str] = (), answered: bool = False) -> None:
    """Raises BadRow where something needs references or answers and there are none."""
    if needs.references is not None and not references:
        raise BadRow(f"{needs.references} needs references, and there are none")
    if needs.answers is not None and not answered:
        raise BadRow(f"{needs.answers} needs an answer, and there is none")


def text_of(record: dict[str, Any], names: tuple[str, ...]) -> str | None:
    """A question or an answer; a blank one is none."""
    key, value = _find(record, names)
    if value is None:
        return None
    if not isinstance(value, str):
        raise BadRow(f"{key}: expected text, found {_kind(value)}")
    _check_unicode(key, value)
    return value if value.strip() else None


def _check_unicode(key: str, text: str) -> None:
    """JSON can spell half a surrogate pair, which no tokenizer or file would take later."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise BadRow(f"{key}: text with half a surrogate pair")
    if len(text) > MOST_CHARACTERS:
        raise BadRow(f"{key}: text of {len(text)} characters, more than {MOST_CHARACTERS}")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "empty text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
