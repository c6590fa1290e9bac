"""Setting text and pictures on a page with Pillow: fonts, line breaking, thumbnails."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

INK, QUIET, PAPER, RULE = "#1b1f24", "#68707c", "#ffffff", "#d9dde3"


@lru_cache(maxsize=16)
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which Matplotlib ships: the same on every machine, with Latin, Greek, Cyrillic and Arabic."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


@dataclass(frozen=True)
class Paragraph:
    """A run of text in one style. `max_lines` cuts longer text with an ellipsis; `gap` is the space above it."""

    text: str
    size: int = 13
    bold: bool = False
    colour: str = INK
    max_lines: int = 6
    gap: int = 4

    @property
    def line_height(self) -> int:
        return round(self.size * 1.35)

    def lines(self, width: int) -> list[str]:
        return wrap(self.text, font(self.size, self.bold), width, self.max_lines)


def wrap(text: str, face: ImageFont.FreeTypeFont, width: int, max_lines: int) -> list[str]:
    """Breaks text into lines of at most `width` pixels: at spaces, and inside a word only where it fills a line."""
    lines: list[str] = []
    line = ""
    for word in printable(text).split():
        while word:
            trial = f"{line} {word}" if line else word
            if face.getlength(trial) <= width:
                line, word = trial, ""
            elif line:
                lines.append(line)
                line = ""
            else:
                cut = _fitting(word, face, width)
                lines.append(word[:cut])
                word = word[cut:]
            if len(lines) > max_lines:
                return [*lines[: max_lines - 1], _ellipsis(lines[max_lines - 1], face, width)]
    if line:
        lines.append(line)
    if len(lines) > max_lines:
        return [*lines[: max_lines - 1], _ellipsis(lines[max_lines - 1], face, width)]
    return lines


def printable(text: str) -> str:
    """Text without control characters, which fonts draw as boxes or fail on."""
    return "".join(" " if unicodedata.category(c) in ("Cc", "Cs") else c for c in text)


def _fitting(word: str, face: ImageFont.FreeTypeFont, width: int) -> int:
    """How many characters of the word fit, at least one, by bisection."""
    low, high = 1, len(word)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if face.getlength(word[:middle]) <= width else (low, middle - 1)
    return low


def _ellipsis(line: str, face: ImageFont.FreeTypeFont, width: int) -> str:
    while line and face.getlength(line + "…") > width:
        line = line[:-1]
    return line.rstrip() + "…"


def height_of(paragraphs: Sequence[Paragraph], width: int) -> int:
    return sum(p.gap + p.line_height * len(p.lines(width)) for p in paragraphs)


def draw_paragraphs(draw: ImageDraw.ImageDraw, left: int, top: int, width: int, paragraphs: Sequence[Paragraph]) -> int:
    """Sets the paragraphs one below the other and returns where the next thing may start."""
    for paragraph in paragraphs:
        top += paragraph.gap
        for line in paragraph.lines(width):
            draw.text((left, top), line, font=font(paragraph.size, paragraph.bold), fill=paragraph.colour)
            top += paragraph.line_height
    return top


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """The picture scaled to fit the box, its proportions kept: small ones grow too, as a thumbnail must be seen."""
    scale = min(width / image.width, height / image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


@dataclass(frozen=True)
class Card:
    """A picture, or a grey field where there is none, with paragraphs beneath."""

    image: Image.Image | None
    paragraphs: tuple[Paragraph, ...]


def grid(cards: Sequence[Card], columns: int, side: int, gutter: int, picture_height: int | None = None) -> Image.Image:
    """Cards of width `side` in rows, each row as high as its longest text."""
    picture_height = picture_height or side
    columns = max(1, min(columns, len(cards)))
    rows = [cards[i : i + columns] for i in range(0, len(cards), columns)]
    heights = [picture_height + max(height_of(card.paragraphs, side) for card in row) for row in rows]
    size = (columns * (side + gutter) + gutter, sum(heights) + gutter * (len(rows) + 1))
    page = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(page)
    top = gutter
    for row, height in zip(rows, heights, strict=True):
        for column, card in enumerate(row):
            left = gutter + column * (side + gutter)
            _paste(page, draw, card, (left, top, side, picture_height))
            draw_paragraphs(draw, left, top + picture_height, side, card.paragraphs)
        top += height + gutter
    return page


def _paste(page: Image.Image, draw: ImageDraw.ImageDraw, card: Card, box: tuple[int, int, int, int]) -> None:
    left, top, width, height = box
    if card.image is None:
        draw.rectangle((left, top, left + width - 1, top + height - 1), fill="#eef0f3")
        note = Paragraph("no picture", size=max(11, width // 20), colour=QUIET)
        draw_paragraphs(draw, left + width // 20, top + height // 2 - note.line_height, width, [note])
        return
    picture = fit(card.image, width, height)
    x, y = left, top + height - picture.height  # flush with the text, and resting on it
    page.paste(picture, (x, y))
    draw.rectangle((x, y, x + picture.width - 1, y + picture.height - 1), outline=RULE)
