"""Reward terms and their sum: hand arithmetic, cheap tricks that must not pay, and errors that name what is wrong."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from mmft.config import RewardConfig
from mmft.functional.normalize import RunningStats
from mmft.metrics.bleu import sentence_bleu
from mmft.rewards import TERMS, RewardFunction, Term, build_reward, register
from mmft.rewards.combine import WeightedTerm, caption_reward, weighted_sum
from mmft.rewards.content_units import content_units
from mmft.rewards.detail import Detail
from mmft.rewards.terms import build_term
from mmft.types import Row, UserError

THINGS = ["apple", "dog", "cat", "tree", "car", "house", "bird", "boat", "chair", "lamp", "clock", "shoe"]
COLOURS = ["red", "blue", "green", "white"]


def row(*references: str, id: str = "r1", scene: object = None) -> Row:
    return Row(id, None, "Describe.", references, scene=scene)


def reward(*terms: dict[str, object]) -> RewardFunction:
    return build_reward(RewardConfig.model_validate({"terms": terms}))


@pytest.fixture(scope="module")
def detail() -> Detail:
    """Detail that has read 400 pictures of two things each, all of them on a coloured background."""
    rng = random.Random(0)
    pictures = []
    for _ in range(400):
        first, second = rng.sample(THINGS, 2)
        colour, count = rng.choice(COLOURS), rng.choice(["a", "two", "three"])
        first = f"{first}s" if count != "a" else first
        pictures.append(
            (f"{count} {first} and a {second} on a {colour} background", f"a {second} next to {count} {first}")
        )
    measure = Detail()
    measure.fit(pictures)
    return measure


REFERENCES = (
    "two red apples and a dog on a blue background",
    "a dog next to two apples",
    "there are two apples on the left",
)


# Content units


def units(caption: str) -> set[str]:
    return {" ".join(unit) for unit in content_units(caption)}


def test_units_of_a_caption() -> None:
    things = {"apple", "dog", "background"}
    pairs = {"two apple", "red apple", "one dog", "one background", "blue background"}
    assert units("two red apples and a dog on a blue background") == things | pairs | {"dog on background"}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a dog next to two apples", "two apples beside a dog"),
        ("2 dogs", "a pair of dogs"),
        ("a cat under a tree", "a tree above a cat"),
        ("a large dog", "a BIG dog."),
        ("a red apple", "an apple is red"),
        ("a dog sitting on a chair", "a dog on a chair"),
    ],
)
def test_the_same_said_otherwise(one: str, other: str) -> None:
    assert units(one) == units(other)


def test_bindings_are_told_apart() -> None:
    assert units("a red dog and a blue cat") != units("a blue dog and a red cat")
    assert units("a dog on a cat") != units("a cat on a dog")
    assert "red ball" in units("a red and blue ball") and "blue ball" in units("a red and blue ball")
    assert {"orange", "one orange"} <= units("an orange and a dog") and "orange dog" not in units("an orange and a dog")
    assert units("dogs, cats") == {"dog", "cat"}  # punctuation ends a phrase
    assert units("") == units("and the of") == set()


# Detail by hand


def test_detail_by_hand() -> None:
    measure = Detail(beta=2.0, idf_power=2.0, binding_weight=0.5, consensus=1.0, hallucination_penalty=0.25)
    measure.fit([["a dog"], ["a dog", "dogs"], ["a cat"], ["a dog"]])
    # N = 4. dog and one-dog are in 3 pictures, cat and one-cat in 1; an owl in none.
    common = math.log(4 / 3) / math.log(4)
    assert measure.idf(("dog",)) == pytest.approx(common)
    assert measure.idf(("cat",)) == measure.idf(("owl",)) == 1.0
    # "a cat and an owl" against "a cat", "dogs": claimed cat 1, one-cat .5, owl 1, one-owl .5: P = 1.5 / 3.
    # Wanted, each in one of two references: cat .5, one-cat .25, dog common^2 / 2: R = .75 / (.75 + common^2 / 2).
    precision, recall = 0.5, 0.75 / (0.75 + common**2 / 2)
    f_beta = 5 * precision * recall / (4 * precision + recall)
    score = measure.score("a cat and an owl", ["a cat", "dogs"])
    assert (score.precision, score.recall) == pytest.approx((precision, recall))
    assert score.value == pytest.approx(f_beta - 0.25 * 0.5)


def test_relation_weighs_no_more_than_its_lesser_noun() -> None:
    measure = Detail(binding_weight=3.0)
    measure.fit([["a dog on grass"], ["a cat on grass"], ["grass"]])
    assert measure.weight(("dog", "on", "grass")) == 0.0
    # dog in 1 of 3 pictures: idf 1; cat likewise
    assert measure.weight(("cat", "on", "dog")) == pytest.approx(3.0)


def test_detail_edges(detail: Detail) -> None:
    assert detail.score("", REFERENCES).value == detail.score("the and of", REFERENCES).value == 0.0
    # The full reference still lacks the relations that the other two add.
    assert detail.score(REFERENCES[0], REFERENCES).precision == 1.0
    assert 0.5 < detail.score(REFERENCES[0], REFERENCES).value < 1.0
    alone = Detail()
    alone.fit([["a dog"]])
    assert alone.score("a dog", ["a dog"]).value == 1.0  # one picture: nothing to compare with, all weigh the same
    with pytest.raises(ValueError, match="no picture has references"):
        Detail().fit([[]])
    with pytest.raises(RuntimeError, match="before fit"):
        Detail().score("a dog", ["a dog"])
    with pytest.raises(ValueError, match="at least one reference"):
        detail.score("a dog", [])


def test_detail_state_round_trip(detail: Detail) -> None:
    copy = Detail()
    copy.load_state_dict(json.loads(json.dumps(detail.state_dict())))
    assert copy.score("a dog and an apple", REFERENCES) == detail.score("a dog and an apple", REFERENCES)


# Detail against cheap tricks


def value(detail: Detail, caption: str) -> float:
    return detail.score(caption, REFERENCES).value


def test_saying_more_that_is_right_pays(detail: Detail) -> None:
    captions = ["a dog", "a dog and apples", "a dog and two apples", "a dog next to two red apples"]
    scores = [value(detail, caption) for caption in captions]
    assert scores == sorted(scores) and len(set(scores)) == len(scores)


@pytest.mark.parametrize(
    "trick",
    [
        "a dog and two apples and a dog and two apples",  # said again
        "a dog a dog two apples two apples",
        "a dog and two apples and so on and so on, and that is all there is of it",  # a long empty ending
    ],
)
def test_repeats_and_filler_earn_nothing(detail: Detail, trick: str) -> None:
    assert value(detail, trick) <= value(detail, "a dog and two apples")


@pytest.mark.parametrize(
    "wrong",
    [
        "a dog and two apples and a cat",  # not there
        "a dog and two apples and a unicorn",  # in no training reference
        "a dog and three apples",  # count
        "a dog and an apple",
        "two dogs and two apples",
        "a dog and two green apples",  # colour
        "a red dog and two apples",  # colour of another thing
        "a dog on two apples",  # relation
    ],
)
def test_what_is_wrong_costs(detail: Detail, wrong: str) -> None:
    assert value(detail, wrong) < value(detail, "a dog and two apples")


@pytest.mark.parametrize(
    "nouns", ["dog apple", "dog, apple", "dog apple red two blue background left", "apples dogs cats trees cars"]
)
def test_a_list_of_nouns_is_below_a_sentence(detail: Detail, nouns: str) -> None:
    assert value(detail, nouns) < 0.75 * value(detail, "a dog and two apples")


def test_the_background_is_worth_little(detail: Detail) -> None:
    before = value(detail, "a dog")
    background = value(detail, "a dog on a blue background") - before
    thing = value(detail, "a dog and two apples") - before
    assert 0 <= background < 0.35 * thing
    steep = Detail(idf_power=3.0)
    steep.load_state_dict(detail.state_dict())
    gain = value(steep, "a dog on a blue background") - value(steep, "a dog")
    assert gain < background


def test_hallucination_penalty_turns_a_guess_into_a_loss(detail: Detail) -> None:
    strict = Detail(hallucination_penalty=0.5)
    strict.load_state_dict(detail.state_dict())
    assert value(strict, "a dog and two apples") == value(detail, "a dog and two apples")
    lost = value(strict, "a dog") - value(strict, "a dog and a cat")
    assert lost > value(detail, "a dog") - value(detail, "a dog and a cat") > 0


# Terms


def test_length_counts_words_outside_the_band() -> None:
    term = build_term("length", target=(2, 3))
    assert term(["one", "a dog", "a red dog", "a red dog ran home"], [row()] * 4) == [1.0, 0.0, 0.0, 2.0]
    assert term.sign == -1


def test_cost_terms() -> None:
    rows = [row()] * 2
    assert build_term("repetition")(["a dog and a dog", "a dog"], rows) == [0.5, 0.0]
    ending = build_term("bad_ending")
    assert ending(["a dog and", "a dog"], rows) == [1.0, 0.0]
    assert ending(["a dog", "a dog"], rows, finished=[True, False]) == [0.0, 1.0]


def test_registry_errors_name_the_term() -> None:
    with pytest.raises(UserError, match="did you mean detail"):
        build_term("detial")
    with pytest.raises(UserError, match=r"'length'.*band"):
        build_term("length", target=(5, 2))
    with pytest.raises(UserError, match="'bleu'.*ordr"):
        build_term("bleu", ordr=2)


def test_registering_twice_fails() -> None:
    with pytest.raises(ValueError, match="registered twice"):

        @register("bleu")
        class Other(Term):
            pass

    assert TERMS["bleu"].__name__ == "BleuTerm"


# Python functions


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's module beside the recipe, in the working directory and not on the path."""
    name = f"my_rewards_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(
        "constant = 3\n"
        "def words(captions, rows): return [len(c.split()) for c in captions]\n"
        "def scene(captions, rows): return [float(r.scene is not None) for r in rows]\n"
        "def short(captions, rows): return [1.0]\n"
        "def nan(captions, rows): return [float('nan')] * len(rows)\n"
        "def text(captions, rows): return ['much'] * len(rows)\n"
        "def fails(captions, rows): return 1 / 0\n"
        "def narrow(captions): return []\n"
    )
    monkeypatch.chdir(tmp_path)
    return name


