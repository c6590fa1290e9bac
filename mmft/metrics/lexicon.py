"""The closed word lists of English that reading a caption needs: function words, numbers, colours, sizes."""

from __future__ import annotations


def _words(*lines: str) -> frozenset[str]:
    return frozenset(" ".join(lines).split())


ARTICLES = _words("a an the")
CONJUNCTIONS = _words("and or but nor while as because than plus")
COPULAS = _words("is are was were be being been am")
PREPOSITIONS = _words(
    "about above across against along alongside among around at atop behind below beneath beside between beyond by",
    "down during facing for from front in inside into near next of off on onto opposite out outside over past through",
    "to toward towards under underneath up upon with within without",
)
# Postures and "is shown" only link a thing to its place, so they count as function words.
POSTURES = _words("sitting standing lying placed located positioned situated shown seen visible depicted appearing")
FUNCTION_WORDS = frozenset().union(
    *(ARTICLES, CONJUNCTIONS, COPULAS, PREPOSITIONS, POSTURES),
    _words("there here this that these those it its it's they them their he him his she her who which what where when"),
    _words("i you your we our my me has have had having do does did can could will would may might shall should must"),
    _words("not no so also too very just only both each every all any some another other same such then together"),
)
# Words that leave a caption hanging when they come last.
DANGLING = ARTICLES | CONJUNCTIONS | COPULAS | PREPOSITIONS | _words("its their his her very some")

_COUNTING = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
NUMBERS = {
    **{word: word for word in _COUNTING},
    **{str(value): word for value, word in enumerate(_COUNTING, start=1)},
    "single": "one",
    "lone": "one",
    "pair": "two",
    "couple": "two",
    "trio": "three",
    "dozen": "twelve",
    **{word: word for word in ("several", "many", "few", "multiple")},
}
NUMBER_NAMES = frozenset(NUMBERS.values())
COLOURS = _words(
    "red orange yellow green blue purple violet pink brown black white grey gray beige teal turquoise cyan magenta",
    "navy gold golden silver cream tan lavender maroon",
)
SIZES = _words("big large huge giant small little tiny medium tall short long wide light dark pale bright")
# Adjectives of size that say the same are one attribute.
SAME_SIZE = {"large": "big", "huge": "big", "giant": "big", "little": "small", "tiny": "small"}

IRREGULAR_PLURALS = {
    "men": "man",
    "women": "woman",
    "children": "child",
    "people": "person",
    "feet": "foot",
    "teeth": "tooth",
    "mice": "mouse",
    "geese": "goose",
    "oxen": "ox",
}
