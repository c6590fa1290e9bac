"""What a reward model says about a fused embedding: a number, or a number and how noisy it is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmft.nn.dropout import McDropout

# sigma from 0.018 to 55 in units of the standardised ratings: no data needs more.
LOG_VARIANCE_BOUND = 8.0


class ScalarHead(nn.Module):
    """r = w_2 . Dropout(GELU(W_1 LayerNorm(H) + b_1)) + b_2."""

    def __init__(self, hidden: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.score = _mlp(hidden, 1, dropout)

    def forward(self, fused_BD: Tensor) -> Tensor:
        """H, (B, hidden) -> mean_B."""
        return self.score(fused_BD).squeeze(-1)


class GaussianHead(nn.Module):
    """A mean and a log variance, for the aleatoric loss (E33), from one hidden layer.

        s = c tanh(s_raw / c),   c = 8

    The bound keeps exp(-s) in the loss from exploding when a sample that seemed noiseless turns out wrong. It is soft
    because a clamped value has no gradient and could never come back; near 0, where variances of standardised ratings
    lie, s = s_raw.
    """

    def __init__(self, hidden: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.score = _mlp(hidden, 2, dropout)

    def forward(self, fused_BD: Tensor) -> tuple[Tensor, Tensor]:
        """H, (B, hidden) -> (mean_B, log_variance_B)."""
        mean_B, raw_B = self.score(fused_BD).unbind(-1)
        return mean_B, LOG_VARIANCE_BOUND * torch.tanh(raw_B / LOG_VARIANCE_BOUND)


def _mlp(hidden: int, outputs: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(hidden), nn.Linear(hidden, hidden), nn.GELU(), McDropout(dropout), nn.Linear(hidden, outputs)
    )
