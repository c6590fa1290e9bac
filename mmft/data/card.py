"""A data card: what a run is about to learn from, in numbers and a few rows, before time is spent on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mmft.data.sources import Source, first_rows
from mmft.data.table import TableStream
from mmft.types import Row

LOOKED_AT = 4000  # rows at most, of which references and lengths are counted
SHOWN = 5
_LONGEST = 90  # letters of a caption that is shown


@dataclass(frozen=True)
class DataCard:
    """rows: how many train, at least; all_counted: whether that is all. heldout: rows of the evaluation. pictures:
    distinct ones, None where that is not known. references, words: smallest, mean and largest number of a row's
    references and of a reference's words, None where there are none. without_references, with_answers: rows among
    `looked_at`. bad_rows: found so far. samples: the first rows.
    """

    rows: int
    all_counted: bool
    heldout: int
    pictures: int | None
    looked_at: int
    references: tuple[float, float, float] | None
    words: tuple[float, float, float] | None
    without_references: int
    with_answers: int
    bad_rows: int
    samples: tuple[dict[str, Any], ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people: what there is, then a line a sample."""
        more = "" if self.all_counted else "at least "
        pictures = f" of {self.pictures:,} pictures" if self.pictures not in (None, self.rows) else ""
        parts = [f"{more}{self.rows:,} rows{pictures} to train on, {self.heldout:,} held out"]
        if self.references is not None and self.words is not None:
            low, mean, high = self.references
            parts.append(f"{mean:.1f} references each ({low:.0f} to {high:.0f})")
            low, mean, high = self.words
            parts.append(f"{mean:.1f} words a reference ({low:.0f} to {high:.0f})")
        if self.with_answers:
            parts.append(f"{self.with_answers:,} rows with answers")
        if self.without_references:
            all_of_them = self.without_references == self.looked_at
            parts.append("no references" if all_of_them else f"{self.without_references:,} rows without references")
        if self.bad_rows:
            parts.append(f"{self.bad_rows:,} bad rows so far")
        return ["; ".join(parts), *(_sample_line(sample) for sample in self.samples)]


def data_card(train: Source | TableStream, heldout: Source, shown: int = SHOWN) -> DataCard:
    """The card of two open sources. Reads the first rows' texts, and decodes `shown` pictures."""
    texts = list(train.rows_without_pictures(LOOKED_AT))
    rows = len(texts) if isinstance(train, TableStream) else len(train)
    counts = [len(row.references) for row in texts]
    words = [len(reference.split()) for row in texts for reference in row.references]
    bad = {
        tuple(sorted(map(str, row.items()))) for source in (train, heldout) for row in getattr(source, "bad_rows", ())
    }
    return DataCard(
        rows=rows,
        all_counted=not isinstance(train, TableStream) or train.read_to_the_end,
        heldout=len(heldout),
        pictures=getattr(train, "picture_count", None),
        looked_at=len(texts),
        references=_spread(counts) if any(counts) else None,
        words=_spread(words) if words else None,
        without_references=sum(count == 0 for count in counts),
        with_answers=sum(row.answer is not None for row in texts),
        bad_rows=len(bad),
        samples=tuple(_sample(row) for row in first_rows(train, shown)),
    )


def _spread(numbers: Sequence[int]) -> tuple[float, float, float]:
    return float(min(numbers)), float(np.mean(numbers)), float(max(numbers))


def _sample(row: Row) -> dict[str, Any]:
    size = f"{row.image.width}x{row.image.height}" if row.image is not None else None
    texts = list(row.references)
    return {"id": row.id, "size": size, "prompt": row.prompt, "references": texts, "answer": row.answer}


def _sample_line(sample: dict[str, Any]) -> str:
    where = f"{sample['id']} ({sample['size'] or 'no picture'})"
    if sample["answer"] is not None:
        return f"  {where}: {_short(sample['prompt'])} -> {_short(sample['answer'])}"
    if not sample["references"]:
        return f"  {where}"
    more = len(sample["references"]) - 1
    return f"  {where}: {_short(sample['references'][0])}{f' (and {more} more)' if more else ''}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."
