"""CIDEr-D, chrF, ROUGE-L of COCO and answers: published values, properties, and the terms and modules made of them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import evaluate
import pytest
import tiny_towers
from PIL import Image

import mmft.metrics
from mmft.config import load_recipe
from mmft.eval.evaluator import evaluate_captions
from mmft.metrics.bleu import corpus_bleu
from mmft.metrics.chrf import chrf
from mmft.metrics.cider import CiderBetween, CiderD, corpus_cider_d
from mmft.metrics.rouge_l import coco_rouge_l
from mmft.metrics.text import tokenise
from mmft.metrics.vqa import exact_match, normalise_answer, vqa_accuracy
from mmft.rewards.combine import build_reward
from mmft.rewards.terms import build_term
from mmft.run.guard import choose_metric
from mmft.types import Row, UserError

# The example of the clipscore project (Hessel et al. 2021): two pictures, three references each.
REFERENCES = [
    ["two cats are sleeping next to each other.", "a grey cat is cuddling with an orange cat on a blanket.",
     "the orange cat is happy that the black cat is close to it."],
    ["a dog is wearing ear muffs as it lies on a carpet.",
     "a black dog and an orange cat are looking at the photographer.", "headphones are placed on a dogs ears."],
]  # fmt: skip
GOOD = ["an orange cat and a grey cat are lying together.",
        "a black dog wearing headphones looks at the camera as an orange cat walks in the background."]  # fmt: skip
BAD = ["a calico cat and a white cat are lying together.",
       "a black dog wearing a hat looks at the camera as a tabby walks in the background."]  # fmt: skip


@pytest.mark.parametrize(
    ("captions", "bleu", "rouge", "cider"),
    [(GOOD, (0.6667, 0.4899, 0.3469, 0.0), 0.4280, 0.5637), (BAD, (0.4815, 0.2404, 0.1359, 0.0), 0.3121, 0.2790)],
)
def test_published_values(captions: list[str], bleu: tuple[float, ...], rouge: float, cider: float) -> None:
    """BLEU of words alone, as COCO's tokens are, and unsmoothed; the full stop is dropped there."""

    def plain(text: str) -> str:
        return " ".join(tokenise(text))

    found = corpus_bleu([plain(c) for c in captions], [[plain(r) for r in of] for of in REFERENCES], "none")
    assert [round(value, 4) for value in found.values()] == list(bleu)
    longest = [coco_rouge_l(c, of) for c, of in zip(captions, REFERENCES, strict=True)]
    assert round(sum(longest) / 2, 4) == rouge
    assert round(sum(corpus_cider_d(captions, REFERENCES)) / 2, 4) == cider


def test_cider_by_hand() -> None:
    """Two pictures, unigrams: idf is log 2 for what is of one picture, 0 for what is of both."""
    cider = CiderD(order=1).fit([["a dog"], ["a cat"]])
    assert cider.score("a dog", ["a dog"]) == pytest.approx(10.0)
    assert cider.score("a cat", ["a dog"]) == 0.0 and cider.score("a", ["a dog"]) == 0.0
    # A new word weighs as a rare one: the caption's vector is (1, 1) / sqrt 2 along dog and bird.
    assert cider.score("dog bird", ["a dog"]) == pytest.approx(10 / math.sqrt(2))
    # Said three times it counts as once said, and bigrams are the length: 2 and 1 here; none of them is shared.
    two = CiderD(order=2).fit([["a dog"], ["a cat"]])
    assert two.score("dog dog dog", ["a dog"]) == pytest.approx(10 * math.exp(-1 / 72) / 3 / 2)
    assert cider.score("", ["a dog"]) == 0.0
    with pytest.raises(ValueError, match="at least one reference"):
        cider.score("a", [])
    with pytest.raises(ValueError, match="call fit first"):
        CiderD().score("a", ["a"])
    with pytest.raises(ValueError, match="positive sigma"):
        CiderD(sigma=0)


def test_the_end_of_a_sentence_counts() -> None:
    cider = CiderD(count_end=True).fit(REFERENCES)
    whole, cut = (cider.score("a grey cat is cuddling", REFERENCES[0], ended) for ended in (True, False))
    full = "a grey cat is cuddling with an orange cat on a blanket"
    assert cider.score(full, REFERENCES[0]) > cider.score(full, REFERENCES[0], ended=False)
    assert whole != cut


def test_frequencies_survive_json() -> None:
    cider = CiderD().fit(REFERENCES)
    again = CiderD()
    again.load_state_dict(json.loads(json.dumps(cider.state_dict())))
    assert [again.score(c, of) for c, of in zip(GOOD, REFERENCES, strict=True)] == [
        cider.score(c, of) for c, of in zip(GOOD, REFERENCES, strict=True)
    ]
    assert all(count > 1 for count in again.frequency.values()), "what occurs once weighs as what is new"


