"""CIDEr-D: n-grams that people agree on for this picture, and do not say of every picture.

Source: Vedantam, Zitnick and Parikh, CIDEr: consensus-based image description evaluation, CVPR 2015, equations 1 to 5;
counted as in the evaluation server of COCO captions. Words: `mmft.metrics.text.tokenise`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from mmft.metrics.text import tokenise

Gram = tuple[str, ...]
END = "</s>"  # no word: tokens hold no such signs
_SCALE = 10.0


@lru_cache(maxsize=1024)  # a policy says something new all the time: a large cache would only grow
def _grams(words: tuple[str, ...], order: int) -> Mapping[Gram, int]:
    return Counter(words[i : i + n] for n in range(1, order + 1) for i in range(len(words) - n + 1))


class CiderD:
    """Scores captions by document frequencies of one set of references.

    order: longest n-gram. sigma: in words, how far lengths may differ. count_end: the end of a sentence is a word as
    any other, so that it costs to break off or to go on for ever (Rennie et al., Self-critical sequence training, CVPR
    2017); the published metric does not count it.
    """

    def __init__(self, order: int = 4, sigma: float = 6.0, count_end: bool = False):
        if order < 1 or sigma <= 0:
            raise ValueError(
                f"CIDEr-D needs n-grams of at least one word and a positive sigma, not {order} and {sigma}"
            )
        self.order, self.sigma, self.count_end = order, sigma, count_end
        self.pictures = 0
        self.frequency: dict[Gram, int] = {}

    def fit(self, references: Iterable[Sequence[str]]) -> CiderD:
        """Counts in how many pictures' references each n-gram occurs; what is in one alone weighs as what is new."""
        seen: Counter[Gram] = Counter()
        self.pictures = 0
        for of_one in references:
            self.pictures += 1
            seen.update({gram for text in of_one for gram in self._count(text)})
        self.frequency = {gram: count for gram, count in seen.items() if count > 1}
        return self

    def _count(self, text: str, ended: bool = True) -> Mapping[Gram, int]:
        words = tokenise(text)
        return _grams((*words, END) if self.count_end and ended else words, self.order)

    def _weigh(self, text: str, ended: bool = True) -> tuple[list[dict[Gram, float]], list[float], int]:
        """Weights by n-gram order, their norms, and the length: how many bigrams there are, as COCO counts it."""
        rarest = math.log(self.pictures)
        weights: list[dict[Gram, float]] = [{} for _ in range(self.order)]
        length = 0
        for gram, count in self._count(text, ended).items():
            weights[len(gram) - 1][gram] = count * (rarest - math.log(self.frequency.get(gram, 1)))
            length += count * (len(gram) == 2)
        return weights, [math.sqrt(sum(w * w for w in part.values())) for part in weights], length

    def score(self, caption: str, references: Sequence[str], ended: bool = True) -> float:
        """In [0, 10], the mean over references and n-gram orders. ended: whether the caption came to an end by itself.

        Raises ValueError without references or before `fit`.
        """
        if not references:
            raise ValueError("CIDEr-D needs at least one reference")
        if not self.pictures:
            raise ValueError("CIDEr-D needs document frequencies: call fit first")
        weights, norms, length = self._weigh(caption, ended)
        total = 0.0
        for reference in references:
            others, other_norms, other_length = self._weigh(reference)
            closeness = math.exp(-((length - other_length) ** 2) / (2 * self.sigma**2))
            for n in range(self.order):
                if not norms[n] or not other_norms[n]:
                    continue
                shared = sum(
                    min(weight, others[n][gram]) * others[n][gram]
                    for gram, weight in weights[n].items()
                    if gram in others[n]
                )
                total += closeness * shared / (norms[n] * other_norms[n])
        return _SCALE * total / (self.order * len(references))

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        frequency = [[list(gram), count] for gram, count in sorted(self.frequency.items())]
        return {"pictures": self.pictures, "frequency": frequency}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.pictures = int(state["pictures"])
        self.frequency = {tuple(gram): int(count) for gram, count in state["frequency"]}


class CiderBetween:
    """What a caption earns by the references of other pictures: what it says of any picture (CIDErBtw: Wang et al.,
    Compare and reweight: distinctive image captioning using similar images sets, ECCV 2020, arXiv:2007.06877).

    pictures: key -> references. They are indexed by n-gram, so a caption costs what it shares with them.
    """

    def __init__(self, cider: CiderD, pictures: Mapping[str, Sequence[str]]):
        if not pictures:
            raise ValueError("CIDErBtw needs the references of at least one picture")
        self.cider, self.keys = cider, frozenset(pictures)
        self._index: dict[Gram, list[tuple[str, float, float, int]]] = {}  # picture, weight, its share, length
        for key, references in pictures.items():
            for reference in references:
                weights, norms, length = cider._weigh(reference)
                for part, norm in zip(weights, norms, strict=True):
                    for gram, weight in part.items():
                        if weight:
                            share = weight / (norm * len(references))
                            self._index.setdefault(gram, []).append((key, weight, share, length))

    def score(self, caption: str, apart_from: str, ended: bool = True) -> float:
        """In [0, 10], the mean CIDEr-D over the pictures, but `apart_from`; 0 where that is the only one."""
        weights, norms, length = self.cider._weigh(caption, ended)
        total = 0.0
        for part, norm in zip(weights, norms, strict=True):
            for gram, weight in part.items():
                for key, other, share, other_length in self._index.get(gram, ()):
                    if key != apart_from:
                        closeness = math.exp(-((length - other_length) ** 2) / (2 * self.cider.sigma**2))
                        total += closeness * min(weight, other) * share / norm
        others = len(self.keys) - (apart_from in self.keys)
        return _SCALE * total / (self.cider.order * others) if others else 0.0


def corpus_cider_d(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each caption, with the document frequencies of these references: the metric as it is published."""
    if len(captions) != len(references):
        raise ValueError(f"{len(captions)} captions and {len(references)} sets of references")
    cider = CiderD().fit(references)
    return [cider.score(caption, of_one) for caption, of_one in zip(captions, references, strict=True)]
