"""What people, or programs in their place, said of captions: which of two is better, or how good one is.

One schema, read from and written to JSONL or parquet; docs/data.md describes it. A picture is held as its path or its
encoded bytes and decoded when it is asked for, so that a hundred thousand rows fit into memory.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, TypeVar

from PIL import Image

from mmft.data.metadata import BadRow
from mmft.data.pictures import load_picture, to_rgb, verify_picture
from mmft.types import Row, UserError

PROMPT = "Describe the picture."
_SHARED_KEYS = ("image", "prompt", "annotator", "references", "kind")


@dataclass(frozen=True)
class Picture:
    """An encoded picture, on disk or in memory. Two are equal when their encoded bytes are.

    key: a hash of the encoded bytes: what is computed of a picture can be kept under it.
    source: the file, or the bytes themselves.
    """

    key: str
    source: Path | bytes = field(compare=False, repr=False)

    @classmethod
    def of(cls, source: Image.Image | bytes | str | Path) -> Picture:
        """From a decoded picture (held as PNG), from encoded bytes, or from a file.

        Raises one of `mmft.data.pictures.UNREADABLE` where that is no picture.
        """
        if isinstance(source, Image.Image):
            buffer = io.BytesIO()
            to_rgb(source).save(buffer, format="PNG")
            return cls(_key(buffer.getvalue()), buffer.getvalue())
        held = source if isinstance(source, bytes) else Path(source)
        data = held if isinstance(held, bytes) else held.read_bytes()
        verify_picture(io.BytesIO(data))
        return cls(_key(data), held)

    def read(self) -> bytes:
        """The encoded bytes."""
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()

    def open(self) -> Image.Image:
        """The picture, decoded now: upright, RGB. Raises one of `mmft.data.pictures.UNREADABLE`."""
        if isinstance(self.source, bytes):
            return load_picture(io.BytesIO(self.source))
        return load_picture(self.source)


def _key(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What preferences and ratings have in common.

    references: captions of the picture, for terms that compare with them. kind: how the worse caption was made, for
    accuracy by kind. annotator: who judged.
    """

    KEYS: ClassVar[tuple[str, ...]]  # what a file's row may hold
    REQUIRED: ClassVar[tuple[str, ...]]
    OWN: ClassVar[frozenset[str]]  # by these a row shows which of the two it is

    picture: Picture
    prompt: str = PROMPT
    references: tuple[str, ...] = ()
    annotator: str | None = None
    kind: str | None = None

    @property
    def picture_key(self) -> str:
        """Equal for equal pictures, so that each is encoded once."""
        return self.picture.key

    def open_picture(self) -> Image.Image:
        """The picture, decoded now: upright, RGB."""
        return self.picture.open()

    def row(self, picture: bool = True) -> Row:
        """The row as reward terms take it; its id is the picture's key."""
        return Row(self.picture.key, self.open_picture() if picture else None, self.prompt, self.references)


@dataclass(frozen=True, kw_only=True)
class Preference(Judgement):
    """Of two captions of one picture, `chosen` is better by `margin` (None: not said), or they `tie`.

    Raises ValueError for captions that are empty, or the same without a tie, and for a margin that is not a finite
    number >= 0, or that a tie has.
    """

    KEYS = (*_SHARED_KEYS, "chosen", "rejected", "margin", "tie")
    REQUIRED = ("image", "chosen", "rejected")
    OWN = frozenset({"chosen", "rejected", "margin", "tie"})

    chosen: str
    rejected: str
    margin: float | None = None
    tie: bool = False

    def __post_init__(self) -> None:
        _check_text("chosen", self.chosen)
        _check_text("rejected", self.rejected)
        if self.chosen.strip() == self.rejected.strip() and not self.tie:
            raise BadRow("rejected: the same as chosen, and tie is not true")
        if self.margin is not None:
            _check_finite("margin", self.margin)
            if self.margin < 0:
                raise BadRow(f"margin: {self.margin:g} is negative; exchange chosen and rejected")
            if self.tie and self.margin > 0:
                raise BadRow(f"margin: {self.margin:g}, and tie is true")


@dataclass(frozen=True, kw_only=True)
class Rating(Judgement):
    """How good a caption of a picture is, as one finite number. Raises ValueError for anything else, or no caption."""

    KEYS = (*_SHARED_KEYS, "caption", "rating")
    REQUIRED = ("image", "caption", "rating")
    OWN = frozenset({"caption", "rating"})

    caption: str
    rating: float

    def __post_init__(self) -> None:
        _check_text("caption", self.caption)
        _check_finite("rating", self.rating)


J = TypeVar("J", bound=Judgement)


def _check_text(key: str, text: str) -> None:
    if not text.strip():
        raise BadRow(f"{key}: empty text")


def _check_finite(key: str, value: float) -> None:
    if not math.isfinite(value):
        raise BadRow(f"{key}: {value} is not a finite number")


def split_by_picture(items: Sequence[J], fraction: float, seed: int = 0) -> tuple[list[J], list[J]]:
    """(the rest, held out): about `fraction` of the pictures, each with all its items, are held out.

    A picture's side follows from a hash of its key and `seed`, so the order of items does not matter. Chance must not
    leave a side of two pictures or more empty: where it would, the picture nearest the border crosses it.

    Raises:
        UserError: `fraction` is not in [0, 1).
    """
    if not 0.0 <= fraction < 1.0:
        raise UserError(f"fraction: {fraction} is not in [0, 1)")
    place = {item.picture_key: _place(item.picture_key, seed) for item in items}
    held = {key for key, at in place.items() if at < fraction}
    if fraction > 0 and len(place) > 1:
        if not held:
            held = {min(place, key=lambda key: (place[key], key))}
        elif len(held) == len(place):
            held.remove(max(place, key=lambda key: (place[key], key)))
    rest = [item for item in items if item.picture_key not in held]
    return rest, [item for item in items if item.picture_key in held]


def _place(key: str, seed: int) -> float:
    """A picture's place in [0, 1): uniform, fixed by key and seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big") / 2.0**64
