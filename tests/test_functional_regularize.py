"""LoRA's distance to the pretrained weights, adapter penalty and dense L2 against dense arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from mmft.functional.regularize import adapter_penalty, l2_to_reference, lora_l2


def test_lora_l2_by_hand():
    # r 1, s 2: B A = [[1], [2]] [[3, 4]] = [[3, 4], [6, 8]], squares 9 + 16 + 36 + 64 = 125, times s^2 = 500
    A, B = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [2.0]])
    assert_close(lora_l2(A, B, 2.0), torch.tensor(500.0))


def test_lora_l2_equals_dense_with_gradients_in_batches():
    torch.manual_seed(0)
    A = torch.randn(3, 4, 10, dtype=torch.float64, requires_grad=True)
    B = torch.randn(3, 7, 4, dtype=torch.float64, requires_grad=True)
    ours, dense = lora_l2(A, B, 0.5), (0.5 * B @ A).square().sum((-2, -1))
    assert_close(ours, dense)
    assert_close(torch.autograd.grad(ours.sum(), (A, B)), torch.autograd.grad(dense.sum(), (A, B)))


def test_lora_l2_of_a_fresh_adapter_is_zero_with_finite_gradient():
    A, B = torch.randn(4, 10, requires_grad=True), torch.zeros(7, 4, requires_grad=True)
    distance = lora_l2(A, B, 1.0)
    distance.backward()
    assert distance.item() == 0.0
    assert_close((A.grad, B.grad), (torch.zeros(4, 10), torch.zeros(7, 4)))


def test_penalties_are_fp32_whatever_the_weights_and_autocast():
    torch.manual_seed(0)
    A, B = torch.randn(4, 64).bfloat16(), torch.randn(32, 4).bfloat16()
    dense = (B.float() @ A.float()).square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(lora_l2(A, B, 1.0), dense)
        assert_close(lora_l2(A.float(), B.float(), 1.0), dense)
        assert_close(adapter_penalty([A, B]), A.float().square().sum() + B.float().square().sum())


def test_l2_to_reference_and_adapter_penalty_by_hand():
    p, q = torch.tensor([1.0, 5.0], requires_grad=True), torch.tensor([[2.0]])
    distance = l2_to_reference([p, q], [torch.tensor([0.0, 2.0]), torch.tensor([[4.0]])])
    assert_close(distance, torch.tensor(14.0))  # 1 + 9 + 4
    distance.backward()
    assert_close(p.grad, torch.tensor([2.0, 6.0]))
    assert_close(adapter_penalty([p, q]), torch.tensor(30.0))  # 1 + 25 + 4
    assert adapter_penalty([]).item() == 0.0


def test_l2_to_reference_refuses_unequal_lists():
    with pytest.raises(ValueError):
        l2_to_reference([torch.zeros(1)], [])