def test_chrf() -> None:
    assert chrf("a dog", ["a dog"]) == pytest.approx(1.0) and chrf("xyz", ["a dog"]) == 0.0
    assert chrf("dogs", ["dog", "a cat"]) > chrf("dogs", ["a cat"])
    with pytest.raises(ValueError, match="at least one reference"):
        chrf("a", [])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("The two dogs.", "2 dogs"), ("a  red\nball!", "red ball"), ("1,000 people", "1000 people"), ("3.5", "3.5"),
        ("dont know", "don't know"), ("black/white", "black white"), ("yes, it is", "yes it is"), ("None", "0"),
        ("", ""), ("A", ""), ("t-shirt", "t shirt"),
    ],
)  # fmt: skip
def test_answers_are_normalised(given: str, expected: str) -> None:
    assert normalise_answer(given) == expected


def test_vqa_accuracy() -> None:
    ten = ["red"] * 2 + ["blue"] * 8
    # Leaving one person out at a time: 8 times two others said red, twice one did.
    assert vqa_accuracy("Red", ten) == pytest.approx((8 * 2 / 3 + 2 * 1 / 3) / 10)
    assert vqa_accuracy("blue", ten) == 1.0 and vqa_accuracy("green", ten) == 0.0
    assert vqa_accuracy("a dog", ["dog"]) == 1.0 == exact_match("the dog", ["cat", "dog"])
    assert exact_match("dogs", ["dog"]) == 0.0
    for metric in (vqa_accuracy, exact_match):
        with pytest.raises(ValueError, match="at least one answer"):
            metric("a", [])


