"""A picture of a run: held-out pictures with what the model said before and after, for a README."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from mmft.data.typeset import PAPER, QUIET, Card, Paragraph, draw_paragraphs, grid, height_of
from mmft.report.folder import EVAL_SAMPLES, RunFolder
from mmft.report.samples import sample_picture
from mmft.types import UserError

# Drawn at twice the 900 px that a README shows, so that it is sharp on dense screens.
SIDE, GUTTER = 396, 40
PICTURE_HEIGHT = 300
TEXT, SMALL = 27, 22  # pixels: 13.5 and 11 as shown


def picture_strip(run_dir: str | Path, out: str | Path, pictures: int = 8, columns: int = 4) -> Path:
    """Draws the first `pictures` samples of the run's evaluation, in order, and writes them to `out` as PNG.

    Nothing is selected or coloured as better: what is shown is what the model said. Samples without a picture are
    left out. Raises UserError where the run has no such samples or `out` cannot be written.
    """
    run, out = RunFolder(run_dir), Path(out)
    cards: list[Card] = []
    for sample in run.eval_samples():
        image = sample_picture(run, sample)
        if image is not None and len(cards) < pictures:
            cards.append(Card(image, _texts(sample)))
    if not cards:
        raise UserError(f"{run / EVAL_SAMPLES}: no evaluated pictures to draw")
    page = grid(cards, columns, SIDE, GUTTER, PICTURE_HEIGHT)
    page = _with_footer(page, f"The first {len(cards)} pictures of the evaluation, in order; none selected.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        page.save(out, format="PNG", optimize=True)
    except OSError as error:
        raise UserError(f"{out}: cannot write ({error.strerror or error})") from error
    return out


def _texts(sample: dict[str, Any]) -> tuple[Paragraph, ...]:
    paragraphs: list[Paragraph] = []
    for name in ("before", "after"):
        caption = str(sample.get(name) or "").strip() or "(nothing)"
        paragraphs.append(Paragraph(name, size=SMALL, bold=True, colour=QUIET, gap=14, max_lines=1))
        paragraphs.append(Paragraph(caption, size=TEXT, gap=2, max_lines=7))
    return tuple(paragraphs)


def _with_footer(page: Image.Image, text: str) -> Image.Image:
    footer = [Paragraph(text, size=SMALL, colour=QUIET, gap=0)]
    width = page.width - 2 * GUTTER
    taller = Image.new("RGB", (page.width, page.height + height_of(footer, width) + GUTTER), PAPER)
    taller.paste(page, (0, 0))
    draw_paragraphs(ImageDraw.Draw(taller), GUTTER, page.height, width, footer)
    return taller
