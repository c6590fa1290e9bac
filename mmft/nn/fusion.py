"""Fusion: embeddings of several modalities become one vector. All have one interface, so that a recipe may choose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmft.functional.masked import masked_mean
from mmft.nn.attention import AttentionStack, MultiHeadAttention, ResidualMLP, masked_softmax
from mmft.types import UserError


def masked_mean_pool(tokens_BND: Tensor, mask_BN: Tensor) -> Tensor:
    """Mean over the kept tokens of each row -> (B, D); 0 in rows that keep none."""
    return masked_mean(tokens_BND, mask_BN.unsqueeze(-1).expand_as(tokens_BND), dim=1)


@dataclass(frozen=True)
class FusionSize:
    """What all fusions are made from.

    dims: modality -> feature size D_m of its embeddings. Its order is that of [E_1; ...; E_M].
    hidden: size of H.
    layers: blocks, see each fusion.
    heads: of each attention; divides `hidden`. Not used by the fusions of pooled embeddings.
    dropout: probability of `McDropout` in every block.
    queries: for cross-attention, the modalities that ask; None: all.
    """

    dims: dict[str, int]
    hidden: int
    layers: int = 2
    heads: int = 4
    dropout: float = 0.1
    queries: tuple[str, ...] | None = None


class Fusion(nn.Module):
    """H = fusion(E_1, ..., E_M), one vector a row.

    Padded tokens change nothing. A modality without a kept token in a row (no picture, say) adds 0 to that row's sum or
    concatenation, and attention does not look at it. `build_fusion` makes one.
    """

    def __init__(self, size: FusionSize) -> None:
        super().__init__()
        self.size = size

    def forward(self, embeddings: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> Tensor:
        """Embeddings and their masks -> H, (B, hidden).

        Args:
            embeddings: modality -> E_m, (B, N_m, D_m), for every modality of `dims`. N_m may be 0.
            masks: modality -> bool (B, N_m).

        Raises:
            ValueError: a modality is missing or unknown, or a shape is wrong.
        """
        return self.fuse(*self._in_order(embeddings, masks))

    def fuse(self, tokens: list[Tensor], masks: list[Tensor]) -> Tensor:
        """`forward` with the modalities in the order of `dims`, checked, and 0 where the mask is False."""
        raise NotImplementedError

    def _in_order(
        self, embeddings: Mapping[str, Tensor], masks: Mapping[str, Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        if set(embeddings) != set(self.size.dims) or set(masks) != set(self.size.dims):
            got = f"embeddings of {sorted(embeddings)} and masks of {sorted(masks)}"
            raise ValueError(f"the fusion's modalities are {sorted(self.size.dims)}, got {got}")
        dtype = next(self.parameters()).dtype  # frozen towers may run in bfloat16
        tokens = []
        for name, dim in self.size.dims.items():
            shape, mask_shape = tuple(embeddings[name].shape), tuple(masks[name].shape)
            if len(shape) != 3 or shape[2] != dim or mask_shape != shape[:2]:
                raise ValueError(f"{name}: embeddings must be B x N x {dim} and masks B x N, got {shape}, {mask_shape}")
            tokens.append(embeddings[name].to(dtype).masked_fill(~masks[name].unsqueeze(-1), 0.0))
        return tokens, [masks[name] for name in self.size.dims]


class _PooledFusion(Fusion):
    """Fusions of one vector a modality, pooled from its tokens.

    The equation alone lets no modality change what another one means, so `layers` residual MLPs follow it:
    H <- ResidualMLP(...(LayerNorm(H))).
    """

    # F_m = LayerNorm(W_m E_m + b_m): of one scale, or a weight would say little about its modality.
    normalize = True

    def __init__(self, size: FusionSize) -> None:
        super().__init__(size)
        self.project = _projections(size, self.normalize)
        mlps = (ResidualMLP(size.hidden, size.dropout) for _ in range(size.layers))
        self.after = nn.Sequential(nn.LayerNorm(size.hidden), *mlps)

    def fuse(self, tokens: list[Tensor], masks: list[Tensor]) -> Tensor:
        pooled = [masked_mean_pool(x_BND, mask_BN) for x_BND, mask_BN in zip(tokens, masks, strict=True)]
        present_BM = torch.stack([mask_BN.any(1) for mask_BN in masks], dim=1)
        return self.after(self.combine(self.projected(pooled, present_BM), present_BM))

    def projected(self, pooled: list[Tensor], present_BM: Tensor) -> Tensor:
        """Projected modalities -> (B, M, hidden), 0 where one is absent: not even its b_m counts."""
        projected = [linear(e_BD) for linear, e_BD in zip(self.project.values(), pooled, strict=True)]
        return torch.stack(projected, dim=1).masked_fill(~present_BM.unsqueeze(-1), 0.0)

    def combine(self, projected_BMD: Tensor, present_BM: Tensor) -> Tensor:
        """The fusion's equation -> (B, hidden)."""
        raise NotImplementedError


