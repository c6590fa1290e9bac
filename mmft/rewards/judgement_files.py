"""Writing preferences and ratings: JSONL with picture files beside it, or one parquet file that holds the pictures."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mmft.rewards.judgements import J, Judgement, Preference, Rating
from mmft.types import UserError

SUFFIXES = (".jsonl", ".parquet")
KIND_NAMES: dict[type[Judgement], str] = {Preference: "preferences", Rating: "ratings"}
_ROWS_AT_ONCE = 256  # of a parquet file


def write_preferences(path: str | Path, items: Sequence[Preference], picture_folder: str | Path | None = None) -> None:
    """Writes JSONL or parquet, by suffix, that `read_preferences` takes back to equal items.

    JSONL names the pictures that lie in its own folder as they are; others are written to `picture_folder`, named by
    their key: a path relative to that folder, by default the file's name with `_pictures`. Parquet holds the encoded
    pictures.

    Raises:
        UserError: another suffix, no items, items of another kind, or a `picture_folder` elsewhere.
    """
    _write(Path(path), items, Preference, picture_folder)


def write_ratings(path: str | Path, items: Sequence[Rating], picture_folder: str | Path | None = None) -> None:
    """As `write_preferences`, for ratings."""
    _write(Path(path), items, Rating, picture_folder)


def _write(path: Path, items: Sequence[J], item_type: type[J], picture_folder: str | Path | None) -> None:
    check_suffix(path)
    if not items:
        raise UserError(f"{path}: no {KIND_NAMES[item_type]} to write")
    for item in items:
        if not isinstance(item, item_type):
            raise UserError(f"{path}: {type(item).__name__} among {KIND_NAMES[item_type]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")  # a kill leaves the old file whole
    if path.suffix.lower() == ".jsonl":
        names = _place_pictures(path, items, picture_folder)
        with open(part, "w", encoding="utf-8") as file:
            for item in items:
                record = {"image": names[item.picture_key]} | _record(item)
                # By identity: a margin or rating of 0.0 equals False.
                lean = {k: v for k, v in record.items() if v is not None and v is not False and v != ()}
                file.write(json.dumps(lean, ensure_ascii=False, allow_nan=False) + "\n")
    else:
        _write_parquet(part, items, item_type)
    os.replace(part, path)


def _record(item: Judgement) -> dict[str, Any]:
    return {key: getattr(item, key) for key in type(item).KEYS if key != "image"}


def _place_pictures(path: Path, items: Sequence[Judgement], picture_folder: str | Path | None) -> dict[str, str]:
    """Picture key -> its name relative to the file's folder; pictures that lie elsewhere are written there first."""
    root = path.parent.resolve()
    folder = (root / (picture_folder or f"{path.stem}_pictures")).resolve()
    if not folder.is_relative_to(root):
        raise UserError(f"{folder}: pictures must lie below {root}, the folder of {path.name}")
    names: dict[str, str] = {}
    for picture in {item.picture_key: item.picture for item in items}.values():
        place = None if isinstance(picture.source, bytes) else picture.source.resolve()
        if place is None or not place.is_relative_to(root):
            data = picture.read()
            with Image.open(io.BytesIO(data)) as image:
                suffix = ".jpg" if image.format == "JPEG" else f".{(image.format or 'png').lower()}"
            folder.mkdir(parents=True, exist_ok=True)
            place = folder / f"{picture.key}{suffix}"
            place.write_bytes(data)
        names[picture.key] = place.relative_to(root).as_posix()
    return names


def _write_parquet(path: Path, items: Sequence[Judgement], item_type: type[Judgement]) -> None:
    import pyarrow.parquet
    from datasets import Features, List, Value
    from datasets import Image as ImageFeature

    types = {key: Value("string") for key in item_type.KEYS} | {"references": List(Value("string"))}
    types |= {"image": ImageFeature()} | {key: Value("float64") for key in ("margin", "rating") if key in types}
    types |= {"tie": Value("bool")} if "tie" in types else {}
    schema = Features(types).arrow_schema  # with the note by which `datasets` knows that there are pictures
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, len(items), _ROWS_AT_ONCE):
            rows = [
                {"image": {"bytes": item.picture.read(), "path": None}} | _record(item)
                for item in items[start : start + _ROWS_AT_ONCE]
            ]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))


def check_suffix(path: Path) -> None:
    """Raises UserError for a file that is neither JSONL nor parquet."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path}: expected a file that ends in {' or '.join(SUFFIXES)}")
