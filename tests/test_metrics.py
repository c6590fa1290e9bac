"""Caption metrics against arithmetic by hand."""

from __future__ import annotations

import math
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

import mmft.metrics
from mmft.metrics.bleu import corpus_bleu, sentence_bleu
from mmft.metrics.rouge_l import lcs_length, rouge_l
from mmft.metrics.text import (
    bad_ending,
    clauses,
    content_words,
    distinct_n,
    repetition_rate,
    stem,
    tokenise,
)

MODULES = Path(mmft.metrics.__file__).parent / "modules"


def test_tokenise_drops_case_and_punctuation() -> None:
    assert tokenise("Two RED apples, a dog's t-shirt... 3!") == ("two", "red", "apples", "a", "dog's", "t-shirt", "3")
    assert tokenise("") == tokenise(" ... !? ") == ()


def test_tokenise_sees_one_word_in_every_unicode_form() -> None:
    assert tokenise(unicodedata.normalize("NFD", "Café")) == ("café",)
    assert tokenise("दो सेब।") == ("दो", "सेब")  # vowel signs stay, the danda goes


def test_clauses_split_at_punctuation() -> None:
    assert clauses("a dog, two cats. Red-hot!") == [("a", "dog"), ("two", "cats"), ("red-hot",)]


@pytest.mark.parametrize(
    "pair",
    [
        "apple/apples",
        "box/boxes",
        "fox/foxes",
        "bus/buses",
        "leaf/leaves",
        "knife/knives",
        "cherry/cherries",
        "cookie/cookies",
        "shoe/shoes",
        "tomato/tomatoes",
        "house/houses",
        "key/keys",
        "octopus/octopuses",
        "glass/glasses",
        "giraffe/giraffes",
        "bee/bees",
        "man/men",
        "peach/peaches",
        "horse/horses",
        "zoo/zoos",
    ],
)
def test_stem_joins_singular_and_plural(pair: str) -> None:
    singular, plural = pair.split("/")
    assert stem(singular) == stem(plural)


def test_stem_keeps_words_apart() -> None:
    words = ["cap", "cape", "car", "care", "pin", "pine", "bus", "glass", "gas", "plan", "plane", "star", "stair"]
    assert len({stem(word) for word in words}) == len(words)


def test_repetition_rate() -> None:
    # content: dog dog; the second repeats the word before it: 1 of 2
    assert repetition_rate("a dog and a dog") == 0.5
    # red apple red car: no bigram comes twice
    assert repetition_rate("a red apple and a red car") == 0.0
    # two apple dog two apple dog: "two apple" and "apple dog" come again: 2 of 6
    assert repetition_rate("two apples and a dog and two apples and a dog") == pytest.approx(2 / 6)
    assert repetition_rate("dog dog dog") == pytest.approx(2 / 3)
    assert repetition_rate("and the and the") == repetition_rate("") == 0.0


def test_distinct_n() -> None:
    # bigrams: a dog, dog ran | a dog: 2 distinct of 3
    assert distinct_n(["a dog ran", "a dog"], 2) == pytest.approx(2 / 3)
    assert distinct_n(["dog", ""], 2) == 0.0


@pytest.mark.parametrize(
    "text", ["", "a dog and", "a dog next to the", "two cats on", "a dog and a red", "owls and two", "it is"]
)
def test_bad_endings(text: str) -> None:
    assert bad_ending(text)


@pytest.mark.parametrize("text", ["a dog", "the apple is red", "black and white", "two cats on the left.", "orange"])
def test_good_endings(text: str) -> None:
    assert not bad_ending(text)
    assert bad_ending(text, finished=False)


def test_content_words() -> None:
    assert content_words("There are two Apples on the left") == ["two", "apple", "left"]