class SumFusion(_PooledFusion):
    """Sum of projected modalities.

    Equation: E03
        H = sum_m (W_m E_m + b_m)

    E_m is the mean of the modality's tokens, W_m and b_m `project[m]`.
    """

    normalize = False  # the scale of W_m is the modality's weight

    def combine(self, projected_BMD: Tensor, present_BM: Tensor) -> Tensor:
        return projected_BMD.sum(1)


class WeightedSumFusion(_PooledFusion):
    """Sum of modalities with one learned weight each, the same in all rows.

    Equation: E24
        F = sum_m w_m F_m,   w_m >= 0,   sum_m w_m = 1

    w = softmax(weight_logits) holds both conditions without a projection; it starts at 1/M. An absent modality adds 0,
    and the weights of the others stay.
    """

    def __init__(self, size: FusionSize) -> None:
        super().__init__(size)
        self.weight_logits = nn.Parameter(torch.zeros(len(size.dims)))

    def weights(self) -> Tensor:
        """w, (M), in the order of `dims`."""
        return self.weight_logits.softmax(0)

    def combine(self, projected_BMD: Tensor, present_BM: Tensor) -> Tensor:
        return (self.weights().unsqueeze(-1) * projected_BMD).sum(1)


class AttentionFusion(_PooledFusion):
    """Sum of modalities with weights that depend on the row.

    Equation: E23
        H = sum_m alpha_m E_m,   alpha = softmax(W_a [E_1; ...; E_M])

    E_m is the pooled modality, projected and normalised, so that all have the size of H; W_a is `score`. An absent
    modality has weight 0, and those of the others sum to 1.
    """

    def __init__(self, size: FusionSize) -> None:
        super().__init__(size)
        modalities = len(size.dims)
        self.score = nn.Linear(modalities * size.hidden, modalities, bias=False)

    def weights(self, projected_BMD: Tensor, present_BM: Tensor) -> Tensor:
        """alpha_BM, in the order of `dims`."""
        return masked_softmax(self.score(projected_BMD.flatten(1)), present_BM)

    def combine(self, projected_BMD: Tensor, present_BM: Tensor) -> Tensor:
        return (self.weights(projected_BMD, present_BM).unsqueeze(-1) * projected_BMD).sum(1)


class TokenSequence(nn.Module):
    """E_all = [E_1; ...; E_M], the tokens of all modalities one after the other.

    Each is projected, normalised, and marked with a learned vector of its modality. There are no position embeddings:
    the features of towers hold their positions already.
    """

    def __init__(self, size: FusionSize) -> None:
        super().__init__()
        self.project = _projections(size)
        self.modality = nn.Parameter(torch.empty(len(size.dims), size.hidden).normal_(std=0.02))

    def forward(self, tokens: list[Tensor], masks: list[Tensor]) -> tuple[Tensor, Tensor]:
        """-> (B, N, hidden) and its mask (B, N), N = sum_m N_m."""
        return torch.cat(self.parts(tokens), dim=1), torch.cat(masks, dim=1)

    def parts(self, tokens: list[Tensor]) -> list[Tensor]:
        """The same, one (B, N_m, hidden) a modality."""
        modalities = zip(self.project.values(), self.modality, tokens, strict=True)
        return [project(x) + mark for project, mark, x in modalities]


class CrossAttentionFusion(Fusion):
    """Some modalities ask, all answer.

    Equation: E11
        E_fused = sum_m Attention(Q_m, K_all, V_all) W_m,   m in `queries`

    `layers` blocks of the same attention, in which tokens of each asking modality have a W_q and W_m of their own and
    all share W_k and W_v, come first; then the equation, its result averaged over each modality's tokens before the
    sum. Where text alone asks, a picture's many tokens are only looked at, which costs a third.
    """

    def __init__(self, size: FusionSize) -> None:
        super().__init__(size)
        self.queries = tuple(size.dims) if size.queries is None else size.queries
        unknown = set(self.queries) - set(size.dims)
        if unknown or not self.queries:
            raise UserError(f"queries {list(self.queries)} are not among the modalities {', '.join(size.dims)}")
        hidden, groups = size.hidden, len(self.queries)
        self.sequence = TokenSequence(size)
        self.blocks = _blocks(size, groups)
        self.norm = nn.LayerNorm(hidden)
        self.readout = MultiHeadAttention(hidden, hidden, hidden, size.heads, groups)

    def fuse(self, tokens: list[Tensor], masks: list[Tensor]) -> Tensor:
        names = list(self.size.dims)
        parts, mask_of = (
            dict(zip(names, self.sequence.parts(tokens), strict=True)),
            dict(zip(names, masks, strict=True)),
        )
        others = [name for name in names if name not in self.queries]
        sizes = [mask_of[name].shape[1] for name in self.queries]
        x_BND, mask_BN = _joined(parts, self.queries), _joined(mask_of, self.queries)
        context = (_joined(parts, others), _joined(mask_of, others)) if others else (None, None)
        x_BND = self.norm(self.blocks(x_BND, mask_BN, sizes, *context))
        key_BKD, key_mask_BK = x_BND, mask_BN
        if others:
            key_BKD = torch.cat([x_BND, self.norm(_joined(parts, others))], dim=1)
            key_mask_BK = torch.cat([mask_BN, _joined(mask_of, others)], dim=1)
        attended = self.readout(x_BND, key_BKD, key_mask_BK, sizes).split(sizes, dim=1)
        pooled = [masked_mean_pool(x, mask_of[name]) for x, name in zip(attended, self.queries, strict=True)]
        return torch.stack(pooled).sum(0)


