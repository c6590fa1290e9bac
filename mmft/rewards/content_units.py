"""What a caption says, as a set of content units: the words that name things, and what is bound to them.

A unit is a tuple of strings:
    (noun,)                      an informative word, stemmed:                    dog
    (modifier, noun)             a number, colour, size or other word in its phrase: two dog, red apple
    (noun, relation, noun)       neighbouring noun phrases and what links them:   dog beside apple

"two red apples and a dog on a blue background" gives apple, dog, background; two apple, red apple, one dog,
one background, blue background; dog on background. Being a set, it does not grow when something is said twice.

This is a shallow reading by word lists, exact for plain captions and harmless elsewhere: an unlisted adjective before
a noun is a word of its own and is bound to the word after it. Numbers, colours and sizes count only with the thing they
describe, so that the right colour on the wrong thing earns nothing. A singular article counts as one: "a dog" is wrong
where there are two. Bound words that say the same are one (big = large, next to = beside, below = above reversed).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

from mmft.metrics.lexicon import (
    ARTICLES,
    COLOURS,
    COPULAS,
    FUNCTION_WORDS,
    NUMBER_NAMES,
    NUMBERS,
    SAME_SIZE,
    SIZES,
)
from mmft.metrics.text import clauses, stem

Unit = tuple[str, ...]

_SAME = {**SAME_SIZE, "gray": "grey"}
# Prepositions that say the same are one relation; those of _SYMMETRIC read the same from either side.
_RELATIONS = {
    **dict.fromkeys(("beside", "next", "near", "by", "alongside"), "beside"),
    **dict.fromkeys(("under", "below", "beneath", "underneath"), "below"),
    **dict.fromkeys(("above", "over"), "above"),
    **dict.fromkeys(("in", "inside", "within", "into"), "in"),
    **dict.fromkeys(("on", "onto", "upon", "atop"), "on"),
    **dict.fromkeys(("around", "round"), "around"),
    **{
        word: word
        for word in ("behind", "front", "between", "with", "without", "at", "of", "across", "against", "through")
    },
}
_SYMMETRIC = {"beside", "with"}
_VAGUE = {"in", "on", "of", "at"}  # "in front of" is a relation of front
_INVERSE = {"below": "above"}  # an apple below a dog is a dog above an apple


@dataclass
class _Phrase:
    """A noun phrase: `gap` holds the function words before it, `attributes` its numbers, colours and sizes."""

    gap: list[str] = field(default_factory=list)
    article: bool = False
    attributes: list[str] = field(default_factory=list)
    nouns: list[str] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        return not (self.attributes or self.nouns)

    def close(self) -> _Phrase:
        """ "an orange", "two whites": a described colour with nothing after it is the thing itself."""
        described = self.article or len(self.attributes) > 1
        if described and not self.nouns and self.attributes and self.attributes[-1] not in NUMBER_NAMES:
            self.nouns.append(self.attributes.pop())
        return self

    def modifiers(self) -> list[str]:
        """The attributes, with "one" for a singular article unless a number is given."""
        counted = any(word in NUMBER_NAMES for word in self.attributes)
        return ["one", *self.attributes] if self.article and not counted else self.attributes


@lru_cache(maxsize=2048)
def content_units(caption: str) -> frozenset[Unit]:
    """The content units of a caption."""
    units: set[Unit] = set()
    for words in clauses(caption):
        head: str | None = None
        for phrase in _phrases(words):
            if phrase.nouns:
                units.update(_phrase_units(phrase))
                if head and (relation := _relation(phrase.gap)):
                    units.add(_relation_unit(head, relation, phrase.nouns[-1]))
                head = phrase.nouns[-1]
            elif head and any(word in COPULAS for word in phrase.gap):
                units.update((word, head) for word in phrase.attributes)  # "the apple is red"
            else:
                units.update((word,) for word in phrase.attributes)
    return frozenset(units)


def _phrases(words: tuple[str, ...]) -> Iterator[_Phrase]:
    phrase = _Phrase()
    for word in words:
        number = NUMBERS.get(word)
        if word == "of" and phrase.attributes and not phrase.nouns:
            continue  # "a pair of shoes" are two shoes
        if word in FUNCTION_WORDS:
            if word in ("and", "or") and phrase.attributes and not phrase.nouns:
                continue  # "a red and blue ball"
            if not phrase.empty:
                yield phrase.close()
                phrase = _Phrase()
            if word in ARTICLES:
                phrase.article = word != "the"
            else:
                phrase.gap.append(word)
        elif number or word in COLOURS or word in SIZES:
            if phrase.nouns or (number and phrase.attributes):
                yield phrase.close()
                phrase = _Phrase()
            phrase.attributes.append(number or _SAME.get(word, word))
        else:
            phrase.nouns.append(stem(word))
    if not phrase.empty:
        yield phrase.close()


def _phrase_units(phrase: _Phrase) -> Iterator[Unit]:
    nouns = phrase.nouns
    yield from ((noun,) for noun in nouns)
    yield from ((word, nouns[0]) for word in phrase.modifiers())
    yield from ((first, second) for first, second in pairwise(nouns) if first != second)


def _relation(gap: list[str]) -> str | None:
    found = [_RELATIONS[word] for word in gap if word in _RELATIONS]
    if not found or "and" in gap or "or" in gap:
        return None
    return next((name for name in found if name not in _VAGUE), found[0])


def _relation_unit(first: str, relation: str, second: str) -> Unit:
    if relation in _INVERSE:
        return (second, _INVERSE[relation], first)
    if relation in _SYMMETRIC:
        first, second = sorted((first, second))
    return (first, relation, second)
