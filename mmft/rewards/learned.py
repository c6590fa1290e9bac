"""A learned reward model as terms of a reward: its prediction, its uncertainty, and the terms it has weights for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from mmft.config import resolve
from mmft.models.reward import CaptionRewardConfig, CaptionRewardModel, Prediction
from mmft.rewards.terms import Term, build_term
from mmft.types import Row

NETWORK, UNCERTAINTY = "network", "uncertainty"
TERMS_FILE = "terms.json"  # beside a model: what its terms have learned of the training captions
# Of an entry of `CaptionRewardConfig.terms`: what is no option of its term.
_NOT_OPTIONS = {
    "type", "name", "label", "normalize", "weight", "low", "high", "unconstrained", "unconstrained_low",
    "unconstrained_high", "sign",
}  # fmt: skip


class NetworkTerm(Term):
    """The score of a reward model's network, in the units of what it was trained on."""

    needs_images = True

    def __init__(self, model: CaptionRewardModel):
        self.model = model
        self._last: tuple[list[tuple[str, str, int]], list[Row], Prediction] | None = None

    def predict(self, captions: Sequence[str], rows: Sequence[Row]) -> Prediction:
        """The prediction for a batch; asking twice in a row for the same one costs nothing."""
        key = [(caption, row.prompt, id(row.image)) for caption, row in zip(captions, rows, strict=True)]
        if self._last is None or self._last[0] != key:
            # The rows are held: the id of a picture that is gone may come back as another's.
            self._last = key, list(rows), self.model.predict(captions, rows)
        return self._last[2]

    def __call__(
        self, captions: Sequence[str], rows: Sequence[Row], finished: Sequence[bool] | None = None
    ) -> list[float]:
        return self.predict(captions, rows).mean_B.tolist()

    def unfamiliar(self, rows: Sequence[Row]) -> float:
        """The share of rows whose picture lies outside of what the network was trained on."""
        image, _ = self.model.encode([""] * len(rows), rows)
        return float((self.model.distance(image) > self.model.config.distance_limit).double().mean())


class UncertaintyTerm(Term):
    """sigma of the same prediction: a cost in training, so that the policy stays where the reward model knows."""

    needs_images = True
    sign = -1

    def __init__(self, network: NetworkTerm):
        self.network = network

    def __call__(
        self, captions: Sequence[str], rows: Sequence[Row], finished: Sequence[bool] | None = None
    ) -> list[float]:
        return self.network.predict(captions, rows).sigma_B.tolist()


def term_of(entry: Mapping[str, Any]) -> Term:
    """The term of an entry of `CaptionRewardConfig.terms`."""
    return build_term(entry["type"], **{k: v for k, v in entry.items() if k not in _NOT_OPTIONS})


def terms_of(path: str, config: CaptionRewardConfig) -> tuple[dict[str, Term], bool]:
    """A saved model's terms by label, with the statistics they were weighted with; and whether those were there."""
    terms = {label_of(entry): term_of(entry) for entry in config.terms}
    file = cached_file(resolve(path), TERMS_FILE, _raise_exceptions_for_missing_entries=False)
    if file is None:
        return terms, not any(term.needs_fit for term in terms.values())
    for label, state in json.loads(Path(file).read_text(encoding="utf-8")).items():
        terms[label].load_state_dict(state)
    return terms, True


def label_of(entry: Mapping[str, Any]) -> str:
    return str(entry.get("name") or entry["type"])


def learned_weights(config: CaptionRewardConfig) -> dict[str, float]:
    """Label -> learned weight, for every term and the network, on the scale of the reward."""
    weights = {label_of(entry): float(entry["weight"]) * config.reward_scale for entry in config.terms}
    if config.fusion is not None:
        weights[NETWORK] = config.network_weight * config.reward_scale
    return weights
