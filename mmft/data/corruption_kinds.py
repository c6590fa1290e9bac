"""The kinds of fault that `mmft.data.corruptions` puts into a caption, one function each.

A function takes the caption with what is true of its picture, a source of chance, and the pool that words are drawn
from; it returns the caption with the fault, or None where the kind does not apply.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, pairwise
from typing import TypeVar

from mmft.data.caption_pool import COLOUR_FAMILY, COUNTS, CaptionPool, count_of
from mmft.data.phrases import (
    PLACES,
    Phrase,
    Token,
    agreeing,
    as_sentence,
    edited,
    is_verb,
    noun_phrases,
    split_tokens,
    with_article,
    words_of,
)
from mmft.metrics.lexicon import ARTICLES, POSTURES, PREPOSITIONS
from mmft.metrics.text import bad_ending, content_words, stem, tokenise

GENERIC = ("a picture of something", "a picture", "there is something in the picture", "an image of some things")
TRIES = 20
_COPULAS = ("is", "are", "was", "were")
# What reads the same from either side, and what relates nothing: no swapped roles around them.
_SYMMETRIC = frozenset(
    ("and", "or", "next", "beside", "near", "by", "alongside", "with", "without", "facing", "opposite", "among")
)
_VAGUE = frozenset(("of", "for", "from", "about", "to", "at", "like", "during", "between", "around", "past"))
_ORDERED = (PREPOSITIONS - _SYMMETRIC - _VAGUE) | {"left", "right"}
T = TypeVar("T")


@dataclass(frozen=True)
class Subject:
    """A caption to corrupt, and `own`, what is true of its picture: the caption and its picture's references."""

    caption: str
    own: tuple[str, ...]

    @cached_property
    def tokens(self) -> tuple[Token, ...]:
        return split_tokens(self.caption)

    @cached_property
    def phrases(self) -> tuple[Phrase, ...]:
        return noun_phrases(self.tokens)

    @cached_property
    def content(self) -> frozenset[str]:
        """Stems of every content word of `own`."""
        return frozenset(word for text in self.own for word in content_words(text))

    def head(self, phrase: Phrase) -> str:
        return self.tokens[phrase.end - 1].key


Corruption = Callable[[Subject, random.Random, CaptionPool], str | None]


def _draw(rng: random.Random, items: Sequence[T], accept: Callable[[T], bool]) -> T | None:
    """One of `items` that is accepted, as often as it occurs among them; None when there is none."""
    for _ in range(TRIES if items else 0):  # a pool holds a million words, and most are accepted
        if accept(item := rng.choice(items)):
            return item
    accepted = [item for item in items if accept(item)]
    return rng.choice(accepted) if accepted else None


# -- wrong words -------------------------------------------------------------------------------------------------------


def _noun(subject: Subject, rng: random.Random, pool: CaptionPool) -> str | None:
    """A dog on a bed -> a kite on a bed."""
    for phrase in rng.sample(subject.phrases, len(subject.phrases)):
        noun = _draw(rng, pool.nouns.get(phrase.form, ()), lambda n: stem(n.split()[-1]) not in subject.content)
        if noun is not None:
            return edited(subject.tokens, {(phrase.noun, phrase.end): noun.split()})
    return None


def _colour(subject: Subject, rng: random.Random, pool: CaptionPool) -> str | None:
    """A red car -> a blue car. Not to a shade of a colour that a reference has."""
    nouns = {i for phrase in subject.phrases for i in range(phrase.noun, phrase.end)}  # an orange is no colour
    places = [i for i, token in enumerate(subject.tokens) if token.key in COLOUR_FAMILY and i not in nouns]
    if not places:
        return None
    taken = {COLOUR_FAMILY[word] for text in subject.own for word in tokenise(text) if word in COLOUR_FAMILY}
    colour = _draw(rng, pool.colours, lambda word: COLOUR_FAMILY[word] not in taken)
    at = rng.choice(places)
    return None if colour is None else edited(subject.tokens, {(at, at + 1): [colour]})


