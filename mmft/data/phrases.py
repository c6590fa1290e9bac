"""A shallow reading of an English caption that keeps its spelling: words with their punctuation, and noun phrases.

By word lists, as `mmft.rewards.content_units`, but with the place of each phrase in the text, so that it can be edited:
"a big dog on the left" has one phrase, "a big dog", whose noun is "dog". Exact for plain captions; elsewhere a phrase
may take in an adjective, or miss a noun.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from mmft.metrics.lexicon import (
    ARTICLES,
    COLOURS,
    FUNCTION_WORDS,
    IRREGULAR_PLURALS,
    NUMBERS,
    SIZES,
)


def _words(*lines: str) -> frozenset[str]:
    return frozenset(" ".join(lines).split())


# Where things are, and the picture itself: nothing that could be taken for another thing.
PLACES = _words(
    "left right top bottom middle center centre side corner front back foreground background",
    "picture image photo photograph scene view",
)
_DETERMINERS = ARTICLES | _words(
    "some another each every any no this that these those his her its their my your our both all"
)
_VERBS = _words(
    "sits stands lies rests hangs holds rides runs walks plays eats drinks flies jumps looks watches wears carries",
    "pulls pushes reads sleeps swims catches throws kicks drives follows touches covers fills has have",
)
_NOUNS_LIKE_VERBS = _words(
    "building ceiling string spring evening morning wedding clothing railing painting drawing something nothing",
    "speed breed seaweed hundred",
)
_EDGES = re.compile(r"^(\W*)(.*?)(\W*)$", re.DOTALL)
_PLURAL_OF = {
    **{singular: plural for plural, singular in IRREGULAR_PLURALS.items()},
    **{noun: noun for noun in _words("fish sheep deer bison moose salmon trout aircraft")},
    **{noun: f"{noun}es" for noun in _words("tomato potato hero")},
    **{noun: f"{noun[:-1]}ves" for noun in _words("leaf wolf calf half shelf bookshelf loaf thief scarf hoof")},
    **{noun: f"{noun[:-2]}ves" for noun in _words("knife wife life")},
}
_SINGULAR_OF = {plural: singular for singular, plural in _PLURAL_OF.items()}
_COPULA_OF = {"is": "are", "was": "were", "are": "is", "were": "was"}


@dataclass(frozen=True)
class Token:
    """One stretch between spaces: a word, and the punctuation before and after it."""

    before: str
    word: str
    after: str

    @property
    def key(self) -> str:
        return self.word.lower()

    def __str__(self) -> str:
        return f"{self.before}{self.word}{self.after}"


@dataclass(frozen=True)
class Phrase:
    """A noun phrase, tokens start..end (end left out); its noun, of one or more words, begins at `noun`.

    form: `singular` (a dog, the dog), `plural` (two dogs, the dogs), `some` (some dogs, some corn), `bare` (corn).
    """

    start: int
    noun: int
    end: int
    form: str


@lru_cache(maxsize=65536)
def split_tokens(caption: str) -> tuple[Token, ...]:
    """The tokens of a caption; joined by spaces they are the caption with its white space evened."""
    return tuple(Token(*match.groups()) for part in caption.split() if (match := _EDGES.match(part)))


@lru_cache(maxsize=65536)
def noun_phrases(tokens: tuple[Token, ...]) -> tuple[Phrase, ...]:
    """The noun phrases of a caption in their order. Places ("on the left") and the picture itself are none."""
    found: list[Phrase] = []
    start: int | None = None
    noun: int | None = None
    for i, token in enumerate([*tokens, Token("", "", "")]):
        word = token.key
        opens = word in _DETERMINERS or word in NUMBERS
        if noun is None and start is not None and _goes_on(tokens, start, i):
            pass  # "the two dogs", "a red and blue ball"
        elif opens or _breaks(word, noun is not None) or (start is None and is_verb(word)):
            if start is not None:
                found += _closed(tokens, start, noun, i)
            start, noun = (i, None) if opens else (None, None)
        else:
            start = i if start is None else start
            noun = i if noun is None and not _describes(word) else noun
        if token.after and start is not None:
            found += _closed(tokens, start, noun, i + 1)
            start = noun = None
    return tuple(found)


def _goes_on(tokens: Sequence[Token], start: int, i: int) -> bool:
    """Whether token i, an "and" or a number, is inside the noun phrase that began at `start` and has no noun yet."""
    if i >= len(tokens):
        return False
    word = tokens[i].key
    if word in ("and", "or"):
        after = tokens[i + 1].key if i + 1 < len(tokens) else ""
        return tokens[i - 1].key in COLOURS | SIZES and after in COLOURS | SIZES
    return word in NUMBERS and not any(token.key in NUMBERS for token in tokens[start:i])


def _describes(word: str) -> bool:
    return word in SIZES or not COLOURS.isdisjoint(word.split("-"))  # black-and-white


def _breaks(word: str, has_noun: bool) -> bool:
    return not word or word in FUNCTION_WORDS or word in PLACES or (has_noun and is_verb(word))


def is_verb(word: str) -> bool:
    """Whether a word after a noun says what the thing does: riding, holds, parked."""
    if word in _VERBS:
        return True
    return word not in _NOUNS_LIKE_VERBS and (
        (len(word) > 5 and word.endswith("ing")) or (len(word) > 4 and word.endswith("ed"))
    )


def _closed(tokens: Sequence[Token], start: int, noun: int | None, end: int) -> list[Phrase]:
    first = tokens[start].key
    if noun is None:  # "an orange": a described colour with nothing after it is the thing itself
        of_place = end < len(tokens) and tokens[end].key in PLACES  # "a white background"
        if end - start < 2 or tokens[end - 1].key not in COLOURS or of_place:
            return []
        noun = end - 1
    if tokens[end - 1].key in PLACES:  # a place that punctuation closed
        return []
    number = next((NUMBERS[token.key] for token in tokens[start:noun] if token.key in NUMBERS), None)
    if number is not None:
        form = "singular" if number == "one" else "plural"
    elif first == "some":
        form = "some"
    elif first in ("a", "an", "another", "each", "every"):
        form = "singular"
    elif looks_plural(tokens[end - 1].key):
        form = "plural"
    else:
        form = "singular" if first in _DETERMINERS else "bare"
    return [Phrase(start, noun, end, form)]


def looks_plural(word: str) -> bool:
    return word in IRREGULAR_PLURALS or (len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")))


def plural_of(noun: str) -> str:
    """The plural of one English noun by the common rules: box -> boxes, berry -> berries, man -> men."""
    if noun in _PLURAL_OF:
        return _PLURAL_OF[noun]
    if noun.endswith(("s", "x", "z", "ch", "sh")):
        return f"{noun}es"
    return f"{noun[:-1]}ies" if noun.endswith("y") and noun[-2:-1] not in "aeiou" else f"{noun}s"


def singular_of(noun: str) -> str:
    """The singular of one English noun by the common rules: boxes -> box, berries -> berry, men -> man."""
    if noun in _SINGULAR_OF or not looks_plural(noun):
        return _SINGULAR_OF.get(noun, noun)
    if noun.endswith("ies") and len(noun) > 4:
        return f"{noun[:-3]}y"
    return noun[:-2] if noun.endswith(("sses", "uses", "xes", "zes", "ches", "shes")) else noun[:-1]


def with_article(word: str) -> str:
    """ "a" or "an", as the spelling of the word after it asks."""
    return "an" if word[:1].lower() in tuple("aeiou") else "a"


def agreeing(tokens: Sequence[Token], phrase: Phrase, plural: bool) -> dict[tuple[int, int], list[str]]:
    """Edits that make the is or are beside a phrase fit its number: after it, or before it in "there is"."""
    edits = {}
    for i in (phrase.end, phrase.start - 1):
        if not 0 <= i < len(tokens) or tokens[i].key not in _COPULA_OF or tokens[min(i, phrase.end - 1)].after:
            continue
        if i < phrase.start and (i == 0 or tokens[i - 1].key != "there"):
            continue
        if (tokens[i].key in ("are", "were")) != plural:
            edits[i, i + 1] = [_COPULA_OF[tokens[i].key]]
    return edits


def edited(tokens: Sequence[Token], edits: Mapping[tuple[int, int], Sequence[str]]) -> str:
    """The caption with tokens start..end of each edit replaced by words (none: taken out).

    Punctuation around an edit stays, an article before it is made to fit, and a capital at the beginning stays there.
    """
    places = dict(sorted(edits.items()))
    out: list[str] = []
    i = 0
    while i < len(tokens):
        span = next((span for span in places if span[0] == i), None)
        if span is None:
            out.append(str(tokens[i]))
            i += 1
            continue
        words = list(places[span])
        if words and out and out[-1].lower() in ("a", "an"):
            article = with_article(words[0])
            out[-1] = article.capitalize() if out[-1][0].isupper() else article
        if words:
            words[0] = tokens[i].before + words[0]
            words[-1] += tokens[span[1] - 1].after
        out += words
        i = max(span[1], i + 1)
    return as_sentence(" ".join(out), tokens)


def as_sentence(text: str, tokens: Sequence[Token]) -> str:
    """`text` beginning with a capital where the caption does."""
    capital = bool(tokens) and tokens[0].word[:1].isupper()
    return text[:1].upper() + text[1:] if capital else text


def words_of(tokens: Sequence[Token], start: int, end: int) -> list[str]:
    """The words of tokens start..end; the caption's first word without the capital of a beginning."""
    words = [token.word for token in tokens[start:end]]
    if start == 0 and words and (len(words[0]) == 1 or words[0][1:].islower()):
        words[0] = words[0].lower()
    return words
