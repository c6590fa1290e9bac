"""Critics: V(s_t) from the policy's own hidden states, or from a second model as TRL has it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmft.models.packing import Packed


class ValueHead(nn.Module):
    """A value head on the input of the policy's output embedding: one trunk, no second model.

    One hidden layer: on the bundled model it explains twice the variance of returns that a linear head does from the
    same number of captions. It starts at one value everywhere (`centre`), so that at first neither the advantages nor
    the trunk's gradient depend on noise. Computes in float32 whatever the trunk's type.
    """

    base_model_prefix = "trunk"  # TRL looks a critic's backbone up by this name; ours is the policy's

    def __init__(self, hidden_size: int, width: int = 256):
        super().__init__()
        self.trunk = nn.Identity()
        self.score = nn.Sequential(nn.Linear(hidden_size, width), nn.Tanh(), nn.Linear(width, 1))
        nn.init.zeros_(self.score[-1].weight)
        nn.init.zeros_(self.score[-1].bias)

    def forward(self, states_BTD: Tensor) -> Tensor:
        """states_BTD -> value_BT."""
        return self.score(states_BTD.to(self.score[0].weight.dtype)).squeeze(-1)

    @torch.no_grad()
    def centre(self, value: float) -> None:
        """Adds `value` to every prediction: the critic need not spend its first updates on the mean return."""
        self.score[-1].bias.add_(value)


def backbone_values(value_model: nn.Module, packed: Packed) -> Tensor:
    """value_BT of a critic with a backbone of its own (TRL's `value_model`: `score` and a `base_model_prefix`). Text
    only.
    """
    backbone = getattr(value_model, value_model.base_model_prefix)
    names = ("input_ids", "attention_mask", "position_ids")
    inputs = {name: packed.inputs[name] for name in names if name in packed.inputs}
    output = backbone(**inputs, output_hidden_states=True, return_dict=True, use_cache=False)
    states_BTD = gather_states(output.hidden_states[-1], packed.row_B, packed.index_BT)
    return value_model.score(states_BTD).squeeze(-1).float()


def gather_states(hidden_GLD: Tensor, row_B: Tensor, index_BT: Tensor) -> Tensor:
    """hidden_GLD at the positions index_BT of the rows row_B -> (B, T, D)."""
    return hidden_GLD[row_B[:, None], index_BT]