def _count(subject: Subject, rng: random.Random, pool: CaptionPool) -> str | None:
    """Two dogs are -> three dogs are; a dog is -> two dogs are."""
    tokens = subject.tokens
    counted = [(phrase, name) for phrase in subject.phrases if (name := count_of(tokens, phrase))]
    if not counted:
        return None
    phrase, _ = rng.choice(counted)
    said = _counts_said(subject.own, stem(subject.head(phrase)))
    name = _draw(rng, pool.counts, lambda word: word not in said)
    if name is None:
        return None
    noun = words_of(tokens, phrase.noun, phrase.end)
    plural = name != "one"
    if plural != (phrase.form == "plural"):
        noun[-1] = pool.inflected(noun[-1], plural)
    described = words_of(tokens, phrase.start + 1, phrase.noun)
    digits = tokens[phrase.start].word.isdigit()
    number = str(COUNTS[name]) if digits else name if plural else with_article([*described, *noun][0])
    edits = agreeing(tokens, phrase, plural)
    return edited(tokens, {(phrase.start, phrase.end): [number, *described, *noun], **edits})


def _counts_said(texts: Sequence[str], noun: str) -> set[str]:
    said = set()
    for text in texts:
        tokens = split_tokens(text)
        for phrase in noun_phrases(tokens):
            if stem(tokens[phrase.end - 1].key) == noun:
                said.add(count_of(tokens, phrase) or "")
    return said


def _negation(subject: Subject, rng: random.Random, pool: CaptionPool) -> str | None:
    """A dog on a bed -> no dog on a bed; the dog is brown -> the dog is not brown."""
    tokens = subject.tokens
    options: list[dict[tuple[int, int], list[str]]] = []
    for phrase in subject.phrases:
        if tokens[phrase.start].key in ("a", "an", "some") or count_of(tokens, phrase):
            options.append({(phrase.start, phrase.start + 1): ["no"]})
    for i, token in enumerate(tokens[:-1]):
        if token.key in _COPULAS and not token.after and tokens[i + 1].key not in ("not", "no"):
            options.append({(i, i + 1): [token.word, "not"]})
    return edited(tokens, rng.choice(options)) if options else None


def _swapped_roles(subject: Subject, rng: random.Random, pool: CaptionPool) -> str | None:
    """A dog on a bed -> a bed on a dog; a cat on the left and a dog on the right -> a dog on the left and a cat ..."""
    tokens, phrases = subject.tokens, subject.phrases
    pairs = [(first, second) for first, second in pairwise(phrases) if _ordered(tokens[first.end - 1 : second.start])]
    placed = [(phrase, place) for phrase in phrases if (place := _place_of(tokens, phrase))]
    pairs += [(a, b) for (a, there), (b, here) in combinations(placed, 2) if there != here]
    if not pairs:
        return None
    first, second = rng.choice(pairs)
    edits = {
        (first.start, first.end): words_of(tokens, second.start, second.end),
        (second.start, second.end): words_of(tokens, first.start, first.end),
    }
    # "A dog is on two beds" -> "two beds are on a dog"
    return edited(tokens, {**edits, **agreeing(tokens, first, second.form == "plural")})


def _ordered(between: Sequence[Token]) -> bool:
    """Whether what stands between two phrases (with the last word of the first) tells the one from the other."""
    words = [token.key for token in between[1:]]
    if any(token.after for token in between) or not _SYMMETRIC.isdisjoint(words):
        return False
    return any(word in _ORDERED or (is_verb(word) and word not in POSTURES) for word in words)


def _place_of(tokens: Sequence[Token], phrase: Phrase) -> tuple[str, ...]:
    """The words that say where in the picture a phrase is, right after it: ("at", "the", "top", "left")."""
    place: list[str] = []
    for i in range(phrase.end, len(tokens)):
        if tokens[i - 1].after or tokens[i].key not in PREPOSITIONS | ARTICLES | PLACES:
            break
        place.append(tokens[i].key)
    return tuple(place) if any(word in PLACES for word in place) else ()


