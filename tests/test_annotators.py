"""Simulated annotators: how they read, what a caption is worth to them, how they choose and disagree, what they get."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter

import pytest

from mmft.config import SimulatedJudgements
from mmft.data.annotators import RATING_SCALE, Annotators, Mention, Reading, Taste, read
from mmft.data.candidates import ADVERSARIAL, KINDS, candidate, true_caption
from mmft.data.scenes import Scene, SceneObject, make_scene, score_caption, sprites
from mmft.metrics.text import bad_ending
from mmft.rewards.simulate import agreement

SPRITES = {sprite.name: sprite for sprite in sprites()}


def thing(name: str, count: int = 1, size: str = "medium", place: str = "middle") -> SceneObject:
    return SceneObject(SPRITES[name], size, place, ((0, 0, 1),) * count)


# A big dog on the left, two owls on the right, on green; and a dog at the top, some corn at the bottom, on white.
SIDE_BY_SIDE = Scene("a", "green", (thing("dog", size="big", place="left"), thing("owl", 2, place="right")))
STACKED = Scene("b", "white", (thing("dog", place="top"), thing("corn", place="bottom")))


def said(*mentions: Mention, colour=None, above=(), loose=0, unknown=0) -> Reading:
    pairs = [(mentions[upper], mentions[lower]) for upper, lower in above]
    return Reading(list(mentions), colour, pairs, loose, unknown)


DOG, OWLS = Mention("dog", 1), Mention("owl", 2)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a dog", said(DOG)),
        ("two owls and a dog on a green background", said(OWLS, DOG, colour="green")),
        ("a pink picture with a dog", said(DOG, colour="pink")),
        ("A big dog on the left, two owls on the right.",
         said(Mention("dog", 1, "big", "left"), Mention("owl", 2, None, "right"))),
        ("a dog at the top left and some corn in the middle",
         said(Mention("dog", 1, None, "top left"), Mention("corn", None, None, "middle"))),
        ("a dog above two owls, with a small cat", said(DOG, OWLS, Mention("cat", 1, "small"), above=[(0, 1)])),
        ("a dog next to two owls", said(DOG, OWLS)),
        ("no dog and two owls", said(Mention("dog", None, negated=True), OWLS)),
        ("a cat without a dog", said(Mention("cat", 1), Mention("dog", 1, negated=True))),
        ("dog owl", said(Mention("dog", bare=True), Mention("owl", bare=True))),
        ("owls, corn", said(Mention("owl", bare=True), Mention("corn", bare=True))),
        ("a green picture with owls", said(Mention("owl", bare=True), colour="green")),  # "a" was the picture's
        ("a dog on no blue background with two owls", said(DOG, OWLS, colour="blue")),
        ("two two owls and a", said(OWLS, loose=2)),
        ("big dog on green background", said(Mention("dog", None, "big", bare=True), colour="green", loose=2)),
        ("a purple dog", said(DOG, unknown=1)),  # a colour that is no background's says nothing of this world
        ("there is a unicorn", said(loose=1, unknown=1)),
        ("", said()),
    ],
)  # fmt: skip
def test_reading(caption: str, expected: Reading) -> None:
    assert read(caption) == expected


def test_every_true_caption_is_read_as_it_was_meant() -> None:
    """Nothing bare, loose or unknown, and all that is said is so."""
    for index in range(200):
        scene, rng = make_scene(index), random.Random(index)
        reading = read(caption := true_caption(scene, rng))
        there = {obj.name: obj for obj in scene.objects}
        assert [m.name for m in reading.mentions] == [obj.name for obj in scene.objects], caption
        assert (reading.loose, reading.unknown, any(m.bare or m.negated for m in reading.mentions)) == (0, 0, False)
        assert reading.colour in (None, scene.background)
        for m in reading.mentions:
            obj = there[m.name]
            assert m.count == (obj.count if obj.sprite.countable else None)
            assert m.size in (None, obj.size) and m.place in (None, obj.place)


@pytest.mark.parametrize(
    ("caption", "scene", "worth"),
    [
        # Both objects 3; attributes averaged over two: dog count .25, size .1, place .15, owls .25 + .15; colour .2.
        ("a big dog on the left and two owls on the right on a green background", SIDE_BY_SIDE, 3 + 0.45 + 0.2),
        ("a dog and two owls", SIDE_BY_SIDE, 3 + 0.25),
        ("two owls", SIDE_BY_SIDE, 1.5 + 0.125),
        ("an owl", SIDE_BY_SIDE, 1.5 - 1.0),  # a wrong count
        ("a small dog", SIDE_BY_SIDE, 1.5 + 0.125 - 0.6),
        ("a dog on the right", SIDE_BY_SIDE, 1.5 + 0.125 - 0.8),
        ("a dog on a blue background", SIDE_BY_SIDE, 1.5 + 0.125 - 0.8),
        ("a dog and a cat", SIDE_BY_SIDE, 1.5 + 0.125 - 1.5),
        ("a dog and no owls", SIDE_BY_SIDE, 1.5 + 0.125 - 1.5),
        ("a dog and no cats", SIDE_BY_SIDE, 1.5 + 0.125),  # true, and worth nothing
        ("a dog, a dog and two owls", SIDE_BY_SIDE, 3 + 0.25 - 1.5),
        ("dog owls", SIDE_BY_SIDE, 3 - 2 * 0.5),
        ("a dog and two owls on a", SIDE_BY_SIDE, 3 + 0.25 - 0.4 - 1.0),  # a loose article, a bad ending
        ("a striped dog", SIDE_BY_SIDE, 1.5 + 0.125 - 0.5),
        ("striped " * 9 + "owls", SIDE_BY_SIDE, 1.5 - 0.5 - 4 * 0.5),  # four are as bad as nine
        ("a dog above some corn", STACKED, 3 + 0.125),  # "some" says no number
        ("some corn above a dog", STACKED, 3 + 0.125 - 0.8),
        ("a cat above a dog", STACKED, 1.5 + 0.125 - 1.5),  # the cat has been paid for
    ],
)
def test_worth_by_hand(caption: str, scene: Scene, worth: float) -> None:
    assert Taste().utility(caption, scene) == pytest.approx(worth, abs=1e-9)


def test_a_liking_for_length() -> None:
    longer = dataclasses.replace(Taste(), per_word=0.5)
    for caption in ("a dog", "a dog and two owls on a blue background"):
        difference = longer.utility(caption, SIDE_BY_SIDE) - Taste().utility(caption, SIDE_BY_SIDE)
        assert difference == pytest.approx(0.5 * len(caption.split()))


FAULTS = tuple(kind for kind in KINDS if kind not in ("true", "partial"))


@pytest.mark.parametrize("kind", FAULTS)
def test_the_truth_is_worth_more_than_any_fault(kind: str) -> None:
    """In every style, on 30 pictures where the kind is possible, to each of the five default tastes."""
    tastes = (Taste(), *Annotators().tastes())
    seen = 0
    for index in range(90):
        scene, rng = make_scene(index, "heldout", seed=1), random.Random(index)
        wrong = candidate(kind, scene, rng)
        if wrong is None or (kind == "shuffled" and not is_disordered(wrong, scene)):
            continue
        seen += 1
        for truth in {true_caption(scene, rng) for _ in range(4)}:
            assert all(t.utility(truth, scene) > t.utility(wrong, scene) for t in tastes), (truth, wrong)
        if seen == 30:
            return
    pytest.fail(f"only {seen} pictures allow {kind}")


def is_disordered(caption: str, scene: Scene) -> bool:
    """Whether shuffling broke something: "a dog and a cat" may come out as "a cat and a dog"."""
    reading = read(caption)
    broken = reading.loose or reading.unknown or bad_ending(caption) or any(m.bare for m in reading.mentions)
    return bool(broken) or score_caption(caption, scene)["count_accuracy"] < 1


def test_every_kind_makes_captions_that_differ() -> None:
    for kind in KINDS:
        made = [candidate(kind, make_scene(index), random.Random(index)) for index in range(60)]
        texts = [text for text in made if text]
        assert len(texts) >= 30, kind
        assert len(set(texts)) > (2 if kind == "generic" else 25), kind
        assert all(text == text.strip() and "  " not in text for text in texts)
        again = [candidate(kind, make_scene(index), random.Random(index)) for index in range(60)]
        assert again == made
    assert set(ADVERSARIAL) <= set(KINDS)


def test_faults_are_what_they_are_called() -> None:
    """By the oracle, which reads with other code."""
    seen: Counter[str] = Counter()
    for index in range(60):
        scene, rng = make_scene(index), random.Random(index)
        places = {obj.name: obj.place for obj in scene.objects}
        wrong = {kind: candidate(kind, scene, rng) for kind in KINDS}
        for kind, caption in wrong.items():
            if caption is None:
                continue
            seen[kind] += 1
            oracle, reading = score_caption(caption, scene), read(caption)
            if kind in ("wrong_noun", "added_noun", "other_picture"):
                assert oracle["hallucination"] > 0, caption
            elif kind == "wrong_count":
                assert oracle["count_accuracy"] < 1, caption
            elif kind in ("wrong_colour", "wrong_size"):
                assert oracle["attribute_accuracy"] < 1, caption
            elif kind == "negation":
                assert any(m.negated and m.name in scene.names for m in reading.mentions), caption
            elif kind == "truncated":
                assert bad_ending(caption), caption
            elif kind == "noun_list":
                assert all(m.bare for m in reading.mentions) and oracle["object_recall"] == 1, caption
            elif kind in ("repeated", "repeated_object"):
                assert len(reading.mentions) > len({m.name for m in reading.mentions}), caption
            elif kind == "swapped_roles":
                moved = [m for m in reading.mentions if m.place not in (None, places[m.name])]
                assert reading.above or len(moved) == 2, caption
                assert reading.above or sorted(m.place for m in reading.mentions) == sorted(places.values()), caption
            elif kind == "true":
                assert oracle["object_recall"] == 1 and oracle["hallucination"] == 0, caption
    assert all(seen[kind] >= 30 for kind in KINDS), seen


class TestPool:
    def test_one_taste_without_spread(self) -> None:
        assert Annotators(count=3, spread=0).tastes() == (Taste(),) * 3

    def test_tastes_differ_by_seed_alone(self) -> None:
        assert Annotators(count=4).tastes() == Annotators(count=4, noise=9).tastes()
        assert Annotators(seed=1).tastes() != Annotators(seed=2).tastes()
        assert len(set(Annotators(count=4).tastes())) == 4
        wild = [dataclasses.asdict(taste) for taste in Annotators(spread=1.0).tastes()]
        assert all(value > 0 for taste in wild for name, value in taste.items() if name != "per_word")

    def test_without_noise_the_better_caption_is_chosen(self) -> None:
        pool, rng = Annotators(noise=0), random.Random(0)
        good, bad = "a dog and two owls", "a dog and two cats"
        one = pool.prefers_first(Taste(), good, bad, SIDE_BY_SIDE, rng)
        other = pool.prefers_first(Taste(), bad, good, SIDE_BY_SIDE, rng)
        # 3.25 against 1.5 + .125 - 1.5
        assert (one, other) == (pytest.approx(3.125), pytest.approx(-3.125))

    def test_noise_of_a_choice(self) -> None:
        """Two utilities, each with noise of standard deviation 0.5: 0.5 x sqrt(2) = 0.7071 in the difference."""
        pool, rng = Annotators(noise=0.5), random.Random(0)
        drawn = [pool.prefers_first(Taste(), "a dog", "a dog", SIDE_BY_SIDE, rng) for _ in range(4000)]
        assert sum(drawn) / 4000 == pytest.approx(0, abs=0.04)
        assert sum(x * x for x in drawn) / 4000 == pytest.approx(0.5, rel=0.08)

    def test_ratings_are_utilities_on_a_scale(self) -> None:
        rating = Annotators(noise=0).rating(Taste(), "a dog and two owls", SIDE_BY_SIDE, random.Random(0))
        assert rating == pytest.approx(RATING_SCALE * 3.25)

    @pytest.mark.parametrize(("objects", "share"), [(1, 0.8), (2, 1.1)])
    def test_noise_of_a_rating_grows_with_what_there_is_to_see(self, objects: int, share: float) -> None:
        """0.5 x (0.5 + 0.3 n), on the scale of ratings."""
        scene = dataclasses.replace(SIDE_BY_SIDE, objects=SIDE_BY_SIDE.objects[:objects])
        rng, worth = random.Random(0), Taste().utility("a dog", scene)
        drawn = [Annotators(noise=0.5).rating(Taste(), "a dog", scene, rng) for _ in range(4000)]
        deviation = (sum((x - RATING_SCALE * worth) ** 2 for x in drawn) / 4000) ** 0.5
        assert deviation == pytest.approx(RATING_SCALE * 0.5 * share, rel=0.05)

    def test_a_length_bias_is_a_liking_of_all(self) -> None:
        assert {taste.per_word for taste in Annotators(length_bias=0.3).tastes()} == {0.3}

    def test_two_of_the_default_pool_agree_nine_times_in_ten(self) -> None:
        votes = [vote for _, vote in agreement(SimulatedJudgements(), "heldout", 400)]
        assert len(votes) > 1500
        assert sum(votes) / len(votes) == pytest.approx(0.90, abs=0.02)
