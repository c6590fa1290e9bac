"""Simulated annotators of EmojiScenes: how each reads a caption, which of two it prefers, and how it rates.

They stand for people who look at the picture, so they read captions against the scene graph of *training* pictures
(held-out ones in evaluation). A reward model learns from their choices and never sees a scene graph, as a model that
learns from people never sees their minds. Noise, bias and disagreement are settings of `Annotators`, stated with every
result; nothing here is human data.
"""

from __future__ import annotations

import dataclasses
import math
import random
import re
from dataclasses import dataclass
from functools import lru_cache

from mmft.data import scene_text
from mmft.data.scenes import Scene, SceneObject, sprites
from mmft.metrics.text import bad_ending

_NEGATIONS = {"no", "not", "without"}
_ARTICLES = {"a": 1, "an": 1, "some": None, "the": None}
_NUMBERS = {word: number for number, word in scene_text.NUMBERS.items()}
_PLACES = {
    "left": "left", "right": "right", "middle": "middle", "top": "top", "bottom": "bottom",
}  # fmt: skip
_GLUE = {"and", "on", "in", "at", "with", "next", "to", "above", "background", "picture", "is", "there", "of"}


@dataclass
class Mention:
    """One naming of an object: the number, size and place said of it (None = not said), and how it was said."""

    name: str
    count: int | None = None
    size: str | None = None
    place: str | None = None
    negated: bool = False
    bare: bool = False


@dataclass
class Reading:
    """What a careful reader takes from a caption. `above`: pairs of mentions (upper, lower); `loose`: words that hang
    in the air; `unknown`: words of another world.
    """

    mentions: list[Mention]
    colour: str | None
    above: list[tuple[Mention, Mention]]
    loose: int
    unknown: int


@lru_cache(maxsize=1)
def _names() -> dict[str, tuple[str, bool]]:
    """Word -> (object, whether it is a plural of something countable)."""
    words = {s.plural: (s.name, s.countable) for s in sprites()}
    words.update({s.name: (s.name, not s.countable) for s in sprites()})
    return words


def read(caption: str) -> Reading:
    """Reads a caption of the scenes' language; what it cannot place is counted as loose or unknown, never dropped."""
    words = re.findall(r"[a-z]+", caption.lower())
    names, reading = _names(), Reading([], None, [], 0, 0)
    pending = Mention("")  # what has been said of the next noun
    open_article = relation = False
    for i, word in enumerate(words):
        following = words[i + 1] if i + 1 < len(words) else ""
        if word in names:
            name, plural = names[word]
            bare = not open_article and not (plural and pending.count)
            mention = dataclasses.replace(pending, name=name, bare=bare)
            if relation and reading.mentions:
                reading.above.append((reading.mentions[-1], mention))
            reading.mentions.append(mention)
            pending, open_article, relation = Mention(""), False, False
        elif word in scene_text.COLOURS and following in ("background", "picture"):
            reading.colour = reading.colour or word
            reading.loose += not open_article
            pending, open_article = Mention(""), False  # what was said was said of the background
        elif word in _NEGATIONS:
            pending.negated, open_article = True, True
        elif word in _ARTICLES or word in _NUMBERS:
            reading.loose += open_article and not pending.negated and word != "the"
            pending.count = _NUMBERS.get(word, _ARTICLES.get(word))
            open_article = word != "the"
        elif word in scene_text.SIZES:
            pending.size = word
            reading.loose += not open_article
        elif word in _PLACES:
            if reading.mentions:
                last = reading.mentions[-1]
                last.place = f"{last.place} {word}" if last.place in ("top", "bottom") else word
        elif word == "above":
            relation = True
        elif word not in _GLUE:
            reading.unknown += 1
    reading.loose += open_article
    return reading