# -- wrong form --------------------------------------------------------------------------------------------------------


def _truncation(subject: Subject, rng: random.Random, pool: CaptionPool) -> str | None:
    """Cut in its second half, left hanging where that can be: a dog on a bed -> a dog on a."""
    tokens = subject.tokens
    heads = [_joined(tokens[:end]) for end in range(max(1, len(tokens) // 2), len(tokens))]
    hanging = [head for head in heads if bad_ending(head)]
    return rng.choice(hanging or heads) if heads else None


def _repeat(subject: Subject, rng: random.Random, pool: CaptionPool) -> str | None:
    """All of it again, or its last phrase: a dog on a bed -> a dog on a bed and a bed."""
    text = _joined(subject.tokens)
    again = " ".join([*words_of(subject.tokens, 0, 1), *text.split(" ")[1:]])
    if subject.phrases and rng.random() < 0.5:
        last = subject.phrases[-1]
        again = " ".join(words_of(subject.tokens, last.start, last.end))
    return _written_as(subject, text + rng.choice((" ", ", ", " and ")) + again)


def _shuffle(subject: Subject, rng: random.Random, pool: CaptionPool) -> str | None:
    """Its words in another order, in which most neighbours are new: a dog and a cat -> not "a cat and a dog"."""
    words = words_of(subject.tokens, 0, len(subject.tokens))
    known = {pair for text in subject.own for pair in pairwise(tokenise(text))}
    for _ in range(TRIES):
        mixed = " ".join(rng.sample(words, len(words)))
        pairs = list(pairwise(tokenise(mixed)))
        if sum(pair not in known for pair in pairs) > len(pairs) / 2:
            return _written_as(subject, mixed)
    return None


def _generic(subject: Subject, rng: random.Random, pool: CaptionPool) -> str | None:
    """What fits many pictures: its things not named (something on a bed), a caption without content, or one that many
    rows of the data have.
    """
    options = [*GENERIC, *(text for text in pool.common if not subject.content.issuperset(content_words(text)))]
    if subject.phrases:
        vague = {"plural": ["some", "things"]}
        spans = {(phrase.start, phrase.end): vague.get(phrase.form, ["something"]) for phrase in subject.phrases}
        options += [_joined(split_tokens(edited(subject.tokens, spans)))]
    return _written_as(subject, rng.choice(options))


def _noun_list(subject: Subject, rng: random.Random, pool: CaptionPool) -> str | None:
    """Bare nouns: a dog on a bed -> dog bed."""
    nouns = [" ".join(words_of(subject.tokens, phrase.noun, phrase.end)) for phrase in subject.phrases]
    return _written_as(subject, rng.choice((" ", ", ")).join(nouns)) if nouns else None


def _other_picture(subject: Subject, rng: random.Random, pool: CaptionPool) -> str | None:
    """A reference of another row, which says something that none of this row's does."""
    return _draw(rng, pool.captions, lambda text: not subject.content.issuperset(content_words(text)))


def _joined(tokens: Sequence[Token]) -> str:
    """The tokens as text, without the punctuation at its end."""
    return " ".join(map(str, tokens)).rstrip(" .,;:!?")


def _written_as(subject: Subject, text: str) -> str:
    """`text` with a capital and a full stop where the caption has them."""
    end = subject.tokens[-1].after if subject.tokens else ""
    return as_sentence(text, subject.tokens) + (end if end in (".", "!", "?") else "")


CORRUPTIONS: dict[str, Corruption] = {
    "noun": _noun,
    "colour": _colour,
    "count": _count,
    "negation": _negation,
    "swapped_roles": _swapped_roles,
    "truncation": _truncation,
    "repeat": _repeat,
    "shuffle": _shuffle,
    "generic": _generic,
    "noun_list": _noun_list,
    "other_picture": _other_picture,
}
