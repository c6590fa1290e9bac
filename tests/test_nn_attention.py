"""Attention against hand arithmetic and torch's own."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import gelu, layer_norm, scaled_dot_product_attention
from torch.testing import assert_close

from mmft.nn.attention import AttentionBlock, AttentionStack, MultiHeadAttention, attention, masked_softmax
from mmft.types import UserError

NAN = float("nan")
LN3 = math.log(3)


def test_attention_by_hand():
    # d_k = 4. Q K^T / 2: first query 2 ln 3 / 2 = ln 3 and 0 -> weights 3/4, 1/4: 3/4 [4, 0] + 1/4 [8, 4] = [5, 1]
    # second query is 0: weights 1/2, 1/2: [6, 2]
    query = torch.tensor([[[2.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]])
    key = torch.tensor([[[LN3, 1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0]]])
    value = torch.tensor([[[4.0, 0.0], [8.0, 4.0]]])
    assert_close(attention(query, key, value), torch.tensor([[[5.0, 1.0], [6.0, 2.0]]]))
    only_second = torch.tensor([[False, True]])
    assert attention(query, key, value, only_second).tolist() == [[[8.0, 4.0], [8.0, 4.0]]]


@pytest.mark.parametrize("lead", [(3,), (3, 4)], ids=["rows", "rows and heads"])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_torchs(lead, masked):
    query, key, value = torch.randn(*lead, 5, 8), torch.randn(*lead, 7, 8), torch.randn(*lead, 7, 6)
    mask = torch.rand(3, *[1] * (len(lead) - 1), 7) < 0.6
    mask[..., 0] = True
    if not masked:
        assert_close(attention(query, key, value), scaled_dot_product_attention(query, key, value))
        return
    expected = scaled_dot_product_attention(query, key, value, attn_mask=mask.unsqueeze(-2))
    assert_close(attention(query, key, value, mask), expected)


@pytest.mark.parametrize("padding", [1e30, NAN, float("inf")])
def test_what_padding_holds_changes_no_bit(padding):
    query, key, value = torch.randn(2, 3, 4), torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    mask = torch.tensor([[True, True, False, True, False], [False, True, True, True, True]])
    before = attention(query, key, value, mask)
    outside = ~mask.unsqueeze(-1)
    query.requires_grad_()
    after = attention(query, key.masked_fill(outside, padding), value.masked_fill(outside, padding), mask)
    assert torch.equal(before, after)
    after.sum().backward()
    assert query.grad.isfinite().all()


def test_a_row_without_keys_is_zero():
    query, key, value = (torch.randn(2, 3, 4, requires_grad=True) for _ in range(3))
    output = attention(query, key, value, torch.tensor([[False, False, False], [True, False, True]]))
    assert output[0].eq(0).all()
    assert output[1].ne(0).all()
    output.sum().backward()
    for x in (query, key, value):
        assert x.grad.isfinite().all()
        assert x.grad[0].eq(0).all()


def test_no_keys_at_all():
    assert attention(torch.randn(1, 2, 4), torch.randn(1, 0, 4), torch.randn(1, 0, 4)).tolist() == [[[0.0] * 4] * 2]


def test_masked_softmax_by_hand():
    mask = torch.tensor([[True, False, True], [False, False, False]])
    weights = masked_softmax(torch.tensor([[LN3, 50.0, 0.0], [1.0, 2.0, 3.0]]), mask)
    assert_close(weights, torch.tensor([[0.75, 0.0, 0.25], [0.0, 0.0, 0.0]]))
    assert weights[~mask].eq(0).all()


def reference(module, x, y, mask, sizes=None):
    """The module's projections, applied part by part, around torch's attention."""
    sizes = [x.shape[1]] if sizes is None else sizes

    def heads(z):
        return z.view(*z.shape[:2], module.heads, -1).transpose(1, 2)

    parts = [part @ w.weight.T for part, w in zip(x.split(sizes, 1), module.query, strict=True)]
    query, key, value = torch.cat(parts, 1), y @ module.key.weight.T, y @ module.value.weight.T
    attended = scaled_dot_product_attention(heads(query), heads(key), heads(value), attn_mask=mask[:, None, None])
    attended = attended.transpose(1, 2).reshape(*x.shape[:2], -1)
    return torch.cat([part @ w.weight.T for part, w in zip(attended.split(sizes, 1), module.out, strict=True)], 1)


def test_multi_head_attention_is_torchs():
    module = MultiHeadAttention(query_dim=6, key_dim=10, hidden=8, heads=2)
    x, y, mask = torch.randn(3, 4, 6), torch.randn(3, 5, 10), torch.rand(3, 5) < 0.7
    mask[:, 0] = True
    assert_close(module(x, y, mask), reference(module, x, y, mask))
    assert module(x, y, torch.zeros_like(mask)).eq(0).all()


def test_each_group_asks_in_its_own_way():
    module = MultiHeadAttention(8, 8, 8, heads=4, groups=2)
    x, mask = torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.bool)
    output = module(x, x, mask, [2, 3])
    assert_close(output, reference(module, x, x, mask, [2, 3]))
    with torch.no_grad():
        module.query[1].weight.mul_(2.0)
        module.out[1].weight.add_(1.0)
    changed = module(x, x, mask, [2, 3])
    assert torch.equal(changed[:, :2], output[:, :2])
    assert not torch.isclose(changed[:, 2:], output[:, 2:]).any()


def test_heads_must_divide_hidden():
    with pytest.raises(UserError, match="hidden 8 must be divisible by heads 3"):
        MultiHeadAttention(8, 8, 8, heads=3)


def test_block_is_its_formula():
    block = AttentionBlock(hidden=8, heads=2, dropout=0.5).eval()
    x, mask = torch.randn(2, 4, 8), torch.tensor([[True] * 4, [True, True, False, False]])
    normed = layer_norm(x, (8,))  # a fresh LayerNorm has weight 1 and bias 0
    h = x + reference(block.attention, normed, normed, mask)
    up, _, down = block.mlp.mlp
    expected = h + gelu(layer_norm(h, (8,)) @ up.weight.T + up.bias) @ down.weight.T + down.bias
    assert_close(block(x, mask), expected)
    stack = AttentionStack(2, hidden=8, heads=2, dropout=0.5).eval()
    assert torch.equal(stack(x, mask), stack[1](stack[0](x, mask), mask))