def test_python_term(module: str) -> None:
    function = reward({"type": "python", "function": f"{module}:words", "name": "words", "sign": -1, "weight": 2})
    output = function(["a dog", "owl"], [row(), row()])
    assert output.raw == {"words": [2.0, 1.0]}
    assert output.total == [-4.0, -2.0]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("nowhere_at_all:f", "cannot import nowhere_at_all"),
        ("{}:missing", "has no 'missing'"),
        ("{}:constant", "is a int, not a function"),
        ("{}:narrow", "cannot be called as"),
        ("words", "not of the form module:function"),
    ],
)
def test_python_function_is_checked_when_loaded(module: str, function: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_term("python", function=function.format(module))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("short", "returned 1 numbers for 2 captions"),
        ("text", "one number a caption"),
        ("fails", "ZeroDivisionError: division by zero"),
        ("nan", "'python' gave nan for sample 'r1'"),
    ],
)
def test_python_function_fails_by_name(module: str, function: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        reward({"type": "python", "function": f"{module}:{function}"})(["a", "b"], [row(), row()])


def test_no_term_sees_the_oracle(module: str) -> None:
    function = reward({"type": "python", "function": f"{module}:scene"})
    assert function(["a dog"], [row("a dog", scene={"dog": 1})]).total == [0.0]


# The sum


def test_weighted_sum_and_caption_reward_by_hand() -> None:
    # 2 * 0.5 - 3 * 0.1 = 0.7; 2 * 1 - 3 * 0 = 2
    assert weighted_sum({"a": [0.5, 1.0], "b": [0.1, 0.0]}, {"a": 2.0, "b": -3.0}) == pytest.approx([0.7, 2.0])
    # 1 * 0.5 + 2 * 0.25 - 0.1 * 3 = 0.7
    assert caption_reward([0.5], [0.25], [3.0], alpha=1.0, beta=2.0, gamma=0.1) == pytest.approx([0.7])


def test_total_is_the_sum_of_weighted_terms() -> None:
    function = reward(
        {"type": "bleu", "weight": 0.5},
        {"type": "detail", "weight": 2.0},
        {"type": "length", "weight": 0.1, "target": [3, 4]},
        {"type": "repetition", "weight": 0.3},
    )
    rows = [row("a dog and a cat"), row("two owls", id="r2")]
    function.fit(rows)
    output = function(["a dog and a dog and", "two owls"], rows)
    # Lengths 6 and 2 are 2 and 1 words outside [3, 4]; one of two content words is a repeat.
    assert output.raw["length"] == [2.0, 1.0]
    assert output.weighted["length"] == pytest.approx([-0.2, -0.1])
    assert output.weighted["repetition"] == pytest.approx([-0.15, 0.0])
    assert output.raw["bleu"][0] == sentence_bleu("a dog and a dog and", rows[0].references)
    # 0.5 * 1 + 2 * 1 - 0.1 * 1
    assert output.total[1] == pytest.approx(2.4)
    assert output.total == pytest.approx([sum(term[i] for term in output.weighted.values()) for i in range(2)])


def test_zscore_runs_and_freezes() -> None:
    function = reward({"type": "length", "target": [0, 1], "normalize": "zscore", "weight": 2.0})
    rows = [row()] * 2
    # Raw costs 0 and 2: mean 1, sigma 1, so z = -1, 1; the cost's sign and the weight make 2, -2.
    assert function(["a", "a b c"], rows).total == pytest.approx([2.0, -2.0])
    state = json.loads(json.dumps(function.state_dict()))
    # Frozen: 4 is (4 - 1) / 1 = 3 sigma above, however often it is asked.
    for _ in range(2):
        assert function(["a b c d e"], rows[:1], update=False).normalized["length"] == pytest.approx([3.0])
    fresh = reward({"type": "length", "target": [0, 1], "normalize": "zscore", "weight": 2.0})
    assert fresh(["a b c d e"], rows[:1], update=False).normalized["length"] == [4.0]  # no statistics: as it is
    fresh.load_state_dict(state)
    # Updated: 0, 2, 4 have mean 2, variance 8/3.
    assert fresh(["a b c d e"], rows[:1]).normalized["length"] == pytest.approx([2 / math.sqrt(8 / 3)])


def test_minmax_by_hand() -> None:
    function = reward({"type": "length", "target": [0, 1], "normalize": "minmax"})
    # costs 0, 1, 4 in [0, 4]
    assert function(["a", "a b", "a b c d e"], [row()] * 3).normalized["length"] == pytest.approx([0, 0.25, 1])


class Fixed(Term):
    """Gives what it is told to."""

    def __init__(self, values: list[float]):
        self.values = values

    def __call__(
        self, captions: Sequence[str], rows: Sequence[Row], finished: Sequence[bool] | None = None
    ) -> list[float]:
        return self.values


def test_a_non_finite_value_leaves_the_statistics_alone() -> None:
    good, bad = WeightedTerm("good", Fixed([1.0]), normalize="zscore"), WeightedTerm("bad", Fixed([math.inf]))
    with pytest.raises(UserError, match="'bad' gave inf for sample 'r1', caption 'a dog'"):
        RewardFunction([good, bad])(["a dog"], [row()])
    assert good.stats == RunningStats()


def test_check_names_term_and_first_row_without_references() -> None:
    function = reward({"type": "length"}, {"type": "bleu", "name": "overlap"})
    function.check([row("a dog")])
    for empty in (row(id="r2"), row("  ", id="r2")):
        with pytest.raises(UserError, match="'overlap' needs references, and row 'r2' has none"):
            function.check([row("a dog"), empty, row(id="r3")])
    reward({"type": "length"}).check([row()])


def test_wrong_uses() -> None:
    with pytest.raises(UserError, match="two reward terms are named 'x'"):
        RewardFunction([WeightedTerm("x", Fixed([])), WeightedTerm("x", Fixed([]))])
    with pytest.raises(UserError, match="no terms"):
        RewardFunction([])
    with pytest.raises(UserError, match="weight -1"):
        WeightedTerm("x", Fixed([]), weight=-1)
    with pytest.raises(ValueError, match="2 captions, 1 rows"):
        reward({"type": "length"})(["a", "b"], [row()])
    with pytest.raises(UserError, match=r"saved reward has terms \['length'\]"):
        reward({"type": "repetition"}).load_state_dict(reward({"type": "length"}).state_dict())


def test_empty_batch() -> None:
    assert reward({"type": "length"}, {"type": "repetition"})([], []).total == []


def test_reference_reward_leaves_one_out() -> None:
    function = reward({"type": "bleu", "max_order": 1, "normalize": "zscore"})
    # Row 1: each of two equal references scores 1. Row 2: unigram precision 1/2 each way, equal lengths.
    rows = [row("a dog", "a dog"), row("a cat", "a bird"), row("alone")]
    assert function.reference_reward(rows) == pytest.approx((1.0 + 0.5) / 2)
    assert function.terms["bleu"].stats == RunningStats()
    assert math.isnan(function.reference_reward([row("alone")]))
    assert function.reference_reward(rows, leave_one_out=False) == pytest.approx(1.0)


def test_rows_are_permuted_with_their_rewards() -> None:
    function = reward({"type": "bleu"}, {"type": "detail"})
    rows = [row("a dog"), row("two cats on the left", id="r2"), row("an owl", "one owl", id="r3")]
    function.fit(rows)
    captions = ["a dog", "two cats", "a bird"]
    total = function(captions, rows).total
    order = [2, 0, 1]
    assert function([captions[i] for i in order], [rows[i] for i in order]).total == [total[i] for i in order]
