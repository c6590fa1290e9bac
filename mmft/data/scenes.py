"""EmojiScenes: pictures composed from emoji sprites, with captions, questions and an exact scene graph.

A scene holds one to four kinds of object, each with a count, a size and a place, on one of eight backgrounds. It is a
pure function of (seed, split, index): infinite, deterministic, composed on the fly. Training and held-out scenes
share no combination of objects: a hash of the *set of names* decides the split, so a held-out picture can't be
answered from memory.

The scene graph is the oracle (`score_caption`): it is for evaluation only and never part of a reward.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from PIL import Image

from mmft.data import scene_text
from mmft.types import Row

SPRITES = Path(__file__).parent.parent / "assets" / "sprites"
SIDE = 96  # pixels; the tiny VLM's picture size
CELL, COLUMNS = 64, 10  # the sprite sheet's
HELD_OUT_TENTHS = 2  # of ten combinations, how many are held out
Split = Literal["train", "heldout"]

BACKGROUNDS = {
    "white": (250, 250, 248), "yellow": (255, 240, 160), "green": (190, 232, 180), "blue": (180, 212, 250),
    "pink": (252, 204, 222), "grey": (196, 198, 202), "orange": (253, 208, 150), "purple": (214, 194, 244),
}  # fmt: skip
PIXELS = {"small": 22, "medium": 33, "big": 45}
GROUP_PIXELS = {1: 33, 2: 26, 3: 24}  # the side of each of several equal objects

# Regions as fractions of the picture: (left, top, right, bottom).
QUADRANTS = {
    "top left": (0.0, 0.0, 0.5, 0.5), "top right": (0.5, 0.0, 1.0, 0.5),
    "bottom left": (0.0, 0.5, 0.5, 1.0), "bottom right": (0.5, 0.5, 1.0, 1.0),
}  # fmt: skip
PAIRS = (
    {"left": (0.0, 0.0, 0.5, 1.0), "right": (0.5, 0.0, 1.0, 1.0)},
    {"top": (0.0, 0.0, 1.0, 0.5), "bottom": (0.0, 0.5, 1.0, 1.0)},
)
MIDDLE = {"middle": (0.1, 0.1, 0.9, 0.9)}


@dataclass(frozen=True)
class Sprite:
    """A drawable object: its one-word name, plural, whether it can be counted, and its cell in the sheet."""

    name: str
    plural: str
    countable: bool
    cell: int


@dataclass(frozen=True)
class SceneObject:
    """Some equal objects: `boxes` are (left, top, side) in pixels, one an instance, so `count == len(boxes)`."""

    sprite: Sprite
    size: str
    place: str
    boxes: tuple[tuple[int, int, int], ...]

    @property
    def name(self) -> str:
        return self.sprite.name

    @property
    def count(self) -> int:
        return len(self.boxes)


@dataclass(frozen=True)
class Scene:
    """The exact content of a picture, objects in reading order."""

    id: str
    background: str
    objects: tuple[SceneObject, ...]

    @property
    def names(self) -> frozenset[str]:
        return frozenset(obj.name for obj in self.objects)


@lru_cache(maxsize=1)
def sprites() -> tuple[Sprite, ...]:
    """The bundled sprites, in the order of the sheet."""
    entries = json.loads((SPRITES / "sprites.json").read_text(encoding="utf-8"))
    return tuple(Sprite(e["name"], e["plural"], e["countable"], i) for i, e in enumerate(entries))


def split_of(names: frozenset[str]) -> Split:
    """Which split a combination of object names belongs to; the order of names does not matter."""
    digest = hashlib.sha256(",".join(sorted(names)).encode()).digest()
    return "heldout" if digest[0] % 10 < HELD_OUT_TENTHS else "train"


def make_scene(index: int, split: Split = "train", seed: int = 0) -> Scene:
    """The `index`-th scene of a split. Raises ValueError for a split that does not exist."""
    if split not in ("train", "heldout"):
        raise ValueError(f"split must be train or heldout, not {split!r}")
    rng = random.Random(f"emoji-scenes/{seed}/{split}/{index}")
    kinds = rng.choices((1, 2, 3, 4), weights=(2, 3, 3, 2))[0]
    while True:
        chosen = rng.sample(sprites(), kinds)
        if split_of(frozenset(sprite.name for sprite in chosen)) == split:
            break
    regions = _regions(kinds, rng)
    spare = 2 if kinds > 2 else 4  # how many instances there may be beyond one of each kind
    objects = []
    for sprite, (place, region) in zip(chosen, regions.items(), strict=True):
        count = rng.choices((1, 2, 3), weights=(6, 3, 2 if kinds < 3 else 0))[0] if sprite.countable else 1
        count = min(count, 1 + spare)
        spare -= count - 1
        size = rng.choice(("small", "medium", "medium", "big")) if count == 1 else "medium"
        objects.append(SceneObject(sprite, size, place, _boxes(region, count, size, rng)))
    return Scene(f"{split}-{seed}-{index}", rng.choice(tuple(BACKGROUNDS)), tuple(objects))


def _regions(kinds: int, rng: random.Random) -> dict[str, tuple[float, float, float, float]]:
    if kinds == 1:
        return MIDDLE
    if kinds == 2:
        return rng.choice(PAIRS)
    keep = sorted(rng.sample(range(4), kinds))
    places = list(QUADRANTS)
    return {places[i]: QUADRANTS[places[i]] for i in keep}


def _boxes(
    region: tuple[float, float, float, float], count: int, size: str, rng: random.Random
) -> tuple[tuple[int, int, int], ...]:
    """Places `count` squares side by side along the region's longer side, each jittered within its own share."""
    side = round((PIXELS[size] if count == 1 else GROUP_PIXELS[count]) * rng.uniform(0.95, 1.05))
    left, top, right, bottom = (v * SIDE for v in region)
    wide = (right - left) >= (bottom - top)
    boxes = []
    for i in range(count):
        share = ((right - left) if wide else (bottom - top)) / count
        x0, x1 = (left + i * share, left + (i + 1) * share) if wide else (left, right)
        y0, y1 = (top, bottom) if wide else (top + i * share, top + (i + 1) * share)
        x = (x0 + x1 - side) / 2 + rng.uniform(-1, 1) * max(0.0, (x1 - x0 - side) / 3)
        y = (y0 + y1 - side) / 2 + rng.uniform(-1, 1) * max(0.0, (y1 - y0 - side) / 3)
        boxes.append((min(max(round(x), 0), SIDE - side), min(max(round(y), 0), SIDE - side), side))
    return tuple(boxes)


