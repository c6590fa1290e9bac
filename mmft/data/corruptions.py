"""Preferences without annotators: a reference of a picture, and the same reference with one fault put into it.

Each kind of fault is one function of `mmft.data.corruption_kinds`. Text alone, English, by word lists
(`mmft.data.phrases`), so a caption may come out ungrammatical, but it is worse than the reference by what else the
references of its picture say: a swapped noun, colour or count is one that none of them has. Two limits. A thing that no
reference mentions may still be in the picture, and another word for the same thing (dog, puppy) counts as another
thing.

Words that replace others are drawn from the references of the whole data, as often as they occur there: else a model
could tell the worse caption by its words alone.

Sources: FOIL it! (Shekhar et al., ACL 2017) for swapped nouns; Winoground (Thrush et al., CVPR 2022) for roles.
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Container, Iterator, Sequence
from typing import TYPE_CHECKING

from mmft.data.caption_pool import CaptionPool
from mmft.data.corruption_kinds import CORRUPTIONS, TRIES, Corruption, Subject
from mmft.metrics.text import tokenise
from mmft.types import Row, UserError

if TYPE_CHECKING:
    from mmft.data.sources import Source

__all__ = ["CORRUPTIONS", "CaptionPool", "Corruption", "check_kinds", "corrupt", "corrupted_pairs"]


def corrupt(
    caption: str, kind: str, rng: random.Random, pool: CaptionPool, references: Sequence[str] = ()
) -> str | None:
    """`caption` with one fault of `kind`.

    None where the kind does not apply, or only captions come of it that say, word for word, what `caption` or one of
    `references`, the picture's own, does.

    Raises:
        UserError: no such kind.
    """
    check_kinds([kind])
    subject = Subject(caption, (caption, *references))
    true = {tokenise(text) for text in subject.own}
    for _ in range(TRIES):
        result = CORRUPTIONS[kind](subject, rng, pool)
        if result is None:
            return None
        if tokenise(result) and tokenise(result) not in true:
            return result
    return None


def check_kinds(kinds: Sequence[str]) -> None:
    """Raises UserError for a kind that does not exist."""
    for kind in kinds:
        if kind not in CORRUPTIONS:
            near = difflib.get_close_matches(kind, CORRUPTIONS, n=1, cutoff=0.0)[0]
            raise UserError(f"corruption {kind!r}: no such kind; did you mean {near}?")


def corrupted_pairs(
    source: Source,
    kinds: Sequence[str] | None = None,
    per_row: int = 1,
    seed: int = 0,
    pool: CaptionPool | None = None,
    pictures: bool = True,
) -> Iterator[tuple[Row, str, str, str]]:
    """(row, chosen, rejected, kind): up to `per_row` different pairs of each row that has references.

    chosen is one of the row's references, rejected that reference with a fault of `kind`, kinds (None: all) in turn.
    The pairs of a row follow from its id, its references, `seed` and `pool` (None: the source's own references).
    pictures: False leaves the rows' pictures undecoded.

    Raises:
        UserError: no such kind, `per_row` below 1, or no row of the source has references.
    """
    kinds = tuple(CORRUPTIONS if kinds is None else kinds)
    check_kinds(kinds)
    if per_row < 1 or not kinds:
        raise UserError(f"corruptions: per_row is {per_row} and there are {len(kinds)} kinds; at least 1 of each")
    known = pool or CaptionPool.from_rows(source.rows_without_pictures())
    if not known.captions:
        raise UserError("corruptions: no row has references, and they are what is corrupted")
    rows = (source[i] for i in range(len(source))) if pictures else source.rows_without_pictures()
    return (
        (row, *pair)
        for row in rows
        for pair in _pairs_of(row.references, kinds, per_row, random.Random(f"corruptions/{seed}/{row.id}"), known)
    )


def _pairs_of(
    references: Sequence[str], kinds: Sequence[str], per_row: int, rng: random.Random, pool: CaptionPool
) -> list[tuple[str, str, str]]:
    pairs: dict[tuple[str, str], str] = {}
    live = rng.sample(kinds, len(kinds))
    while live and len(pairs) < per_row:
        for kind in tuple(live):
            pair = _new_pair(references, kind, rng, pool, pairs)
            if pair is None:
                live.remove(kind)
            else:
                pairs[pair] = kind
            if len(pairs) == per_row:
                break
    return [(chosen, rejected, kind) for (chosen, rejected), kind in pairs.items()]


def _new_pair(
    references: Sequence[str], kind: str, rng: random.Random, pool: CaptionPool, known: Container[tuple[str, str]]
) -> tuple[str, str] | None:
    """A reference and its corruption, not yet known. A kind that one reference has no place for, another may."""
    for chosen in rng.sample(references, len(references)):
        for _ in range(TRIES):
            rejected = corrupt(chosen, kind, rng, pool, references)
            if rejected is None:
                break
            if (chosen, rejected) not in known:
                return chosen, rejected
    return None
