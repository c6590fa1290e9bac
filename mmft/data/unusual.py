"""Pictures unlike those of a data set, made from its own: a reward model should be less sure of these."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps

_TILES = 6


def unusual(picture: Image.Image, kind: str, rng: random.Random) -> Image.Image:
    """An RGB picture of the same size. Kinds: see `UNUSUAL`."""
    return UNUSUAL[kind](picture.convert("RGB"), rng)


def _noise(picture: Image.Image, rng: random.Random) -> Image.Image:
    """Each pixel at random."""
    shape = (picture.height, picture.width, 3)
    return Image.fromarray(np.random.default_rng(rng.getrandbits(64)).integers(0, 256, shape, dtype=np.uint8))


def _tiles(picture: Image.Image, rng: random.Random) -> Image.Image:
    """The picture cut into tiles that are put back at random, each turned: its parts, but nothing whole."""
    width, height = picture.width // _TILES, picture.height // _TILES
    places = [(x * width, y * height) for y in range(_TILES) for x in range(_TILES)]
    mixed = picture.copy()
    for (x, y), (to_x, to_y) in zip(places, rng.sample(places, len(places)), strict=True):
        tile = picture.crop((x, y, x + width, y + height))
        turned = tile.rotate(rng.choice((90, 180, 270)), expand=True).resize((width, height))
        mixed.paste(turned, (to_x, to_y))
    return mixed


def _negative(picture: Image.Image, rng: random.Random) -> Image.Image:
    """Light and dark exchanged, and the colours with them."""
    return ImageOps.invert(picture)


def _gradient(picture: Image.Image, rng: random.Random) -> Image.Image:
    """No object at all: one colour running into another."""
    ends = [np.array([rng.randrange(256) for _ in range(3)], dtype=np.float64) for _ in range(2)]
    share = np.linspace(0, 1, picture.width)[None, :, None] * np.ones((picture.height, 1, 1))
    image = Image.fromarray(((1 - share) * ends[0] + share * ends[1]).astype(np.uint8))
    return image.rotate(rng.choice((0, 90, 180, 270)), expand=True).resize(picture.size)


def _stripes(picture: Image.Image, rng: random.Random) -> Image.Image:
    """A coarse pattern in two colours."""
    colours = np.array([[rng.randrange(256) for _ in range(3)] for _ in range(2)], dtype=np.uint8)
    period = rng.randint(4, 12)
    y, x = np.mgrid[: picture.height, : picture.width]
    across = rng.choice((x, y, x + y, x // period + y // period))
    return Image.fromarray(colours[(across // period) % 2])


UNUSUAL: dict[str, Callable[[Image.Image, random.Random], Image.Image]] = {
    "noise": _noise,
    "tiles": _tiles,
    "negative": _negative,
    "gradient": _gradient,
    "stripes": _stripes,
}
