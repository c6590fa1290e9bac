"""Scaled dot-product attention, and the pre-norm blocks built on it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmft.nn.dropout import McDropout
from mmft.types import UserError


def attention(query_BQD: Tensor, key_BKD: Tensor, value_BKD: Tensor, key_mask_BK: Tensor | None = None) -> Tensor:
    """Cross-modal attention: queries of one modality look at keys and values of another (or of the same, or of all).

    Equation: E02
        Attention(Q_m, K_n, V_n) = softmax(Q_m K_n^T / sqrt(d_k)) V_n

    Written out rather than left to a fused kernel: there are hundreds of tokens, not thousands, and a row without keys
    is then defined on every device.

    Args:
        query_BQD: Q_m, (..., Q, d_k). Leading dimensions, such as heads, are computed together.
        key_BKD: K_n, (..., K, d_k).
        value_BKD: V_n, (..., K, d_v).
        key_mask_BK: bool, broadcasting to (..., K). A key outside has weight exactly 0, whatever it holds.

    Returns:
        (..., Q, d_v); 0 in rows that keep no key.

    Source: Vaswani et al. 2017, "Attention Is All You Need", eq. 1.
    """
    if key_mask_BK is not None:
        # Replaced, not only weighted with 0: padding may hold NaN, and 0 x NaN is NaN.
        outside_BK1 = ~key_mask_BK.unsqueeze(-1)
        key_BKD, value_BKD = key_BKD.masked_fill(outside_BK1, 0.0), value_BKD.masked_fill(outside_BK1, 0.0)
    score_BQK = query_BQD @ key_BKD.mT / math.sqrt(query_BQD.shape[-1])
    return masked_softmax(score_BQK, None if key_mask_BK is None else key_mask_BK.unsqueeze(-2)) @ value_BKD


def masked_softmax(score: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over the kept entries of the last dimension; exactly 0 elsewhere, and everywhere where none is kept.

    `mask` is bool and broadcasts to `score`.
    """
    if mask is None:
        return score.softmax(-1)
    # The lowest finite number, not -inf: the softmax of -inf alone is NaN, and so is its gradient.
    return score.masked_fill(~mask, torch.finfo(score.dtype).min).softmax(-1).masked_fill(~mask, 0.0)


class GroupedLinear(nn.ModuleList):
    """x W, with a W of its own for each of several consecutive runs of tokens, such as the modalities of a sequence."""

    def __init__(self, in_dim: int, out_dim: int, groups: int) -> None:
        super().__init__(nn.Linear(in_dim, out_dim, bias=False) for _ in range(groups))

    def forward(self, x_BND: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        """`sizes` holds the tokens of each group, in all N; None where there is one group."""
        parts = x_BND.split([x_BND.shape[1]] if sizes is None else list(sizes), dim=1)
        return torch.cat([linear(part) for linear, part in zip(self, parts, strict=True)], dim=1)


class MultiHeadAttention(nn.Module):
    """Attention in several subspaces at once.

        MultiHead(x, y) = [head_1; ...; head_h] W_o,   head_i = Attention(x W_q^i, y W_k^i, y W_v^i)

    Without biases, as in the equation: a row without keys gives 0.

    Args:
        query_dim: feature size of x.
        key_dim: feature size of y.
        hidden: feature size of the result, divisible by `heads`.
        groups: how many modalities x is made of; each has a W_q and W_o of its own, W_k and W_v are shared.

    Source: Vaswani et al. 2017, section 3.2.2.
    """

    def __init__(self, query_dim: int, key_dim: int, hidden: int, heads: int, groups: int = 1) -> None:
        super().__init__()
        if heads < 1 or hidden % heads:
            raise UserError(f"hidden {hidden} must be divisible by heads {heads}")
        self.heads = heads
        self.query = GroupedLinear(query_dim, hidden, groups)
        self.key = nn.Linear(key_dim, hidden, bias=False)
        self.value = nn.Linear(key_dim, hidden, bias=False)
        self.out = GroupedLinear(hidden, hidden, groups)

    def forward(
        self,
        query_BQD: Tensor,
        key_BKD: Tensor,
        key_mask_BK: Tensor | None = None,
        sizes: Sequence[int] | None = None,
    ) -> Tensor:
        """x = query_BQD, y = key_BKD -> (B, Q, hidden). `sizes`: the queries of each group, see `GroupedLinear`."""
        query, key, value = self.query(query_BQD, sizes), self.key(key_BKD), self.value(key_BKD)
        head_mask = None if key_mask_BK is None else key_mask_BK.unsqueeze(1)
        attended = attention(self._split(query), self._split(key), self._split(value), head_mask)
        return self.out(attended.transpose(1, 2).flatten(2), sizes)

    def _split(self, x_BND: Tensor) -> Tensor:
        """(B, N, hidden) -> (B, heads, N, hidden / heads)."""
        return x_BND.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class ResidualMLP(nn.Module):
    """x + Dropout(W_2 GELU(W_1 LayerNorm(x) + b_1) + b_2), twice as wide inside; on the last dimension."""

    def __init__(self, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.mlp = nn.Sequential(nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, hidden))
        self.dropout = McDropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.mlp(self.norm(x)))


class AttentionBlock(nn.Module):
    """Pre-norm Transformer block: each token looks at all that are kept, then passes through an MLP.

        x <- x + Dropout(MultiHead(LayerNorm(x), LayerNorm(x)));   x <- ResidualMLP(x)

    Args:
        groups: as in `MultiHeadAttention`; above 1, tokens of each modality ask in their own way.

    Source: Xiong et al. 2020, "On Layer Normalization in the Transformer Architecture": pre-norm needs no warm-up.
    """

    def __init__(self, hidden: int, heads: int, dropout: float, groups: int = 1) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.attention = MultiHeadAttention(hidden, hidden, hidden, heads, groups)
        self.dropout = McDropout(dropout)
        self.mlp = ResidualMLP(hidden, dropout)

    def forward(
        self,
        x_BND: Tensor,
        mask_BN: Tensor,
        sizes: Sequence[int] | None = None,
        context_BKD: Tensor | None = None,
        context_mask_BK: Tensor | None = None,
    ) -> Tensor:
        """(B, N, hidden) -> (B, N, hidden). What comes out at padding means nothing, and no kept token saw it.

        context: tokens that are looked at beside x but do not look themselves, and their mask.
        """
        normed_BND = key_BKD = self.norm(x_BND)
        if context_BKD is not None and context_mask_BK is not None:
            key_BKD = torch.cat([normed_BND, self.norm(context_BKD)], dim=1)
            mask_BN = torch.cat([mask_BN, context_mask_BK], dim=1)
        x_BND = x_BND + self.dropout(self.attention(normed_BND, key_BKD, mask_BN, sizes))
        return self.mlp(x_BND)


class AttentionStack(nn.ModuleList):
    """`layers` attention blocks, one after the other: a Transformer encoder without a final norm."""

    def __init__(self, layers: int, hidden: int, heads: int, dropout: float, groups: int = 1) -> None:
        super().__init__(AttentionBlock(hidden, heads, dropout, groups) for _ in range(layers))

    def forward(
        self,
        x_BND: Tensor,
        mask_BN: Tensor,
        sizes: Sequence[int] | None = None,
        context_BKD: Tensor | None = None,
        context_mask_BK: Tensor | None = None,
    ) -> Tensor:
        """As `AttentionBlock`."""
        for block in self:
            x_BND = block(x_BND, mask_BN, sizes, context_BKD, context_mask_BK)
        return x_BND
