"""Prepacked layers compute what plain ones do, and leave the model as it was."""

from __future__ import annotations

import pytest
import tiny
import torch

import mmft.models.prepacked as prepacked
from mmft.models.prepacked import PrepackedLinears, _candidates


def test_equal_to_the_bit_in_bf16() -> None:
    policy = tiny.vision_policy().model.to(torch.bfloat16)
    base = policy.get_base_model()
    packed = PrepackedLinears(base)
    states = torch.randn(2, 7, 32, dtype=torch.bfloat16, requires_grad=True)
    layers = list(_candidates(base))
    assert len(layers) >= 14 and base.lm_head in layers
    assert not any("vision" in name or "projector" in name for name, m in base.named_modules() if m in layers)
    for layer in layers[:7]:
        if layer.in_features != 32:
            continue
        plain = layer(states)
        (expected,) = torch.autograd.grad(plain.float().square().sum(), states)
        with packed():
            ours = layer(states)
        (grad,) = torch.autograd.grad(ours.float().square().sum(), states)
        assert torch.equal(ours, plain)
        torch.testing.assert_close(grad, expected, atol=1e-2, rtol=1e-2)
    assert all("forward" not in layer.__dict__ for layer in layers)


def test_trained_weights_and_fp32_are_left_alone() -> None:
    assert list(_candidates(tiny.llava().requires_grad_(False))) == []
    assert list(_candidates(tiny.llava().to(torch.bfloat16).requires_grad_(True))) == []


def test_not_past_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepacked, "BOUND", 1000)
    packed = PrepackedLinears(tiny.llava().to(torch.bfloat16).requires_grad_(False))
    with packed():
        assert packed._packed == []


def test_restored_after_an_error() -> None:
    base = tiny.llava().to(torch.bfloat16).requires_grad_(False)
    with pytest.raises(RuntimeError, match="within"), PrepackedLinears(base)():
        raise RuntimeError("within")
    assert all("forward" not in m.__dict__ for m in base.modules())
