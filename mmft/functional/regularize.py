"""Penalties that hold fine-tuned weights near the pretrained ones. Computed in fp32, autocast or not."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def lora_l2(A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Squared distance that a LoRA update moves a weight, exact, without forming the update.

    Equation: E22
        ||theta - theta_pretrained||^2 = ||s B A||_F^2 = s^2 tr((B^T B)(A A^T))

    The trace of a product of two symmetric r x r matrices is the sum of their elementwise product, so the cost is
    O(r^2 (in + out)) and no out x in matrix exists. The transposed update of an embedding has the same norm.

    Args:
        A: lora_A, (..., r, in). Leading dimensions are layers computed together.
        B: lora_B, (..., out, r).
        scale: s, alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA.

    Returns:
        Squared Frobenius norms, (...). Never negative, for all that rounding does.

    Source: Hu et al. 2022, "LoRA"; anchoring to pretrained weights as L2-SP, Li et al. 2018, "Explicit Inductive Bias
    for Transfer Learning with Convolutional Networks".
    """
    with torch.autocast(A.device.type, enabled=False):
        A, B = _full_precision(A), _full_precision(B)
        gram_B, gram_A = B.mT @ B, A @ A.mT
        return scale**2 * (gram_B * gram_A).sum((-2, -1)).clamp(min=0.0)


def dora_l2(W: Tensor, A: Tensor, B: Tensor, magnitude: Tensor, scale: float) -> Tensor:
    """Squared distance that a DoRA update moves a weight, exact, without forming the update.

    Equation: E22
        theta = m V / ||V||,   V = W + D,   D = s B A,   ||.|| of each output's row,   k = m / ||V||
        ||theta - W||^2 = sum over rows of (k - 1)^2 ||W||^2 + 2 k (k - 1) W.D + k^2 ||D||^2

    Every term is small where the update is, so that little is lost to rounding. ||V|| is differentiated too, where
    DoRA's own forward pass takes it for a constant.

    Args:
        W: pretrained weight, (out, in), without gradient.
        A, B, scale: lora_A (r, in), lora_B (out, r) and s.
        magnitude: m, (out,).

    Source: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", equation 5.
    """
    with torch.autocast(W.device.type, enabled=False):
        W, A, B, m = (x if x.dtype == torch.float64 else x.float() for x in (W.detach(), A, B, magnitude))
        W_W = W.square().sum(1)
        W_D = scale * ((W @ A.mT) * B).sum(1)
        D_D = scale**2 * ((B @ (A @ A.mT)) * B).sum(1)
        k = m / (W_W + 2 * W_D + D_D).sqrt()
        return ((k - 1).square() * W_W + 2 * k * (k - 1) * W_D + k.square() * D_D).sum().clamp(min=0.0)


def l2_to_reference(params: Iterable[Tensor], references: Iterable[Tensor]) -> Tensor:
    """Squared distance of weights to their pretrained values, for weights trained in place.

    Equation: E22
        ||theta - theta_pretrained||^2

    `params` and `references` pair up, equal in shape; references carry no gradient. Returns a 0-d tensor on the
    device of the first parameter. Source: L2-SP, Li et al. 2018.
    """
    pairs = zip(params, references, strict=True)
    return squared_norm(_full_precision(p) - _full_precision(ref.detach()) for p, ref in pairs)


def adapter_penalty(params: Iterable[Tensor]) -> Tensor:
    """Squared norm of the adapter's own parameters phi.

    Equation: E25
        L_adapter = L_task + beta ||phi||^2        (this returns ||phi||^2)

    Unlike E22 it depends on how the update is factored: with B = 0 it still shrinks A. Returns a 0-d tensor.
    """
    return squared_norm(params)


def squared_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Sum of the squares of all entries of all tensors, 0-d; 0 for none."""
    return total([_full_precision(x).square().sum() for x in tensors])


def total(terms: list[Tensor]) -> Tensor:
    """Sum of 0-d tensors that may live on several devices, on the device of the first; 0 for none."""
    if not terms:
        return torch.zeros(())
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()


def _full_precision(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
