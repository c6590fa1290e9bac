"""Candidates for annotators to choose between: captions of a scene, right or wrong in a known way."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence

from mmft.data import scene_text
from mmft.data.scenes import BACKGROUNDS, Scene, SceneObject, sprites
from mmft.metrics.text import bad_ending

_STYLES = (scene_text.full, scene_text.placed, scene_text.related, scene_text.plain)
Pick = Callable[[Scene, random.Random], list[SceneObject]]  # which objects a caption names


def candidate(kind: str, scene: Scene, rng: random.Random, complete: bool = False) -> str | None:
    """A caption of a kind, or None where the scene does not allow it (one object has no roles to swap).

    complete: the fault is all that is wrong; otherwise objects may be missing as well.
    """
    return _KINDS[kind](scene, rng, _all if complete else _some_of)


def true_caption(scene: Scene, rng: random.Random, pick: Pick | None = None) -> str:
    """All objects, in one of the four complete styles."""
    return _styled(scene, scene.objects, rng)


def _some(scene: Scene, rng: random.Random, pick: Pick) -> str:
    return scene_text.noisy_caption(scene, rng)


def _styled(scene: Scene, objects: Sequence[SceneObject], rng: random.Random, sized: bool = False) -> str:
    """In one of the complete styles, half of the time without the sizes unless they are wanted."""
    return rng.choice(_STYLES)(scene, objects, size=sized or rng.random() < 0.5)


def _all(scene: Scene, rng: random.Random) -> list[SceneObject]:
    return list(scene.objects)


def _some_of(scene: Scene, rng: random.Random) -> list[SceneObject]:
    """All of the objects half of the time, else some of them: a fault must cost wherever it stands."""
    objects = list(scene.objects)
    if len(objects) > 1 and rng.random() < 0.5:
        objects = [objects[i] for i in sorted(rng.sample(range(len(objects)), rng.randint(1, len(objects) - 1)))]
    return objects


def _absent(scene: Scene, rng: random.Random) -> SceneObject:
    sprite = rng.choice([s for s in sprites() if s.name not in scene.names])
    count = rng.choice((1, 1, 2)) if sprite.countable else 1
    place = rng.choice(scene.objects).place
    return SceneObject(sprite, "medium", place, ((0, 0, 1),) * count)


# Faults of single objects: a list of objects -> the list with one fault, or None where there is nothing to get wrong.


def _with_wrong_noun(scene: Scene, objects: list[SceneObject], rng: random.Random) -> list[SceneObject]:
    at = rng.randrange(len(objects))
    wrong = dataclasses.replace(_absent(scene, rng), place=objects[at].place)
    return [*objects[:at], wrong, *objects[at + 1 :]]


def _with_added_noun(scene: Scene, objects: list[SceneObject], rng: random.Random) -> list[SceneObject]:
    at = rng.randint(0, len(objects))
    return [*objects[:at], _absent(scene, rng), *objects[at:]]


def _with_wrong_count(scene: Scene, objects: list[SceneObject], rng: random.Random) -> list[SceneObject] | None:
    countable = [i for i, obj in enumerate(objects) if obj.sprite.countable]
    if not countable:
        return None
    at = rng.choice(countable)
    count = rng.choice([n for n in (1, 2, 3) if n != objects[at].count])
    wrong = dataclasses.replace(objects[at], boxes=((0, 0, 1),) * count)
    return [*objects[:at], wrong, *objects[at + 1 :]]


def _with_wrong_size(scene: Scene, objects: list[SceneObject], rng: random.Random) -> list[SceneObject] | None:
    sized = [i for i, obj in enumerate(objects) if obj.count == 1 and obj.sprite.countable]
    if not sized:
        return None
    at = rng.choice(sized)
    size = rng.choice([s for s in scene_text.SIZES if s != objects[at].size])
    return [*objects[:at], dataclasses.replace(objects[at], size=size), *objects[at + 1 :]]


def _with_repeat(scene: Scene, objects: list[SceneObject], rng: random.Random) -> list[SceneObject]:
    """An object named twice, often as if it were another one, by its size."""
    twice = rng.choice(objects)
    if twice.count == 1 and rng.random() < 0.5:
        twice = dataclasses.replace(twice, size=rng.choice(("small", "medium", "big")))
    at = rng.randint(0, len(objects))
    return [*objects[:at], twice, *objects[at:]]


_Fault = Callable[[Scene, list[SceneObject], random.Random], "list[SceneObject] | None"]
_FAULTS: dict[str, _Fault] = {
    "wrong_noun": _with_wrong_noun,
    "added_noun": _with_added_noun,
    "wrong_count": _with_wrong_count,
    "wrong_size": _with_wrong_size,
    "repeated_object": _with_repeat,
}
# Naming one thing twice, for want of another, is what policies learn first where it pays.
_OFTEN = {"repeated_object": 3}


def minimal_pair(scene: Scene, rng: random.Random) -> tuple[str, str, str] | None:
    """(caption, the same caption with one fault, the fault's kind), or None where the scene does not allow the kind.

    Pairs of candidates differ in many ways at once, and a reward model may learn from them that more is better. Here
    the fault alone decides.
    """
    (kind,) = rng.choices(tuple(_FAULTS), weights=[_OFTEN.get(name, 1) for name in _FAULTS])
    objects = _some_of(scene, rng)
    faulty = _FAULTS[kind](scene, objects, rng)
    if faulty is None:
        return None
    style, size = rng.choice(_STYLES), kind == "wrong_size" or rng.random() < 0.5
    return style(scene, objects, size), style(scene, faulty, size), kind


def _fault_of(kind: str) -> Callable[[Scene, random.Random, Pick], str | None]:
    """The candidate that has a fault of `_FAULTS` in an otherwise true, perhaps incomplete caption."""

    def faulty(scene: Scene, rng: random.Random, pick: Pick) -> str | None:
        objects = _FAULTS[kind](scene, pick(scene, rng), rng)
        return None if objects is None else _styled(scene, objects, rng, sized=kind == "wrong_size")

    return faulty


def _wrong_colour(scene: Scene, rng: random.Random, pick: Pick) -> str:
    colour = rng.choice([c for c in BACKGROUNDS if c != scene.background])
    return scene_text.full(dataclasses.replace(scene, background=colour), pick(scene, rng), size=rng.random() < 0.5)


def _swapped_roles(scene: Scene, rng: random.Random, pick: Pick) -> str | None:
    """Two things exchange their places; "next to" reads the same from both sides, so there it would be no fault."""
    objects = list(scene.objects)
    if len(objects) < 2:
        return None
    if rng.random() < 0.5 and objects[0].place.startswith("top") and objects[1].place.startswith("bottom"):
        upper, lower = (scene_text.noun_phrase(obj, size=False) for obj in objects[:2])
        return f"{lower} above {upper}"
    one, other = rng.sample(range(len(objects)), 2)
    places = objects[one].place, objects[other].place
    objects[one], objects[other] = (
        dataclasses.replace(objects[one], place=places[1]),
        dataclasses.replace(objects[other], place=places[0]),
    )
    return scene_text.placed(scene, objects, size=rng.random() < 0.5)


def _negation(scene: Scene, rng: random.Random, pick: Pick) -> str:
    objects = list(scene.objects)
    at = rng.randrange(len(objects))
    phrases = [scene_text.noun_phrase(obj, size=False) for obj in objects]
    sprite = objects[at].sprite
    phrases[at] = f"no {sprite.plural if sprite.countable and rng.random() < 0.7 else sprite.name}"
    tail = f" on {scene_text.article(scene.background)} background" if rng.random() < 0.5 else ""
    return scene_text.join(phrases) + tail


def _repeated(scene: Scene, rng: random.Random, pick: Pick) -> str:
    caption = _styled(scene, pick(scene, rng), rng)
    return caption + rng.choice((" ", " and ", ", ")) + caption


def _noun_list(scene: Scene, rng: random.Random, pick: Pick) -> str:
    names = [obj.name for obj in scene.objects]
    return rng.choice((" ", ", ")).join([*names, "background"] if rng.random() < 0.3 else names)


def _truncated(scene: Scene, rng: random.Random, pick: Pick) -> str:
    words = true_caption(scene, rng).split()
    cut = " ".join(words[: rng.randint(max(1, len(words) // 2), max(1, len(words) - 1))]).rstrip(",")
    return cut if bad_ending(cut) else cut + rng.choice((" and a", " and", " on a", " with"))


def _shuffled(scene: Scene, rng: random.Random, pick: Pick) -> str:
    words = true_caption(scene, rng).replace(",", "").split()
    rng.shuffle(words)
    return " ".join(words)


def _generic(scene: Scene, rng: random.Random, pick: Pick) -> str:
    return rng.choice(("a picture", "a picture of some things", "there is something on a background", "some things"))


def _other_picture(scene: Scene, rng: random.Random, pick: Pick) -> str:
    chosen = rng.sample([s for s in sprites() if s.name not in scene.names], len(scene.objects))
    objects = [dataclasses.replace(obj, sprite=sprite) for obj, sprite in zip(scene.objects, chosen, strict=True)]
    return _styled(dataclasses.replace(scene, background=rng.choice(tuple(BACKGROUNDS))), objects, rng)


_KINDS = {
    "true": true_caption,
    "partial": _some,
    "wrong_noun": _fault_of("wrong_noun"),
    "added_noun": _fault_of("added_noun"),
    "wrong_count": _fault_of("wrong_count"),
    "wrong_size": _fault_of("wrong_size"),
    "wrong_colour": _wrong_colour,
    "swapped_roles": _swapped_roles,
    "negation": _negation,
    "repeated": _repeated,
    "repeated_object": _fault_of("repeated_object"),
    "noun_list": _noun_list,
    "truncated": _truncated,
    "shuffled": _shuffled,
    "generic": _generic,
    "other_picture": _other_picture,
}
KINDS = tuple(_KINDS)
ADVERSARIAL = ("negation", "swapped_roles", "wrong_colour", "wrong_count", "repeated", "noun_list", "truncated")
