"""Preferences and ratings of EmojiScenes by the simulated annotators of `mmft.data.annotators`."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from mmft.config import SimulatedJudgements
from mmft.data import scene_text
from mmft.data.annotators import Annotators
from mmft.data.candidates import ADVERSARIAL, KINDS, candidate, minimal_pair
from mmft.data.scenes import Scene, Split, make_scene, render
from mmft.rewards.judgements import Picture, Preference, Rating

_OTHERS = tuple(kind for kind in KINDS if kind not in ("true", "partial"))
_Said = tuple[str, str]  # kind, caption


def annotators(config: SimulatedJudgements) -> Annotators:
    return Annotators(**config.annotators.model_dump())


@dataclass(frozen=True)
class _Judged:
    """A scene with its encoded picture, references, and candidates; minimal: a caption, and the same with one fault."""

    scene: Scene
    picture: Picture
    references: tuple[str, ...]
    candidates: list[_Said]
    minimal: tuple[_Said, _Said] | None
    rng: random.Random

    def pairs(self, count: int) -> list[tuple[_Said, _Said]]:
        """At most `count`; the minimal pair is one of them where there is more than one."""
        found = [self.minimal] if self.minimal and count > 1 else []
        rest = [(one, other) for i, one in enumerate(self.candidates) for other in self.candidates[:i]]
        return found + self.rng.sample(rest, min(count - len(found), len(rest)))

    def about(self, *captions: str) -> tuple[str, ...]:
        """The references, without the one that each of what is judged is nearest to.

        A caption must not be compared with itself; and if only exact copies went, a true caption would lose its twin
        and a false one keep the reference it was made from.
        """
        nearest = {max(self.references, key=lambda reference: _overlap(caption, reference)) for caption in captions}
        return tuple(reference for reference in self.references if reference not in nearest)


def _overlap(caption: str, reference: str) -> float:
    """F1 of the words and word pairs of two texts."""
    one, other = _grams(caption), _grams(reference)
    return 2 * sum((one & other).values()) / (sum(one.values()) + sum(other.values()))


@lru_cache(maxsize=65536)
def _grams(text: str) -> Counter[str]:
    words = text.replace(",", " ,").split()
    return Counter(words) + Counter(f"{a} {b}" for a, b in pairwise(words))


def preferences(config: SimulatedJudgements, split: Split, pictures: int) -> list[Preference]:
    """`config.pairs` choices for each of `pictures` scenes; `kind` tells how the rejected caption was made.

    One of them is a minimal pair. One annotator, drawn at random, makes each choice.
    """
    pool = annotators(config)
    tastes = pool.tastes()
    found = []
    for judged in _judged(config, split, pictures):
        for one, other in judged.pairs(config.pairs):
            who = judged.rng.randrange(len(tastes))
            difference = pool.prefers_first(tastes[who], one[1], other[1], judged.scene, judged.rng)
            (_, chosen), (kind, rejected) = (one, other) if difference > 0 else (other, one)
            found.append(
                Preference(
                    picture=judged.picture, prompt=config.prompt, chosen=chosen, rejected=rejected, kind=kind,
                    references=judged.about(chosen, rejected), annotator=f"simulated-{who}", tie=difference == 0,
                )
            )  # fmt: skip
    return found


def ratings(config: SimulatedJudgements, split: Split, pictures: int) -> list[Rating]:
    """A rating of every candidate and both captions of the minimal pair of `pictures` scenes, each by one annotator
    drawn at random.
    """
    pool = annotators(config)
    tastes = pool.tastes()
    found = []
    for judged in _judged(config, split, pictures):
        said = {caption: kind for kind, caption in (*(judged.minimal or ()), *judged.candidates)}
        for caption, kind in said.items():
            who = judged.rng.randrange(len(tastes))
            rating = pool.rating(tastes[who], caption, judged.scene, judged.rng)
            found.append(
                Rating(
                    picture=judged.picture, prompt=config.prompt, caption=caption, rating=rating, kind=kind,
                    references=judged.about(caption), annotator=f"simulated-{who}",
                )
            )  # fmt: skip
    return found


def agreement(config: SimulatedJudgements, split: Split, pictures: int) -> list[tuple[str, float]]:
    """(picture, 1 or 0) for each pair of `preferences`: whether two different annotators choose alike; none where
    there is one annotator.
    """
    pool = annotators(config)
    tastes = pool.tastes()
    if len(tastes) < 2:
        return []
    found = []
    for judged in _judged(config, split, pictures):
        for (_, one), (_, other) in judged.pairs(config.pairs):
            votes = [
                pool.prefers_first(taste, one, other, judged.scene, judged.rng) > 0
                for taste in judged.rng.sample(tastes, 2)
            ]
            found.append((judged.picture.key, float(votes[0] == votes[1])))
    return found


def adversarial(config: SimulatedJudgements, split: Split, pictures: int) -> list[Preference]:
    """For each of `pictures` scenes the full, true caption against one caption of every adversarial kind.

    No annotator is asked: the second is false, or no caption. Kinds that a scene does not allow are left out.
    """
    found = []
    for index in range(pictures):
        scene = make_scene(index, split, config.seed)
        rng = random.Random(f"adversarial/{scene.id}")
        references = tuple(scene_text.references(scene, random.Random(f"references/{scene.id}")))
        picture, chosen = Picture.of(render(scene)), scene_text.full(scene, scene.objects)
        for kind in ADVERSARIAL:
            rejected = candidate(kind, scene, rng, complete=True)
            if rejected and rejected not in references:
                others = _Judged(scene, picture, references, [], None, rng).about(chosen, rejected)
                found.append(
                    Preference(
                        picture=picture, prompt=config.prompt, chosen=chosen, rejected=rejected, kind=kind,
                        references=others, annotator="truth",
                    )
                )  # fmt: skip
    return found


def _judged(config: SimulatedJudgements, split: Split, pictures: int) -> Iterator[_Judged]:
    for index in range(pictures):
        scene = make_scene(index, split, config.seed)
        rng = random.Random(f"judgements/{config.seed}/{scene.id}")
        kinds = ["true", "partial", *rng.sample(_OTHERS, min(config.candidates - 2, len(_OTHERS)))]
        captions: dict[str, str] = {}  # caption -> kind; two kinds may come out as the same words
        for kind in kinds:
            caption = candidate(kind, scene, rng)
            if caption:
                captions.setdefault(caption, kind)
        if len(captions) < 2:  # "partial" may say what "true" said, and nothing else be possible
            captions.setdefault("a picture", "generic")
        references = tuple(scene_text.references(scene, random.Random(f"references/{scene.id}")))
        candidates = [(kind, caption) for caption, kind in captions.items()]
        pair = minimal_pair(scene, rng)
        minimal = None
        if pair and pair[0] != pair[1]:
            minimal = ("partial", pair[0]), (pair[2], pair[1])
        yield _Judged(scene, Picture.of(render(scene)), references, candidates, minimal, rng)
