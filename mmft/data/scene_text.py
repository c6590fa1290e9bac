"""The language of EmojiScenes: reference captions, the terse and noisy captions of pretraining, questions, and a
parser.

References are what careful people would write, from a full account to a short one. `noisy_caption` is what the tiny
VLM was taught: right when it speaks, but it leaves objects out, so reinforcement learning has something to find.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmft.data.scenes import Scene, SceneObject, Sprite

NUMBERS = {1: "one", 2: "two", 3: "three"}
SIZES = ("small", "big")
COLOURS = ("white", "yellow", "green", "blue", "pink", "grey", "orange", "purple")


@dataclass(frozen=True)
class Claim:
    """What a caption says of one kind of object; None = not said."""

    count: int | None
    size: str | None


def noun_phrase(obj: SceneObject, size: bool = True) -> str:
    """ "two apples", "a big owl", "some grapes"."""
    if not obj.sprite.countable:
        return noun_phrase_of(obj.sprite)
    if obj.count > 1:
        return f"{NUMBERS[obj.count]} {obj.sprite.plural}"
    return article(f"{obj.size} {obj.name}" if size and obj.size in SIZES else obj.name)


def article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def noun_phrase_of(sprite: Sprite) -> str:
    return article(sprite.name) if sprite.countable else f"some {sprite.name}"


def join(phrases: Sequence[str]) -> str:
    """ "a, b and c"."""
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def full(scene: Scene, objects: Sequence[SceneObject], size: bool = True) -> str:
    return f"{join([noun_phrase(o, size) for o in objects])} on {article(scene.background)} background"


def placed(scene: Scene, objects: Sequence[SceneObject], size: bool = True) -> str:
    where = {"left": "on the left", "right": "on the right", "middle": "in the middle"}
    return join([f"{noun_phrase(o, size)} {where.get(o.place, f'at the {o.place}')}" for o in objects])


def related(scene: Scene, objects: Sequence[SceneObject], size: bool = True) -> str:
    if len(objects) == 1:
        return f"{article(scene.background)} picture with {noun_phrase(objects[0], size)}"
    first, second, *rest = objects
    word = "above" if first.place.split()[0] == "top" and second.place.split()[0] == "bottom" else "next to"
    tail = f", with {join([noun_phrase(o, size) for o in rest])}" if rest else ""
    return f"{noun_phrase(first, size)} {word} {noun_phrase(second, size)}{tail}"


def plain(scene: Scene, objects: Sequence[SceneObject], size: bool = True) -> str:
    return join([noun_phrase(o, size) for o in objects])


def references(scene: Scene, rng: random.Random) -> list[str]:
    """Five captions of one scene: full, placed, related, plain, and a terse one that names only some of the objects."""
    objects = scene.objects
    kept = rng.randint(1, max(1, len(objects) - 1))
    some = [objects[i] for i in sorted(rng.sample(range(len(objects)), kept))]
    return [
        full(scene, objects),
        placed(scene, objects),
        related(scene, objects),
        plain(scene, objects, size=False),
        plain(scene, some, size=False),
    ]


def noisy_caption(scene: Scene, rng: random.Random) -> str:
    """What the tiny VLM was taught to say: seldom wrong, often short, sometimes careless.

    Three captions in ten name every object; the others leave one or more out. In a hundred, 5 lose a number, 3 repeat
    themselves and 3 break off.
    """
    objects = list(scene.objects)
    total = len(objects)
    missing = rng.choices((0, 1, 2, 3), weights=(30, 45, 20, 5))[0]
    kept = max(1, total - missing)
    some = [objects[i] for i in sorted(rng.sample(range(total), kept))]
    style = rng.choices((plain, full, related, placed), weights=(45, 30, 15, 10))[0]
    if rng.random() < 0.15:
        rng.shuffle(some)
    caption = style(scene, some, size=rng.random() < 0.5)
    accident = rng.random()
    if accident < 0.05:
        words = [w for w in caption.split() if w not in ("two", "three")]
        caption = " ".join(words)
    elif accident < 0.08:
        caption = f"{caption} and {noun_phrase(some[-1], size=False)}"
    elif accident < 0.11:
        words = caption.split()
        caption = " ".join(words[: rng.randint(max(2, len(words) // 2), len(words))]) + rng.choice(
            (" and a", " and", " on a")
        )
    return caption


def question(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """One question about the scene and its short answer: how many, what colour, where, is there."""
    from mmft.data.scenes import sprites

    obj = rng.choice(scene.objects)
    kind = rng.choice(("count", "colour", "place", "there"))
    if kind == "count" and obj.sprite.countable:
        return f"How many {obj.sprite.plural} are there?", NUMBERS[obj.count]
    if kind == "colour":
        return "What colour is the background?", scene.background
    if kind == "place" and len(scene.objects) > 1:
        return f"What is at the {obj.place}?", obj.name
    if rng.random() < 0.5:
        return f"Is there {noun_phrase_of(obj.sprite)}?", "yes"
    absent = rng.choice([s for s in sprites() if s.name not in scene.names])
    return f"Is there {noun_phrase_of(absent)}?", "no"


@lru_cache(maxsize=1)
def _lexicon() -> dict[str, tuple[str, bool]]:
    """Word -> (object name, whether the word is a bare plural)."""
    from mmft.data.scenes import sprites

    words = {s.plural: (s.name, s.countable) for s in sprites()}
    words.update({s.name: (s.name, False) for s in sprites()})
    return words


def parse(caption: str) -> tuple[dict[str, Claim], str | None]:
    """Reads a caption back: object name -> what is claimed (first mention wins), and the background colour or None.

    A number or size belongs to the next noun; "a" and "an" say one; a bare plural says no number. A colour is the
    background's when "background" or "picture" follows it.
    """
    words = re.findall(r"[a-z]+", caption.lower())
    lexicon, numbers = _lexicon(), {word: n for n, word in NUMBERS.items()} | {"a": 1, "an": 1}
    claims: dict[str, Claim] = {}
    count = size = colour = None
    for i, word in enumerate(words):
        if word in numbers:
            count, size = numbers[word], None
        elif word in SIZES:
            size = word
        elif word in COLOURS and i + 1 < len(words) and words[i + 1] in ("background", "picture"):
            colour = colour or word
        else:
            if word in lexicon:
                claims.setdefault(lexicon[word][0], Claim(count, size))
            count = size = None
    return claims, colour
