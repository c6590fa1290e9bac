"""Accuracy of answers to questions about pictures.

Source: Antol et al., VQA: visual question answering, ICCV 2015: an answer is right as far as three of ten people gave
it, and answers are compared after punctuation, articles, number words and missing apostrophes are put right.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_NUMBERS = {
    word: str(i)
    for i, word in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"))
} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_CONTRACTIONS = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's i'd
    i'll i'm i've isn't it'd it'll let's ma'am might've mightn't must've mustn't needn't o'clock shan't she'd she's
    should've shouldn't somebody's someone's that'd that's there'd there's they'd they'll they're they've wasn't we've
    weren't what'll what's when's where'd where's who'd who'll who's why's won't would've wouldn't y'all you'd you'll
    you're you've
"""
_WITH_APOSTROPHE = {word.replace("'", ""): word for word in _CONTRACTIONS.split()}
_SIGNS = ';/[]"{}()=+\\_-><@`,?!'
_THOUSANDS = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")


def normalise_answer(text: str) -> str:
    """An answer as it is compared: lowercase, without articles and punctuation, number words as digits.

    As in VQA's own evaluation, a sign that stands beside a space anywhere is dropped, and otherwise parts words; rare
    contractions of its list are left as they are.
    """
    given = text = " ".join(text.split())
    for sign in _SIGNS:
        beside = f"{sign} " in given or f" {sign}" in given or _THOUSANDS.search(given)
        text = text.replace(sign, "" if beside else " ")
    words = [_NUMBERS.get(word, word) for word in _FULL_STOP.sub("", text).lower().split()]
    return " ".join(_WITH_APOSTROPHE.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, answers: Sequence[str]) -> float:
    """Mean over people of min(1, how many of the others said so / 3), in [0, 1].

    Fewer than four people's answers: 1 where one of them said so, else 0. Raises ValueError without answers.
    """
    if not answers:
        raise ValueError("VQA accuracy needs at least one answer")
    given, known = normalise_answer(answer), [normalise_answer(other) for other in answers]
    same = [other == given for other in known]
    if len(known) < 4:
        return float(any(same))
    return sum(min(1.0, (sum(same) - mine) / 3) for mine in same) / len(known)


def exact_match(answer: str, answers: Sequence[str]) -> float:
    """1 where the normalised answer is one of `answers`, else 0. Raises ValueError without answers."""
    if not answers:
        raise ValueError("exact match needs at least one answer")
    return float(normalise_answer(answer) in {normalise_answer(other) for other in answers})
