"""What the references of a data set hold between them: the words and captions that corruptions draw from."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from mmft.data.phrases import Phrase, Token, noun_phrases, plural_of, singular_of, split_tokens
from mmft.metrics.lexicon import COLOURS, NUMBERS
from mmft.metrics.text import stem
from mmft.types import Row

COUNTS = {name: int(digits) for digits, name in NUMBERS.items() if digits.isdigit()}  # "one" -> 1
# Shades that one annotator calls by one name, another by the other.
_FAMILIES = (
    "red maroon", "orange", "yellow gold golden cream", "green", "blue navy", "teal turquoise cyan",
    "purple violet lavender", "pink magenta", "brown beige tan", "black", "white", "grey gray silver",
)  # fmt: skip
COLOUR_FAMILY = {word: family.split()[0] for family in _FAMILIES for word in family.split()}

# Where the data itself has too few to choose from.
_PLAIN_COLOURS = ("black", "blue", "brown", "green", "grey", "orange", "pink", "purple", "red", "white", "yellow")
_PLAIN_COUNTS = ("one", "two", "three", "four", "five")
# A reference is generic when this share of the rows has it, and this many rows; of those, the first few.
_COMMON_SHARE, _COMMON_ROWS, _COMMON_MOST = 0.02, 5, 5


@dataclass(frozen=True)
class CaptionPool:
    """References, and the nouns, colours and counts in them, each as often as it occurs, in an order of their own.

    nouns: form of a phrase (`mmft.data.phrases.Phrase`) -> nouns. common: references that many rows have, if any.
    plurals, singulars: stem of a noun -> how the data spells them.
    """

    captions: tuple[str, ...] = ()
    nouns: Mapping[str, Sequence[str]] = field(default_factory=dict)
    colours: tuple[str, ...] = _PLAIN_COLOURS
    counts: tuple[str, ...] = _PLAIN_COUNTS
    common: tuple[str, ...] = ()
    plurals: Mapping[str, str] = field(default_factory=dict)
    singulars: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_rows(cls, rows: Iterable[Row]) -> CaptionPool:
        """The pool of the references of `rows`; the order of the rows does not matter."""
        captions: list[str] = []
        nouns: dict[str, list[str]] = defaultdict(list)
        spelt: dict[str, dict[str, Counter[str]]] = {form: defaultdict(Counter) for form in ("singular", "plural")}
        colours: list[str] = []
        counts: list[str] = []
        times: Counter[str] = Counter()  # in how many rows a reference is
        total = 0
        for row in rows:
            total += 1
            captions += row.references
            times.update(set(row.references))
            for reference in row.references:
                tokens = split_tokens(reference)
                colours += [token.key for token in tokens if token.key in COLOURS]
                for phrase in noun_phrases(tokens):
                    words = [token.key for token in tokens[phrase.noun : phrase.end]]
                    nouns[phrase.form].append(" ".join(words))
                    counts += [name] if (name := count_of(tokens, phrase)) else []
                    if phrase.form in spelt:
                        spelt[phrase.form][stem(words[-1])][words[-1]] += 1
        return cls(
            captions=tuple(sorted(captions)),
            nouns={form: tuple(sorted(words)) for form, words in sorted(nouns.items())},
            colours=tuple(sorted(colours)) if len(set(colours)) > 1 else _PLAIN_COLOURS,
            counts=tuple(sorted(counts)) if len(set(counts)) > 1 else _PLAIN_COUNTS,
            common=_common(times, total),
            plurals=_most_usual(spelt["plural"]),
            singulars=_most_usual(spelt["singular"]),
        )

    def inflected(self, noun: str, plural: bool) -> str:
        """The plural or singular of a noun: as the data spells it, else by rule."""
        known = (self.plurals if plural else self.singulars).get(stem(noun.lower()))
        return known or (plural_of(noun) if plural else singular_of(noun))


def count_of(tokens: Sequence[Token], phrase: Phrase) -> str | None:
    """The exact count that a phrase begins with, by its name: "two dogs", "2 dogs", "a dog" (one). None: no such."""
    first = tokens[phrase.start].key
    if first in ("a", "an"):  # "a single dog", "a dozen eggs" say it another way
        return None if any(token.key in NUMBERS for token in tokens[phrase.start : phrase.noun]) else "one"
    name = NUMBERS.get(first)
    return name if name in COUNTS and (first == name or first.isdigit()) else None


def _common(times: Mapping[str, int], rows: int) -> tuple[str, ...]:
    least = max(_COMMON_ROWS, _COMMON_SHARE * rows)
    ranked = sorted(times.items(), key=lambda item: (-item[1], item[0]))
    return tuple(caption for caption, count in ranked[:_COMMON_MOST] if count >= least)


def _most_usual(spelt: Mapping[str, Counter[str]]) -> dict[str, str]:
    return {key: min(words, key=lambda word: (-words[word], word)) for key, words in sorted(spelt.items())}