@dataclass(frozen=True)
class Taste:
    """What an annotator's utility is made of; costs are positive numbers that are subtracted."""

    recall: float = 3.0
    count_right: float = 0.25
    size_right: float = 0.1
    place_right: float = 0.15
    colour_right: float = 0.2
    wrong_object: float = 1.5
    wrong_count: float = 1.0
    wrong_size: float = 0.6
    wrong_place: float = 0.8
    wrong_colour: float = 0.8
    repeat: float = 1.5  # named twice, one thing is said to be two
    bare: float = 0.5
    loose: float = 0.4
    unknown: float = 0.5
    bad_ending: float = 1.0
    per_word: float = 0.0  # a liking for length as such: a bias

    def utility(self, caption: str, scene: Scene) -> float:
        """How much this annotator likes a caption of a picture."""
        reading = read(caption)
        there = {obj.name: obj for obj in scene.objects}
        affirmed = [m for m in reading.mentions if not m.negated]
        first: dict[str, Mention] = {}
        for mention in affirmed:
            first.setdefault(mention.name, mention)
        right = [(m, there[name]) for name, m in first.items() if name in there]
        value = self.recall * len(right) / len(there)
        value += math.fsum(self._attributes(m, obj) for m, obj in right) / len(there)
        value -= self.wrong_object * sum(name not in there for name in first)
        value -= self.wrong_object * sum(m.negated and m.name in there for m in reading.mentions)
        value -= math.fsum(self._faults(m, obj) for m, obj in right)
        value -= self.wrong_place * sum(_is_not_above(upper, lower, there) for upper, lower in reading.above)
        value -= self.repeat * (len(affirmed) - len(first))
        value -= self.bare * min(4, sum(m.bare for m in reading.mentions)) + self.loose * min(4, reading.loose)
        value -= self.unknown * min(4, reading.unknown) + self.bad_ending * bad_ending(caption)
        if reading.colour is not None:
            value += self.colour_right if reading.colour == scene.background else -self.wrong_colour
        return value + self.per_word * len(caption.split())

    def _attributes(self, mention: Mention, obj: SceneObject) -> float:
        return (
            self.count_right * (mention.count == obj.count)
            + self.size_right * (mention.size == obj.size)
            + self.place_right * (mention.place == obj.place)
        )

    def _faults(self, mention: Mention, obj: SceneObject) -> float:
        """What is said and wrong. A bare plural of one thing says no number, and "some" says none either."""
        return (
            self.wrong_count * (mention.count not in (None, obj.count) and obj.sprite.countable)
            + self.wrong_size * (mention.size not in (None, obj.size))
            + self.wrong_place * (mention.place not in (None, obj.place))
        )


def _is_not_above(upper: Mention, lower: Mention, there: dict[str, SceneObject]) -> bool:
    if upper.name not in there or lower.name not in there:
        return False  # the wrong object has been paid for
    return not (there[upper.name].place.startswith("top") and there[lower.name].place.startswith("bottom"))


@dataclass(frozen=True)
class Annotators:
    """A pool of simulated annotators.

    count: how many. spread: standard deviation of the logarithm of each annotator's weights, so tastes differ.
    noise: standard deviation of what is added to a utility at each judgement, in units of utility (an object named
    of three is worth 1). length_bias: what a word is worth to them as such, whether it says something or not.
    """

    count: int = 5
    spread: float = 0.2
    noise: float = 0.45
    length_bias: float = 0.0
    seed: int = 0

    def tastes(self) -> tuple[Taste, ...]:
        rng, base = random.Random(f"annotators/{self.seed}"), Taste()
        weights = [field.name for field in dataclasses.fields(Taste) if field.name != "per_word"]
        return tuple(
            Taste(
                **{name: getattr(base, name) * math.exp(rng.gauss(0, self.spread)) for name in weights},
                per_word=self.length_bias,
            )
            for _ in range(self.count)
        )

    def prefers_first(self, taste: Taste, first: str, second: str, scene: Scene, rng: random.Random) -> float:
        """Noisy utility of `first` less that of `second`; its sign is the choice."""
        difference = taste.utility(first, scene) - taste.utility(second, scene)
        return difference + rng.gauss(0, self.noise * math.sqrt(2))

    def rating(self, taste: Taste, caption: str, scene: Scene, rng: random.Random) -> float:
        """A rating, 0 for a caption with nothing right or wrong and about 10 for a perfect one; not cut at either
        end. Pictures with more in them are rated less surely: the noise grows with the kinds of object.
        """
        noise = self.noise * (0.5 + 0.3 * len(scene.objects))
        return RATING_SCALE * (taste.utility(caption, scene) + rng.gauss(0, noise))


RATING_SCALE = 3.0
