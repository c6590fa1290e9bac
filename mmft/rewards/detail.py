"""Detail: how much of what there is to say about a picture a caption says, and how much it says beyond that.

    idf(u) = max(0, log(N / df(u))) / log N            df(u): pictures, of N in training, whose references hold unit u
    w(u)   = idf(u)^p                                  words
           = b idf(u)^p                                (modifier, noun) pairs
           = b min(idf(noun_1), idf(noun_2))^p         relations
    P      = sum_{u in U(c) and U(R)} w(u) / sum_{u in U(c)} w(u)
    R      = sum_{u in U(c) and U(R)} w(u) s(u)^k / sum_{u in U(R)} w(u) s(u)^k
    Detail = (1 + beta^2) P R / (beta^2 P + R) - h (1 - P)

U(c) is the *set* of content units of the caption (`content_units`), U(R) the union over the picture's references, s(u)
the share of these references that hold u. The options: p idf_power, b binding_weight, k consensus, beta,
h hallucination_penalty.

Why it resists cheap tricks. Units are a set, so repeats add nothing. Weights are information: what every picture's
references say (a background) is worth nothing, what few say is worth most. A unit that no training reference holds
weighs 1, the most, so guessing costs P. Counts, colours and relations are units bound to their thing, so a wrong one
costs P and misses R, and a bare list of nouns misses R. A relation weighs no more than the less informative of its two
nouns: else "dog on background" would pay for the background again with every dog. Function words are no units: a long
empty ending changes nothing.

Sources: inverse document frequency over pictures as in CIDEr (Vedantam et al., CVPR 2015); objects, attributes and
relations as in SPICE (Anderson et al., ECCV 2016); F_beta of van Rijsbergen, Information Retrieval, 1979.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mmft.rewards.content_units import Unit, content_units

_CACHED_PICTURES = 50_000


@dataclass(frozen=True)
class DetailScore:
    """Detail with its precision and recall, which are the shares P and R of the equation."""

    value: float
    precision: float
    recall: float


class Detail:
    """The Detail measure, its idf learned from training references by `fit`.

    beta: above 1 leans to recall, below 1 to precision.
    idf_power: above 1 cheapens common units further, 0 weighs all alike.
    binding_weight: worth of a pair or relation, beside a word's 1.
    consensus: 0 = each reference unit counts alike, 1 = in proportion to the share of references that hold it.
    hallucination_penalty: what a wholly unsupported caption loses, so Detail is in [-h, 1].
    """

    def __init__(
        self,
        beta: float = 1.0,
        idf_power: float = 1.0,
        binding_weight: float = 1.0,
        consensus: float = 0.5,
        hallucination_penalty: float = 0.0,
    ):
        self.beta, self.idf_power, self.binding_weight = beta, idf_power, binding_weight
        self.consensus, self.hallucination_penalty = consensus, hallucination_penalty
        self.pictures = 0
        self.frequency: Counter[Unit] = Counter()
        self._targets: dict[tuple[str, ...], dict[Unit, float]] = {}

    def fit(self, references: Iterable[Sequence[str]]) -> None:
        """Counts, anew, in how many pictures each unit is said.

        references: for each picture its captions; pictures without are passed over. Raises ValueError when all are.
        """
        self.pictures, self.frequency = 0, Counter()
        self._targets.clear()
        for captions in references:
            if captions:
                self.pictures += 1
                # A relation's weight comes from its nouns, so only words and pairs are counted.
                said = frozenset().union(*map(content_units, captions))
                self.frequency.update(unit for unit in said if len(unit) < 3)
        if not self.pictures:
            raise ValueError("no picture has references to learn from")

    def idf(self, unit: Unit) -> float:
        """Normalised inverse document frequency, in [0, 1]; 1 for a unit that no training reference holds."""
        if not self.pictures:
            raise RuntimeError("Detail is used before fit() or load_state_dict()")
        frequency = self.frequency.get(unit, 1)
        # With one picture there is nothing to compare with: all units weigh the same.
        return math.log(self.pictures / frequency) / math.log(self.pictures) if self.pictures > 1 else 1.0

    def weight(self, unit: Unit) -> float:
        """w(u) of the equation."""
        if len(unit) == 1:
            return self.idf(unit) ** self.idf_power
        information = self.idf(unit) if len(unit) == 2 else min(self.idf(unit[:1]), self.idf(unit[2:]))
        return self.binding_weight * information**self.idf_power

    def targets(self, references: Sequence[str]) -> dict[Unit, float]:
        """The units of a picture's references with their weight in recall, w(u) s(u)^k."""
        key = tuple(references)
        if key not in self._targets:
            if len(self._targets) >= _CACHED_PICTURES:
                self._targets.clear()
            said = Counter(unit for caption in key for unit in content_units(caption))
            self._targets[key] = {u: self.weight(u) * (n / len(key)) ** self.consensus for u, n in said.items()}
        return self._targets[key]

    def score(self, caption: str, references: Sequence[str]) -> DetailScore:
        """Detail of one caption; one that says nothing informative has P = R = 0 and no hallucination to pay for.

        Raises ValueError without references.
        """
        if not references:
            raise ValueError("Detail needs at least one reference")
        targets = self.targets(references)
        said = {unit: self.weight(unit) for unit in content_units(caption)}
        claimed = math.fsum(said.values())
        if claimed == 0.0:
            return DetailScore(0.0, 0.0, 0.0)
        precision = math.fsum(w for unit, w in said.items() if unit in targets) / claimed
        wanted = math.fsum(targets.values())
        recall = math.fsum(targets[unit] for unit in said if unit in targets) / wanted if wanted else 0.0
        square = self.beta**2
        harmonic = (1 + square) * precision * recall / (square * precision + recall) if precision * recall else 0.0
        return DetailScore(harmonic - self.hallucination_penalty * (1 - precision), precision, recall)

    def state_dict(self) -> dict[str, Any]:
        """The document frequencies, JSON-ready and in one order. Parts of a unit hold no spaces: one joins them."""
        counts = sorted(self.frequency.items())
        return {"pictures": self.pictures, "frequency": {" ".join(unit): count for unit, count in counts}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pictures = int(state["pictures"])
        self.frequency = Counter({tuple(key.split(" ")): int(n) for key, n in state["frequency"].items()})
        self._targets.clear()