def test_sentence_bleu_by_hand() -> None:
    # caption: a dog sat; references: "a dog ran", "the cat sat". Clipped matches over both references:
    # unigrams a, dog, sat: 3/3; bigrams a-dog of {a-dog, dog-sat}: 1/2; trigram 0/1, smoothed by exp to 1/2 of 1.
    # Length 3 = closest reference length, so no brevity penalty; three orders exist.
    expected = (1.0 * 0.5 * 0.5) ** (1 / 3)
    assert sentence_bleu("A dog sat", ["a dog ran", "the cat sat"]) == pytest.approx(expected)
    # add-k, k = 1, from bigrams on: 3/3, (1+1)/(2+1), (0+1)/(1+1); the fourth order gets (0+1)/(0+1) = 1.
    expected = (1.0 * 2 / 3 * 1 / 2 * 1) ** (1 / 4)
    assert sentence_bleu("a dog sat", ["a dog ran", "the cat sat"], smoothing="add-k") == pytest.approx(expected)
    # Unigrams alone, one word short: 2/2 times exp(1 - 3/2).
    assert sentence_bleu("a dog", ["a dog ran"], max_order=1) == pytest.approx(math.exp(-0.5))


def test_sentence_bleu_bounds_and_errors() -> None:
    assert sentence_bleu("a dog", ["x y", "a dog"]) == pytest.approx(1.0)
    assert sentence_bleu("", ["a dog"]) == sentence_bleu("owl", ["a dog"]) == 0.0
    with pytest.raises(ValueError, match="at least one reference"):
        sentence_bleu("a dog", [])
    with pytest.raises(ValueError, match="smoothing"):
        sentence_bleu("a dog", ["a dog"], smoothing="magic")


def test_corpus_bleu_takes_ragged_references() -> None:
    scores = corpus_bleu(["a big dog ran home", "a cat"], [["a big dog ran home", "dog"], ["one cat"]])
    # unigrams: 5/5 and 1/2 -> 6/7; lengths 7 and 5 + 2 -> no penalty
    assert scores["bleu_1"] == pytest.approx(6 / 7)
    # bigrams: 4/4 and 0/1 -> 4/5
    assert scores["bleu_2"] == pytest.approx(math.sqrt(6 / 7 * 4 / 5))
    assert set(scores) == {"bleu_1", "bleu_2", "bleu_3", "bleu_4"}
    with pytest.raises(ValueError, match="at least one reference"):
        corpus_bleu(["a"], [[]])


def test_rouge_l_by_hand() -> None:
    # LCS(a red dog on grass, a dog on the grass) = a dog on grass = 4; 2*4 / (5 + 5)
    assert rouge_l("a red dog on grass", ["two cats", "A dog on the grass."]) == pytest.approx(0.8)
    assert rouge_l("", ["a dog"]) == 0.0
    with pytest.raises(ValueError, match="at least one reference"):
        rouge_l("a dog", [])


@pytest.mark.parametrize(
    ("a", "b", "length"), [("abcbdab", "bdcaba", 4), ("aaaa", "aa", 2), ("", "ab", 0), ("ab", "ba", 1)]
)
def test_lcs_length(a: str, b: str, length: int) -> None:
    assert lcs_length(a, b) == lcs_length(b, a) == length


def test_metrics_import_no_torch() -> None:
    code = "import sys, mmft.metrics.bleu, mmft.metrics.rouge_l, mmft.metrics.text; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_evaluate_modules_load_and_agree(tmp_path: Path) -> None:
    import evaluate

    captions, references = ["a dog sat", "two cats"], [["a dog ran", "the cat sat"], ["two cats"]]

    def load(name: str) -> evaluate.EvaluationModule:
        return evaluate.load(str(MODULES / f"{name}.py"), cache_dir=str(tmp_path))

    bleu = load("bleu").compute(predictions=captions, references=references)
    mean = (sentence_bleu(captions[0], references[0]) + 1.0) / 2
    assert bleu == pytest.approx({**corpus_bleu(captions, references), "sentence_bleu": mean})
    assert load("rouge_l").compute(predictions=captions, references=references) == pytest.approx(
        {"rouge_l": (2 * 2 / 6 + 1) / 2}
    )
    text = load("text").compute(predictions=["a dog and a dog", "two cats and"])
    assert text == pytest.approx(
        {"length": 4.0, "repetition": 0.25, "bad_ending": 0.5, "distinct_1": 5 / 8, "distinct_2": 5 / 6}
    )
