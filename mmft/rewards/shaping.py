"""Potential-based shaping: reward for progress inside a response that leaves the best policy what it was."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mmft.rewards.terms import Term
from mmft.types import Row, UserError


def shaped_reward(reward_BT: Tensor, potential_BT: Tensor, mask_BT: Tensor, beta: float, gamma: float) -> Tensor:
    """Rewards with potential-based shaping.

    Equation: E15
        R'_t = R_t + beta (gamma Phi(s_{t+1}) - Phi(s_t)),    Phi(terminal) = 0

    Any Phi and beta leave the optimal policies unchanged, and only this form does: the shaped action values are
    Q(s, a) - beta Phi(s), and what is the same for all actions decides nothing. A response is an episode, so the state
    after its last token is terminal; with another potential there, the shaping would pay for how a response ends. At
    gamma = 1 a row sums to its unshaped return minus beta Phi(s_0).

    Args:
        reward_BT: R_t; anything outside the mask.
        potential_BT: Phi(s_t), of the state *before* token t; anything outside the mask.
        mask_BT: bool, True positions contiguous from 0.
        beta: weight of the shaping.
        gamma: the discount in [0, 1] that the advantages use; another one would not be policy-invariant.

    Returns:
        shaped reward_BT, 0 outside the mask.

    Raises:
        ValueError: the shapes differ.

    Sources: Ng, Harada, Russell 1999, "Policy Invariance Under Reward Transformations"; Grześ 2017, "Reward Shaping
        in Episodic Reinforcement Learning", for the terminal state.
    """
    if not reward_BT.shape == potential_BT.shape == mask_BT.shape:
        shapes = [tuple(x.shape) for x in (reward_BT, potential_BT, mask_BT)]
        raise ValueError(f"reward, potential and mask must have one shape, got {shapes}")
    potential_BT = potential_BT.masked_fill(~mask_BT, 0.0)
    next_potential_BT = torch.cat([potential_BT[:, 1:], torch.zeros_like(potential_BT[:, :1])], dim=1)
    shaped_BT = reward_BT + beta * (gamma * next_potential_BT - potential_BT)
    return shaped_BT.masked_fill(~mask_BT, 0.0)


def prefix_potentials(
    term: Term, prefixes: Sequence[Sequence[str]], rows: Sequence[Row], name: str = "shaping"
) -> list[list[float]]:
    """Phi of partial captions: a reward term as if the caption ended there.

    More is better: a cost counts negative. Nothing is shifted, so Phi of the empty caption is what the term gives for
    it. The term is called once, on the distinct pairs of row and prefix: tokens that decode to nothing yet and
    responses of one row with a common beginning cost nothing.

    Args:
        term: fitted, if it needs that.
        prefixes: for each of B rows the decoded text before token t, t = 0 .. T-1; rows may differ in T.
        rows: B; several responses to one row give the same object several times. The term doesn't see the oracle.
        name: of the term in the recipe, for the error.

    Returns:
        Phi(s_t), in the nesting of `prefixes`.

    Raises:
        UserError: the term gives a value that is not finite.
    """
    keys = [[(id(row), text) for text in texts] for row, texts in zip(rows, prefixes, strict=True)]
    visible = {id(row): row.for_reward() for row in rows}
    distinct = list(dict.fromkeys(key for row_keys in keys for key in row_keys))
    if not distinct:
        return [[] for _ in keys]
    values = term([text for _, text in distinct], [visible[row] for row, _ in distinct])
    potential = {}
    for key, value in zip(distinct, values, strict=True):
        if not math.isfinite(value):
            raise UserError(
                f"reward term {name!r} gave {value} for sample {visible[key[0]].id!r}, partial caption {key[1]!r}"
            )
        potential[key] = term.sign * value
    return [[potential[key] for key in row_keys] for row_keys in keys]