@lru_cache(maxsize=1)
def _sheet() -> Image.Image:
    with Image.open(SPRITES / "atlas.png") as sheet:
        return sheet.convert("RGBA")


@lru_cache(maxsize=1024)
def _sprite(cell: int, side: int) -> Image.Image:
    x, y = cell % COLUMNS * CELL, cell // COLUMNS * CELL
    return _sheet().crop((x, y, x + CELL, y + CELL)).resize((side, side), Image.Resampling.LANCZOS)


def render(scene: Scene) -> Image.Image:
    """The scene as an RGB picture, SIDE x SIDE."""
    picture = Image.new("RGB", (SIDE, SIDE), BACKGROUNDS[scene.background])
    for obj in scene.objects:
        for x, y, side in obj.boxes:
            sprite = _sprite(obj.sprite.cell, side)
            picture.paste(sprite, (x, y), sprite)
    return picture


class EmojiScenes:
    """A map-style data set of scenes: `len()`, and `[i] -> Row` with picture, references, one question and the
    oracle.
    """

    def __init__(self, size: int, split: Split = "train", seed: int = 0, prompt: str = "Describe the picture."):
        self.size, self.split, self.seed, self.prompt = size, split, seed, prompt

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < self.size:
            raise IndexError(f"scene {index} of {self.size}")
        return self._row(index, picture=True)

    def rows_without_pictures(self, limit: int | None = None) -> Iterator[Row]:
        """The first rows with `image=None`: what fitting a reward's statistics or checking its references needs."""
        return (self._row(i, picture=False) for i in range(min(self.size, limit or self.size)))

    def _row(self, index: int, picture: bool) -> Row:
        scene = make_scene(index, self.split, self.seed)
        question, answer = scene_text.question(scene, random.Random(f"question/{scene.id}"))
        references = tuple(scene_text.references(scene, random.Random(f"references/{scene.id}")))
        return Row(scene.id, render(scene) if picture else None, self.prompt, references, question, answer, scene)


def score_caption(caption: str, scene: Scene) -> dict[str, float]:
    """What the oracle says of a caption: shares in [0, 1], NaN where nothing was claimed.

    object_precision: of the distinct objects named, the share that is there (NaN when none is named).
    object_recall: of the objects there, the share that is named.
    hallucination: of the distinct objects named, the share that is not there (0 when none is named).
    count_accuracy: of the right objects given with a number, the share with the right number.
    attribute_accuracy: of the sizes of right objects and background colours stated, the share that is right.
    """
    claims, colour = scene_text.parse(caption)
    there = {obj.name: obj for obj in scene.objects}
    right = [name for name in claims if name in there]
    counts = [claims[n].count == there[n].count for n in right if claims[n].count is not None]
    attributes = [claims[n].size == there[n].size for n in right if claims[n].size is not None]
    attributes += [colour == scene.background] if colour is not None else []
    precision = len(right) / len(claims) if claims else float("nan")
    return {
        "object_precision": precision,
        "object_recall": len(right) / len(there),
        "hallucination": 1 - precision if claims else 0.0,
        "count_accuracy": sum(counts) / len(counts) if counts else float("nan"),
        "attribute_accuracy": sum(attributes) / len(attributes) if attributes else float("nan"),
    }
