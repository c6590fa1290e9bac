"""Random numbers that depend on seed and step alone: a run resumes without their states, and any number of processes
draws the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_POINTS, _ORDER = range(2)  # streams that share a seed and nothing else


@dataclass(frozen=True)
class Randomness:
    """What is random in a step, for the whole global batch."""

    seed: int

    def points(self, step: int, rows: int, tokens: int) -> Tensor:
        """Where in the distribution of each token to look it up: (rows, tokens) in [0, 1), float64."""
        return torch.from_numpy(self._stream(_POINTS, step).random((rows, tokens)))

    def order(self, step: int, epoch: int, rows: int, minibatches: int, together: int = 1) -> list[Tensor]:
        """Rows of each minibatch of an epoch, shuffled; `together` neighbours stay together where they can.

        Each run of as many units as there are minibatches gives one to each. Processes that hold such runs whole have
        equally much to do in every minibatch, and its rows are the same for any number of processes.
        """
        stream = self._stream(_ORDER, step, epoch)
        units = np.arange(rows).reshape(-1, together)
        if len(units) % minibatches:  # a unit is cut between two minibatches
            return list(torch.from_numpy(stream.permutation(units).reshape(-1)).split(rows // minibatches))
        runs = stream.permuted(np.arange(len(units)).reshape(-1, minibatches), axis=1)
        return [torch.from_numpy(stream.permutation(units[column]).reshape(-1)) for column in runs.T]

    def _stream(self, *place: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *place])
