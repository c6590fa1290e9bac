"""Words of a caption and what can be measured on them without references."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from mmft.metrics.lexicon import COLOURS, DANGLING, FUNCTION_WORDS, IRREGULAR_PLURALS, NUMBERS, SIZES

# A word is letters and digits, with vowel signs and accents that Python's \w leaves out (Hebrew, Arabic, Indic, Thai),
# and inner apostrophes and hyphens. Scripts written without spaces need segmenting before they come here.
_LETTER = r"[^\W_\u0964\u0965]|[\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0900-\u0963\u0966-\u0dff\u0e31-\u0e4e]"
_WORD = re.compile(rf"(?:{_LETTER})+(?:['\u2019-](?:{_LETTER})+)*")
_CLAUSE_END = re.compile(
    r"[.,;:!?()\[\]\"\n\u2026\u3001\u3002\uff0c\uff1b\uff1a\uff01\uff1f\u0964\u0965]+|\s[-\u2013\u2014]\s"
)


@lru_cache(maxsize=2048)  # a policy says something new all the time: a large cache would only grow
def tokenise(text: str) -> tuple[str, ...]:
    """Lowercase words of `text` in Unicode NFC, punctuation and symbols dropped."""
    return tuple(_WORD.findall(unicodedata.normalize("NFC", text).lower()))


def clauses(text: str) -> list[tuple[str, ...]]:
    """Words of `text`, a tuple for each stretch between punctuation marks."""
    return [words for part in _CLAUSE_END.split(text) if (words := tokenise(part))]


@lru_cache(maxsize=8192)
def stem(word: str) -> str:
    """One form for singular and plural of an English noun, not always a word: apples -> apple, berries -> berri.

    Only the plural is undone, after Harman's S-stemmer (How effective is suffixing?, JASIS 1991). The endings that
    plurals blur (-xe, -che, -she, -sse, -ze, -use, -oe; -y and -ie; -f, -fe and -ve) are folded on both forms, so that
    box = boxes and leaf = leaves.
    """
    word = IRREGULAR_PLURALS.get(word, word)
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    if len(word) < 4:
        return word
    if word.endswith(("xe", "che", "she", "sse", "ze", "use", "oe", "ie", "fe")):
        return word[:-1]
    if word.endswith("y"):
        return word[:-1] + "i"
    return word[:-2] + "f" if word.endswith("ve") else word


def content_words(text: str) -> list[str]:
    """Stems of the words of `text` that are not function words."""
    return [stem(word) for word in tokenise(text) if word not in FUNCTION_WORDS]


def repetition_rate(text: str, n: int = 2) -> float:
    """Share of content words that say again what was said: in [0, 1), 0 for a caption without content.

    A content word is a repeat when it equals the content word before it, or ends a content n-gram seen earlier:
    "a dog and a dog" has 1 of 2, "a red apple and a red car" none.
    """
    words = content_words(text)
    seen: set[tuple[str, ...]] = set()
    repeats = 0
    for end, word in enumerate(words, start=1):
        ngram = tuple(words[max(0, end - n) : end])
        repeats += ngram in seen or (end > 1 and word == words[end - 2])
        if len(ngram) == n:
            seen.add(ngram)
    return repeats / len(words) if words else 0.0


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Distinct n-grams over all n-grams of all `texts`: 1 = nothing is ever said twice, 0 when there is no n-gram.

    Source: Li et al., A diversity-promoting objective function for neural conversation models, NAACL 2016.
    """
    ngrams = [words[i : i + n] for words in map(tokenise, texts) for i in range(len(words) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def bad_ending(text: str, finished: bool = True) -> bool:
    """True for a caption that does not come to an end: cut off before EOS, empty, or left hanging.

    Left hanging: on a function word ("a dog and", "a dog next to the") or in an open noun phrase ("a red", "and two").
    """
    words = tokenise(text)
    if not finished or not words or words[-1] in DANGLING:
        return True
    if len(words) < 2:
        return False
    before, last = words[-2:]
    described = last in NUMBERS or last in COLOURS or last in SIZES
    return (before in {"a", "an"} and described) or (before == "and" and last in NUMBERS)
