"""From a recipe's `data` block to rows: one function opens any source."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from mmft.config import CocoConfig, DataConfig, HubDataConfig, ScenesConfig, TableConfig
from mmft.data.coco import CocoCaptions
from mmft.data.cursor import RowCursor, Shuffled
from mmft.data.imagefolder import CSV, METADATA, ImageFolder
from mmft.data.scenes import EmojiScenes
from mmft.data.table import TableStream, open_rows, open_stream
from mmft.types import NOTHING_NEEDED, Needs, Row

TABLES = (".jsonl", ".csv", ".tsv", ".parquet")


class Source(Protocol):
    """A map-style data set of rows, as a data loader wants it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...

    def rows_without_pictures(self, limit: int | None = None) -> Iterator[Row]: ...


def guess_type(path: str) -> str:
    """`data.type` of a folder or file: what it is by its name and content."""
    place = Path(path)
    suffix = place.suffix.lower()
    if suffix == ".json":
        return "coco"
    if suffix in TABLES or "*" in path:
        return "table"
    if place.is_dir() and not any((place / name).is_file() for name in (METADATA, *CSV)):
        has_tables = any(next(place.glob(f"*{kind}"), None) for kind in TABLES)
        return "table" if has_tables else "imagefolder"
    return "imagefolder"


def open_training(config: DataConfig, needs: Needs = NOTHING_NEEDED) -> Source | TableStream:
    """Rows to train on; a stream where they may be more than memory holds. See `open_source`."""
    if isinstance(config, TableConfig | HubDataConfig):
        return open_stream(config, needs=needs)
    return open_source(config, "train", needs=needs)


def open_source(config: DataConfig, split: str, samples: int | None = None, needs: Needs = NOTHING_NEEDED) -> Source:
    """The rows of one split, at most `samples` of them where the source is infinite or larger than memory.

    needs: what each row must hold; one that lacks it is bad.
    Raises UserError for data that isn't there or holds nothing usable.
    """
    if isinstance(config, TableConfig | HubDataConfig):
        return open_rows(config, split, samples, needs)
    if isinstance(config, ScenesConfig):
        return EmojiScenes(
            samples or config.samples, "heldout" if split == "heldout" else "train", config.seed, config.prompt
        )
    if isinstance(config, CocoConfig):
        return CocoCaptions(config, split, needs)
    return ImageFolder(
        config.path,
        config.prompt,
        config.columns.model_dump(),
        split,
        config.eval_fraction,
        config.seed,
        config.on_bad_row,
        config.max_bad_fraction,
        needs,
    )


def open_cursor(source: Source | TableStream, seed: int) -> RowCursor:
    """Training rows of a source in an endless order."""
    return source.cursor(seed) if isinstance(source, TableStream) else Shuffled(source, seed)


def first_rows(source: Source | TableStream, count: int) -> list[Row]:
    """The first rows of a source, with their pictures."""
    if isinstance(source, TableStream):
        return source.first(count)
    return [source[i] for i in range(min(count, len(source)))]
