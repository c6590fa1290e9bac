"""What reward models and their baselines say of judged captions: a column of numbers for each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mmft.metrics.bleu import sentence_bleu
from mmft.metrics.text import tokenise
from mmft.models.reward import Prediction
from mmft.rewards.judgements import Judgement, Preference, Rating
from mmft.rewards.terms import Term

Columns = dict[str, np.ndarray]
Predict = Callable[[Sequence[tuple[Judgement, str]]], Prediction]

BASELINES = ("bleu", "length")  # what anyone would try first


@dataclass
class Side:
    """N captions: `terms` by label, costs negated; `baselines`; the network's score and sigma."""

    terms: Columns
    baselines: Columns
    words_N: np.ndarray
    network_N: np.ndarray | None = None
    sigma_N: np.ndarray | None = None

    def matrix(self, names: Sequence[str], network: bool) -> np.ndarray:
        """(N, K): the terms `names`, then the network's score where it is asked for."""
        columns = [self.terms[name] for name in names]
        if network and self.network_N is not None:
            columns.append(self.network_N)
        return np.column_stack(columns) if columns else np.zeros((len(self.words_N), 0))


@dataclass
class Scored:
    """Judgements with what was said of them. second: of the rejected captions; None for ratings."""

    items: Sequence[Judgement]
    first: Side
    second: Side | None = None
    clusters: list[str] = field(default_factory=list)

    @property
    def ratings_N(self) -> np.ndarray:
        return np.array([item.rating for item in self.items if isinstance(item, Rating)])

    @property
    def ties_N(self) -> np.ndarray:
        return np.array([isinstance(item, Preference) and item.tie for item in self.items])

    @property
    def kinds(self) -> list[str]:
        return [item.kind or "other" for item in self.items]


def score(items: Sequence[Judgement], terms: Mapping[str, Term], predict: Predict | None = None) -> Scored:
    """Scores judgements by `terms` (fitted), by the baselines, and by a network where `predict` is given."""
    clusters = [item.picture_key for item in items]
    if isinstance(items[0], Preference):
        pairs = [item for item in items if isinstance(item, Preference)]
        first = _side([(item, item.chosen) for item in pairs], terms, predict)
        return Scored(items, first, _side([(item, item.rejected) for item in pairs], terms, predict), clusters)
    rated = [(item, item.caption) for item in items if isinstance(item, Rating)]
    return Scored(items, _side(rated, terms, predict), None, clusters)


def _side(said: Sequence[tuple[Judgement, str]], terms: Mapping[str, Term], predict: Predict | None) -> Side:
    captions = [caption for _, caption in said]
    rows = [item.row(picture=False) for item, _ in said]
    columns = {name: term.sign * np.array(term(captions, rows), dtype=float) for name, term in terms.items()}
    words_N = np.array([float(len(tokenise(caption))) for caption in captions])
    baselines = {"length": words_N}
    if all(row.references for row in rows):
        bleu = [sentence_bleu(caption, row.references) for caption, row in zip(captions, rows, strict=True)]
        baselines = {"bleu": np.array(bleu), **baselines}
    side = Side(columns, baselines, words_N)
    if predict is not None:
        prediction = predict(said)
        side.network_N, side.sigma_N = prediction.mean_B.double().numpy(), prediction.sigma_B.double().numpy()
    return side
