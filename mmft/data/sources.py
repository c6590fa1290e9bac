"""From a recipe's `data` block to rows: one function opens any source."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from mmft.config import ImageFolderConfig, ScenesConfig
from mmft.data.imagefolder import ImageFolder
from mmft.data.scenes import EmojiScenes
from mmft.types import Row


class Source(Protocol):
    """A map-style data set of rows, as a data loader wants it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...

    def rows_without_pictures(self, limit: int | None = None) -> Iterator[Row]: ...


def open_source(config: ScenesConfig | ImageFolderConfig, split: str, samples: int | None = None) -> Source:
    """The rows of one split, at most `samples` of them where the source is infinite.

    Raises UserError for a folder that isn't there or holds nothing usable.
    """
    if isinstance(config, ScenesConfig):
        return EmojiScenes(
            samples or config.samples, "heldout" if split == "heldout" else "train", config.seed, config.prompt
        )
    return ImageFolder(
        config.path,
        config.prompt,
        config.columns.model_dump(),
        split,
        config.eval_fraction,
        config.seed,
        config.on_bad_row,
    )


class Repeated:
    """A small data set repeated until it holds `at_least` rows, so that a batch may be larger than the data."""

    def __init__(self, source: Source, at_least: int):
        self.source = source
        self.times = max(1, -(-at_least // len(source)))

    def __len__(self) -> int:
        return self.times * len(self.source)

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self.source[index % len(self.source)]
