"""Judgements for a recipe: EmojiScenes by simulated annotators, files, corruptions; and what must be kept apart."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from mmft.config import RewardRecipe, SimulatedJudgements
from mmft.data.annotators import Taste
from mmft.data.candidates import ADVERSARIAL, KINDS, minimal_pair
from mmft.data.scenes import make_scene, render
from mmft.rewards import simulate
from mmft.rewards.judgement_files import write_preferences, write_ratings
from mmft.rewards.judgements import Picture
from mmft.rewards.sources import ADVERSARIAL_SCENES, JudgementSets, open_judgements
from mmft.types import UserError

PICTURES = 200


@pytest.fixture(scope="module")
def config() -> SimulatedJudgements:
    return SimulatedJudgements(pictures=PICTURES)


@pytest.fixture(scope="module")
def pairs(config: SimulatedJudgements) -> list:
    return simulate.preferences(config, "train", PICTURES)


@pytest.fixture(scope="module")
def rated(config: SimulatedJudgements) -> list:
    return simulate.ratings(config, "train", PICTURES)


def test_as_many_as_asked(config, pairs, rated) -> None:
    by_picture = Counter(pair.picture_key for pair in pairs)
    assert len(by_picture) == PICTURES and max(by_picture.values()) == config.pairs
    assert len(pairs) > 0.98 * config.pairs * PICTURES  # a picture of few candidates has fewer pairs
    by_picture = Counter(item.picture_key for item in rated)
    most = config.candidates + 2  # the candidates, and both sides of the minimal pair
    assert min(by_picture.values()) >= 2 and max(by_picture.values()) == most


def test_every_kind_is_judged(pairs, rated) -> None:
    assert {item.kind for item in rated} == set(KINDS)
    assert {pair.kind for pair in pairs} == set(KINDS), "even the true caption may lose, to a fuller one"
    seldom = Counter(pair.kind for pair in pairs)["true"] / len(pairs)
    assert seldom < 0.1


def test_no_pair_is_judged_twice(pairs) -> None:
    once = {(p.picture_key, frozenset((p.chosen, p.rejected))) for p in pairs}
    assert len(once) == len(pairs)


def test_the_choices_follow_the_scene(config, pairs) -> None:
    """The annotators see the picture that the judgement holds: their choices have the higher utility."""
    scenes = {Picture.of(render(s := make_scene(i, "train", config.seed))).key: s for i in range(PICTURES)}
    worth = [Taste().utility(p.chosen, scenes[p.picture_key]) for p in pairs]
    less = [Taste().utility(p.rejected, scenes[p.picture_key]) for p in pairs]
    right = sum(a > b for a, b in zip(worth, less, strict=True)) / len(pairs)
    assert 0.9 < right < 1.0, "noise must be there, and small"


def test_references_never_hold_what_is_judged(config, pairs, rated) -> None:
    against = simulate.adversarial(config, "heldout", 60)
    for item in [*pairs, *against]:
        assert item.references and not {item.chosen, item.rejected} & set(item.references)
    for item in rated:
        assert item.references and item.caption not in item.references


def test_what_a_false_caption_was_made_from_goes_too() -> None:
    """Else a copy with one word changed would be nearer to the references than a true caption without its twin."""
    full, placed, plain = references = ("a dog on a green background", "a dog in the middle", "a dog")
    scene = make_scene(0)
    judged = simulate._Judged(scene, Picture.of(render(scene)), references, [], None, random.Random(0))
    assert judged.about("a dog on a blue background") == (placed, plain)
    assert judged.about(plain, "a cat in the middle") == (full,)
    assert judged.about(plain) == (full, placed)


def test_training_and_held_out_pictures_share_nothing(config) -> None:
    train, heldout = (
        {pair.picture_key for pair in build(config, split, PICTURES)}
        for split, build in (("train", simulate.preferences), ("heldout", simulate.preferences))
    )
    assert len(train) == len(heldout) == PICTURES and not train & heldout
    names = [{make_scene(i, split, config.seed).names for i in range(PICTURES)} for split in ("train", "heldout")]
    assert not names[0] & names[1]


def test_not_the_pictures_that_policies_train_on(config) -> None:
    """Recipes that train policies draw scenes with seed 0."""
    policy = {Picture.of(render(make_scene(i, "train", 0))).key for i in range(PICTURES)}
    assert not policy & {pair.picture_key for pair in simulate.preferences(config, "train", PICTURES)}


def test_the_same_every_time_and_longer_is_more_of_the_same(config, pairs, rated) -> None:
    assert simulate.preferences(config, "train", PICTURES) == pairs
    assert simulate.ratings(config, "train", PICTURES) == rated
    first = {pair.picture_key for pair in pairs[:40]}
    assert [p for p in simulate.preferences(config, "train", 20) if p.picture_key in first] == pairs[:40]


def test_settings_of_the_pool_reach_the_choices(config, pairs) -> None:
    """A large bias for length makes the longer caption win; another pool chooses otherwise now and then."""

    def of(**annotators: float) -> list:
        return simulate.preferences(SimulatedJudgements(pictures=PICTURES, annotators=annotators), "train", PICTURES)

    def longer(items: list) -> float:
        lengths = [(len(p.chosen.split()), len(p.rejected.split())) for p in items]
        return sum(a >= b for a, b in lengths) / len(lengths)

    assert longer(of(length_bias=20.0)) > 0.99 > longer(pairs)
    assert {p.annotator for p in of(count=3)} == {"simulated-0", "simulated-1", "simulated-2"}
    assert of(seed=5) != pairs
    assert Counter(v for _, v in simulate.agreement(noiseless(), "train", 100)).keys() == {1.0}


def noiseless() -> SimulatedJudgements:
    return SimulatedJudgements(annotators={"noise": 0.0, "spread": 0.0})


def test_adversarial_captions_of_seven_kinds(config) -> None:
    against = simulate.adversarial(config, "heldout", 20)
    kinds = defaultdict(set)
    for pair in against:
        kinds[pair.kind].add(pair.picture_key)
        assert pair.annotator == "truth" and pair.chosen != pair.rejected
    assert set(kinds) == set(ADVERSARIAL) and len(ADVERSARIAL) == 7
    assert all(len(pictures) >= 12 for pictures in kinds.values())
    assert {pair.picture_key for pair in against} == {
        Picture.of(render(make_scene(i, "heldout", config.seed))).key for i in range(20)
    }


def test_few_candidates(config) -> None:
    few = SimulatedJudgements(candidates=2, pairs=4)
    pairs = simulate.preferences(few, "train", 60)
    assert Counter(p.picture_key for p in pairs).most_common(1)[0][1] == 2, "two candidates, and the minimal pair"
    assert len({p.picture_key for p in pairs}) == 60


def test_minimal_pairs_differ_by_one_fault_that_costs() -> None:
    """The same caption with and without the fault: the first is worth more to every taste without noise, and one pair
    of each picture is such a pair.
    """
    found = Counter()
    for index in range(300):
        scene = make_scene(index)
        pair = minimal_pair(scene, random.Random(index))
        if pair is None:
            continue
        clean, faulty, kind = pair
        found[kind] += 1
        assert clean != faulty or kind == "repeated_object", (clean, faulty)
        assert Taste().utility(clean, scene) > Taste().utility(faulty, scene), pair
    assert set(found) == {"wrong_noun", "added_noun", "wrong_count", "wrong_size", "repeated_object"}
    assert found["repeated_object"] > 2 * found["wrong_noun"]


def test_one_pair_alone_is_no_minimal_one() -> None:
    """With a single choice a picture, only minimal pairs would teach nothing of what is missing."""
    kinds = Counter(p.kind for p in simulate.preferences(SimulatedJudgements(pairs=1), "train", 120))
    assert kinds["generic"] and kinds["partial"]


class TestSources:
    def recipe(self, loss: str = "bradley_terry", **data) -> RewardRecipe:
        return RewardRecipe.model_validate({"loss": loss, "data": data, "eval": {"pictures": 30}})

    def keys(self, sets: JudgementSets) -> list[set[str]]:
        return [{item.picture_key for item in part} for part in (sets.train, sets.validation, sets.heldout)]

    def check_apart(self, sets: JudgementSets) -> None:
        train, validation, heldout = self.keys(sets)
        assert train and validation and heldout
        assert not train & validation and not train & heldout and not validation & heldout
        for pairs in (sets.heldout_preferences, sets.adversarial):
            assert {pair.picture_key for pair in pairs}.isdisjoint(train | validation)

    @pytest.mark.parametrize("loss", ["bradley_terry", "mse", "aleatoric"])
    def test_scenes(self, loss: str) -> None:
        sets = open_judgements(self.recipe(loss, type="scenes", pictures=60))
        self.check_apart(sets)
        assert sets.preferences == (loss == "bradley_terry")
        train, validation, heldout = self.keys(sets)
        assert len(train | validation) == 60 and 1 <= len(validation) <= 15 and len(heldout) == 30
        assert {pair.picture_key for pair in sets.heldout_preferences} == heldout
        assert {key for key, _ in sets.agreement} == heldout
        assert len({pair.picture_key for pair in sets.adversarial}) == ADVERSARIAL_SCENES

    @pytest.mark.parametrize("loss", ["bradley_terry", "mse"])
    def test_a_file(self, loss: str, tmp_path: Path, pairs: list, rated: list) -> None:
        path = tmp_path / "said.parquet"
        if loss == "mse":
            write_ratings(path, rated[:120])
        else:
            write_preferences(path, pairs[:120])
        sets = open_judgements(self.recipe(loss, type="file", path=str(path)))
        self.check_apart(sets)
        assert len(sets.train) + len(sets.validation) + len(sets.heldout) == 120
        assert bool(sets.heldout_preferences) == (loss == "bradley_terry")
        assert sets.train[0].references

    def test_a_file_of_the_other_kind(self, tmp_path: Path, pairs: list, rated: list) -> None:
        write_preferences(pair_file := tmp_path / "pairs.jsonl", pairs[:8])
        write_ratings(rating_file := tmp_path / "ratings.jsonl", rated[:8])
        with pytest.raises(UserError, match=r"pairs.jsonl: holds preferences, and loss mse learns from ratings"):
            open_judgements(self.recipe("mse", type="file", path=str(pair_file)))
        with pytest.raises(UserError, match=r"ratings.jsonl: holds ratings, and loss bradley_terry learns from pref"):
            open_judgements(self.recipe(type="file", path=str(rating_file)))

    def test_a_file_of_too_few_pictures(self, tmp_path: Path, pairs: list) -> None:
        two = [p for p in pairs if p.picture_key in {pairs[0].picture_key, pairs[5].picture_key}]
        write_preferences(path := tmp_path / "few.jsonl", two)
        with pytest.raises(UserError, match="few.jsonl: too few pictures to hold some out; three are the least"):
            open_judgements(self.recipe(type="file", path=str(path)))

    def test_corruptions(self) -> None:
        data = {"type": "corruptions", "source": {"type": "scenes"}, "pictures": 40, "per_picture": 3}
        sets = open_judgements(self.recipe(**data))
        self.check_apart(sets)
        assert sets.heldout_preferences == sets.heldout and not sets.adversarial
        train, validation, heldout = self.keys(sets)
        assert len(train | validation) <= 40 and len(heldout) <= 30
        for pair in [*sets.train, *sets.heldout]:
            assert pair.chosen not in pair.references and pair.rejected not in pair.references

    def test_corruptions_of_chosen_kinds(self) -> None:
        data = {"type": "corruptions", "kinds": ["count", "negation"], "pictures": 20}
        sets = open_judgements(self.recipe(**data))
        assert {pair.kind for pair in (*sets.train, *sets.heldout)} == {"count", "negation"}
        with pytest.raises(UserError, match="cuont"):
            open_judgements(self.recipe(**{**data, "kinds": ["cuont"]}))
