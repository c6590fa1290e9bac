"""A contact sheet: what the data really looks like, on one page, before a run is spent on it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mmft.data.typeset import QUIET, Card, Paragraph, grid
from mmft.types import Row, UserError

SIDE, PICTURE_HEIGHT, GUTTER = 300, 240, 24  # pixels
MAX_REFERENCES = 5
MAX_PICTURES = 500  # beyond this one PNG is no longer something to look at


def contact_sheet(rows: Iterable[Row], out: str | Path, columns: int = 4) -> Path:
    """Writes one PNG of the rows' pictures, each with its references and its question and answer beneath.

    Raises UserError where there is no row, there are more than `MAX_PICTURES`, or `out` cannot be written.
    """
    out = Path(out)
    cards: list[Card] = []
    for row in rows:
        if len(cards) == MAX_PICTURES:
            raise UserError(f"{out}: a contact sheet holds at most {MAX_PICTURES} rows")
        cards.append(_card(row))
    if not cards:
        raise UserError(f"{out}: no rows to preview")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        grid(cards, columns, SIDE, GUTTER, PICTURE_HEIGHT).save(out, format="PNG", optimize=True)
    except OSError as error:
        raise UserError(f"{out}: cannot write ({error.strerror or error})") from error
    return out


def _card(row: Row) -> Card:
    # Shrunk at once: a sheet of five hundred photographs must not hold them all at full size.
    image = row.image.copy() if row.image is not None else None
    if image is not None:
        image.thumbnail((2 * SIDE, 2 * SIDE))
    paragraphs = [Paragraph(row.id, size=11, colour=QUIET, max_lines=1, gap=6)]
    paragraphs += [Paragraph(f"• {reference}") for reference in row.references[:MAX_REFERENCES]]
    if not row.references:
        paragraphs.append(Paragraph("no references", colour=QUIET))
    elif len(row.references) > MAX_REFERENCES:
        paragraphs.append(Paragraph(f"and {len(row.references) - MAX_REFERENCES} more", size=11, colour=QUIET))
    if row.question is not None:
        paragraphs.append(Paragraph(f"Q: {row.question}", colour=QUIET))
        paragraphs.append(Paragraph(f"A: {row.answer if row.answer is not None else '?'}", gap=0))
    return Card(image, tuple(paragraphs))