def test_modules_give_what_the_functions_give() -> None:
    folder = Path(mmft.metrics.__file__).parent / "modules"

    def compute(name: str, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        return evaluate.load(str(folder / f"{name}.py")).compute(predictions=predictions, references=references)

    assert compute("cider_d", GOOD, REFERENCES)["cider_d"] == pytest.approx(0.56374, abs=1e-5)
    assert compute("chrf", ["a dog"], [["a dog"]]) == {"chrf": pytest.approx(1.0)}
    assert compute("vqa_accuracy", ["two", "x"], [["2"], ["y"]]) == {"vqa_accuracy": 0.5, "exact_match": 0.5}


def rows() -> list[Row]:
    return [Row(str(i), None, "p", tuple(of)) for i, of in enumerate(REFERENCES)]


def test_reference_terms() -> None:
    term = build_term("cider_d")
    term.fit(rows())
    scores = term(GOOD, rows(), [True, False])
    assert sum(scores) > sum(term(BAD, rows(), [True, False])) > 0
    again = build_term("cider_d")
    again.load_state_dict(json.loads(json.dumps(term.state_dict())))
    assert again(GOOD, rows(), [True, False]) == scores
    assert build_term("rouge_l")(["two cats"], rows()[:1])[0] == pytest.approx(2 * 2 / (2 + 8))
    assert build_term("chrf")(GOOD, rows())[0] > 0


def test_cider_between_is_the_mean_over_the_other_pictures() -> None:
    pictures = {"a": REFERENCES[0], "b": REFERENCES[1], "c": ["a dog runs", "a dog"], "d": ["two cats", "a grey cat"]}
    cider = CiderD(count_end=True).fit(pictures.values())
    between = CiderBetween(cider, pictures)
    for caption, ended in (("a grey cat is cuddling", True), ("a dog runs and runs", False), ("", True)):
        for apart in ("a", "c", "elsewhere"):
            others = [cider.score(caption, of, ended) for key, of in pictures.items() if key != apart]
            assert between.score(caption, apart, ended) == pytest.approx(sum(others) / len(others), abs=1e-12)
    assert CiderBetween(cider, {"a": ["a dog"]}).score("a dog", "a") == 0.0
    with pytest.raises(ValueError, match="at least one picture"):
        CiderBetween(cider, {})


def test_with_contrast_what_fits_every_picture_earns_nothing() -> None:
    """The best caption written blind: on average over the pictures it was compared with it earns exactly nothing."""
    data = [
        Row(str(i), None, "p", (text, f"{text} here")) for i, text in enumerate(["a red dog", "a red cat", "one owl"])
    ]
    plain, contrast = build_term("cider_d"), build_term("cider_d", contrast=1.0)
    plain.fit(data)
    contrast.fit(data)
    for blind in ("a red", "a red dog", "owl here"):
        assert sum(plain([blind] * 3, data)) > 0
        assert sum(contrast([blind] * 3, data)) == pytest.approx(0, abs=1e-12)
    seen = [row.references[0] for row in data]
    assert min(contrast(seen, data)) > 1
    again = build_term("cider_d", contrast=1.0)
    again.load_state_dict(json.loads(json.dumps(contrast.state_dict())))
    assert again(seen, data) == contrast(seen, data)


def test_answer_terms_name_the_row_without_an_answer() -> None:
    asked = Row("7", None, "what?", (), "what?", "a dog")
    several = Row("8", None, "what?", (), "what?", "x", answers=("cat", "cat", "cat", "cat", "dog"))
    assert build_term("vqa_accuracy")(["dog", "cat"], [asked, several]) == [1.0, pytest.approx(1.0)]
    assert build_term("exact_match")(["cat", "x"], [asked, several]) == [0.0, 0.0], "answers come before answer"
    with pytest.raises(UserError, match=r"row '9' has no answer .* data.columns.answer"):
        build_term("exact_match")(["a"], [Row("9", None, "p")])


def test_a_recipe_with_all_of_them() -> None:
    terms = "reward.terms=[{type: cider_d, weight: 0.1}, {type: chrf}, {type: rouge_l}]"
    recipe = load_recipe("caption_ppo_fixed", [terms])
    reward = build_reward(recipe.reward)
    reward.fit(rows())
    output = reward(GOOD, rows(), finished=[True, True])
    assert set(output.raw) == {"cider_d", "chrf", "rouge_l"}
    assert output.weighted["cider_d"][0] == pytest.approx(0.1 * output.raw["cider_d"][0])


def test_evaluation_measures_what_rows_allow() -> None:
    scores = evaluate_captions([*GOOD, "dog"], [*rows(), Row("9", None, "what?", (), "what?", "a dog")])
    assert scores["cider_d"][:2] == pytest.approx(corpus_cider_d(GOOD, REFERENCES))
    assert math.isnan(scores["cider_d"][2]) and scores["vqa_accuracy"][2] == 1.0 and math.isnan(scores["chrf"][2])
    briefly = Row("9", None, "Briefly: what?", (), "what?", "a dog")
    assert evaluate_captions(["dog"], [briefly])["exact_match"][0] == 1.0
    unasked = evaluate_captions(["dog"], [Row("9", None, "Describe.", ("a dog",), "what?", "a dog")])
    assert "vqa_accuracy" not in unasked, "the question was not asked"
    assert not {"cider_d", "chrf"} & evaluate_captions(GOOD, rows(), only="rouge_l").keys()


def test_what_a_reward_holds_cannot_guard_it() -> None:
    row = rows()[0]
    assert choose_metric("auto", row, {"rouge_l"}) == "bleu_4"
    assert choose_metric("auto", row, {"rouge_l", "bleu"}) == "chrf"
    with pytest.raises(UserError, match="'chrf' is in the reward"):
        choose_metric("chrf", row, {"chrf"})
    with pytest.raises(UserError, match="'cider_d' cannot be measured here"):
        choose_metric("cider_d", row, set())


@pytest.fixture(scope="module", params=["clip", "siglip"])
def two_towers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_towers.two_towers(request.param, tmp_path_factory.mktemp(request.param))


def test_clip_score(two_towers: Path) -> None:
    from mmft.models.clip_score import ClipScore, picture_key

    pictures = [Row(str(i), Image.new("RGB", (20, 20), colour), "p", ("a dog", "two dogs")) for i, colour in
                enumerate(("red", "blue", "white"))]  # fmt: skip
    clip = ClipScore(str(two_towers))
    captions = ["a dog", "a red cat", "two cows on a yellow background"]
    scores = clip(captions, pictures)
    assert all(0 <= score <= 2.5 for score in scores)
    assert clip(captions[1:2], pictures[1:2]) == pytest.approx(scores[1:2], abs=1e-5), "alone as in a batch"
    assert len(clip._pictures) == 3, "each picture is kept"
    other = Row("0", pictures[1].image, "p")
    assert clip(captions[1:2], [other]) == pytest.approx(scores[1:2], abs=1e-5), "by what it shows, not by its row"
    key = next(iter(clip._pictures))
    red = next(row for row in pictures if picture_key(row.image) == key)
    vector = clip._pictures[key]
    clip._pictures[key] = clip._texts(["a dog"])[0]
    assert clip(["a dog"], [red]) == pytest.approx([2.5], abs=1e-4), "cosine 1"
    assert clip(["a dog"], [red], True) == pytest.approx([2 * 2.5 / 3.5], abs=1e-4)
    clip._pictures[key] = -clip._texts(["a dog"])[0]
    assert clip(["a dog"], [red]) == [0.0] == clip(["a dog"], [red], True)
    assert vector.norm() == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(UserError, match="row 'x' has no picture"):
        clip(["a"], [Row("x", None, "p")])


def test_clip_models_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        build_term("clip_score", model=str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="cannot be loaded"):
        build_term("clip_score", model=str(tmp_path))