def _joined(parts: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    return torch.cat([parts[name] for name in names], dim=1)


class SharedAttentionFusion(Fusion):
    """One self-attention over the tokens of all modalities, with the same weights for all.

    Equation: E19
        H = softmax((W_q E_all)(W_k E_all)^T / sqrt(d_k)) (W_v E_all),   E_all = [E_1; ...; E_M]

    In `layers` blocks; the result is averaged over all kept tokens.
    """

    def __init__(self, size: FusionSize) -> None:
        super().__init__(size)
        self.sequence = TokenSequence(size)
        self.blocks = _blocks(size)

    def fuse(self, tokens: list[Tensor], masks: list[Tensor]) -> Tensor:
        x_BND, mask_BN = self.sequence(tokens, masks)
        return masked_mean_pool(self.blocks(x_BND, mask_BN), mask_BN)


class CoupledFusion(Fusion):
    """A Transformer of its own for each modality, coupled at the end.

    Equation: E20
        H_m = Transformer_m(E_m),   H_fused = W_f [H_1; ...; H_M] + b_f

    Transformer_m is a projection and `layers` blocks on the modality's own tokens, averaged over them; W_f and b_f are
    `couple`.
    """

    def __init__(self, size: FusionSize) -> None:
        super().__init__(size)
        self.project = _projections(size)
        self.encoders = nn.ModuleDict({name: _blocks(size) for name in size.dims})
        self.couple = nn.Linear(len(size.dims) * size.hidden, size.hidden)

    def fuse(self, tokens: list[Tensor], masks: list[Tensor]) -> Tensor:
        encoded = [self.encode(*modality) for modality in zip(self.size.dims, tokens, masks, strict=True)]
        return self.couple(torch.cat(encoded, dim=-1))

    def encode(self, name: str, tokens_BND: Tensor, mask_BN: Tensor) -> Tensor:
        """H_m, (B, hidden), of the modality `name`."""
        return masked_mean_pool(self.encoders[name](self.project[name](tokens_BND), mask_BN), mask_BN)


FUSIONS: dict[str, type[Fusion]] = {
    "sum": SumFusion,
    "weighted_sum": WeightedSumFusion,
    "attention": AttentionFusion,
    "cross_attention": CrossAttentionFusion,
    "shared_attention": SharedAttentionFusion,
    "coupled": CoupledFusion,
}


def build_fusion(
    kind: str,
    dims: Mapping[str, int],
    hidden: int,
    layers: int = 2,
    heads: int = 4,
    dropout: float = 0.1,
    queries: tuple[str, ...] | None = None,
) -> Fusion:
    """The fusion that a recipe names; the other arguments are those of `FusionSize`."""
    if kind not in FUSIONS:
        raise UserError(f"unknown fusion {kind!r}: use one of {', '.join(FUSIONS)}")
    if not dims:
        raise ValueError("a fusion needs at least one modality")
    return FUSIONS[kind](FusionSize(dict(dims), hidden, layers, heads, dropout, queries))


def _projections(size: FusionSize, normalize: bool = True) -> nn.ModuleDict:
    """For each modality LayerNorm(W_m E_m + b_m), or without the norm."""

    def projection(dim: int) -> nn.Module:
        linear = nn.Linear(dim, size.hidden)
        return nn.Sequential(linear, nn.LayerNorm(size.hidden)) if normalize else linear

    return nn.ModuleDict({name: projection(dim) for name, dim in size.dims.items()})


def _blocks(size: FusionSize, groups: int = 1) -> AttentionStack:
    return AttentionStack(size.layers, size.hidden, size.heads, size.dropout, groups)
