"""Frozen linear layers with their weights in the processor library's own layout, for a CPU in bf16.

A product of a few rows, as in each step of decoding, costs the reading of the weights; brought into oneDNN's layout
once, they are read about 1.5 times as fast, and the numbers are the same to the bit. The packed copies stay, so they
cost the language model's weights in memory a second time: done up to a bound.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mmft.models.structure import language_parts, output_head

BOUND = 2 * 2**30  # bytes of packed copies
_ROWS = 16  # the batch that oneDNN lays weights out for; others work as well


class PrepackedLinears:
    """The language side's frozen linear layers of a model; nothing where packing would not help or is not there."""

    def __init__(self, model: nn.Module):
        self.model = model
        self._packed: list[tuple[nn.Linear, Any]] | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """While open, the layers compute with their packed weights; gradients pass through them as ever.

        Not where activations are computed again in the backward pass: by then this is closed.
        """
        if torch.is_grad_enabled() and getattr(self.model, "is_activation_checkpointing", False):
            yield
            return
        if self._packed is None:
            self._packed = list(self._pack())
        for layer, forward in self._packed:
            layer.forward = forward
        try:
            yield
        finally:
            for layer, _ in self._packed:
                del layer.forward

    def _pack(self) -> Iterator[tuple[nn.Linear, Any]]:
        layers = list(_candidates(self.model))
        if sum(layer.weight.numel() * layer.weight.element_size() for layer in layers) > BOUND:
            return
        for layer in layers:
            weight = layer.weight.detach()
            try:
                packed = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
            except (AttributeError, NotImplementedError, RuntimeError):  # a build of torch without oneDNN
                return
            yield layer, partial(_forward, packed, weight, layer.bias)


def _forward(packed: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        return _PackedLinear.apply(x, packed, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        return (grad.flatten(0, -2) @ weight).view(*grad.shape[:-1], -1), None, None, None


def _candidates(model: nn.Module) -> Iterator[nn.Linear]:
    parts = [model.get_submodule(name) for name in language_parts(model)]
    seen: set[int] = set()
    for module in (m for part in (*parts, output_head(model)) for m in part.modules()):
        plain = type(module) is nn.Linear and "forward" not in module.__dict__
        if plain and id(module) not in seen and _is_fit(module.weight):
            seen.add(id(module))
            yield module


def _is_fit(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and not weight.requires_grad
