"""Dropout that can stay on at prediction time, to measure what a model does not know."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class McDropout(nn.Module):
    """Dropout of features: on in training, and inside `sampling_dropout` whatever the mode.

    Not a subclass of `nn.Dropout`: TRL's PPO trainer sets `p` of every one of those to 0.

    All tokens of a row share one mask, so that what is dropped is a feature of the row and does not depend on how much
    padding there is. When sampling, all rows share it as well: one mask is one function f_t, applied to every row, so a
    row's samples depend neither on its batch nor on its place in it.

    Args:
        p: probability that a feature is set to 0, in [0, 1). Those kept are multiplied by 1 / (1 - p).

    Source: Gal & Ghahramani 2016, "A Theoretically Grounded Application of Dropout in Recurrent Neural Networks".
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ValueError(f"a dropout probability must be in [0, 1), got {p}")
        self.p = p
        self.sampling = False
        self.generator: torch.Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., D) -> (B, ..., D)."""
        if self.p == 0.0 or not (self.training or self.sampling):
            return x
        return x * (self._sampled_mask(x) if self.sampling else self._training_mask(x))

    def _training_mask(self, x: Tensor) -> Tensor:
        """(B, 1, ..., D), of the global random numbers, which a training checkpoint restores."""
        rows_and_features = (x.shape[0], *[1] * (x.dim() - 2), x.shape[-1])
        return F.dropout(x.new_ones(rows_and_features), self.p)

    def _sampled_mask(self, x: Tensor) -> Tensor:
        """(D), drawn on the CPU: the same masks on every device."""
        keep_D = torch.rand(x.shape[-1], generator=self.generator) >= self.p
        return keep_D.to(x.device, x.dtype) / (1.0 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"


@contextmanager
def sampling_dropout(module: nn.Module, generator_seed: int | None) -> Iterator[None]:
    """Turns on every `McDropout` below `module`, which may stay in eval mode; each forward pass draws new masks.

    The masks come from a generator of their own: they are the same for the same seed, and the global random numbers,
    which generation and shuffling depend on, are left untouched. To sample a batch in parts with equal masks, enter
    anew with the same seed for each part.

    Args:
        generator_seed: None for a seed from the operating system.

    Raises:
        ValueError: there is no `McDropout`; all samples would be equal, and the model would look certain.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, McDropout)]
    if not layers:
        raise ValueError(f"{type(module).__name__} has no McDropout to sample from")
    generator = torch.Generator()
    if generator_seed is None:
        generator.seed()
    else:
        generator.manual_seed(generator_seed)
    before = [(layer.sampling, layer.generator) for layer in layers]
    for layer in layers:
        layer.sampling, layer.generator = True, generator
    try:
        yield
    finally:
        for layer, (sampling, own) in zip(layers, before, strict=True):
            layer.sampling, layer.generator = sampling, own
