"""Potential-based shaping: by hand, and on a small decision problem solved exactly with and without it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mmft.rewards.shaping import prefix_potentials, shaped_reward
from mmft.rewards.terms import Term, build_term
from mmft.types import Row, UserError

NAN = float("nan")


def test_shaping_by_hand() -> None:
    # beta 2, gamma 1/2. Row 0: Phi = [1, 3, 4], R = [0, 1, 8]
    #   2 (3/2 - 1) = 1;  1 + 2 (4/2 - 3) = -1;  8 + 2 (0 - 4) = 0
    # Row 1, one kept: Phi = [3, -, -], R = [5, -, -]: 5 + 2 (0 - 3) = -1
    reward = torch.tensor([[0.0, 1.0, 8.0], [5.0, NAN, NAN]])
    potential = torch.tensor([[1.0, 3.0, 4.0], [3.0, NAN, 7.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    shaped = shaped_reward(reward, potential, mask, beta=2.0, gamma=0.5)
    assert_close(shaped, torch.tensor([[1.0, -1.0, 0.0], [-1.0, 0.0, 0.0]]))


def test_a_row_telescopes_to_its_return() -> None:
    # Small integers and a power of two: floating point is exact here, so equality is too.
    reward = torch.randint(-8, 8, (4, 6)).float()
    potential = torch.randint(-8, 8, (4, 6)).float()
    mask = torch.arange(6) < torch.tensor([0, 1, 4, 6])[:, None]
    shaped = shaped_reward(reward, potential, mask, beta=0.5, gamma=1.0)
    expected = reward.masked_fill(~mask, 0.0).sum(1) - 0.5 * potential[:, 0] * mask[:, 0]
    assert torch.equal(shaped.sum(1), expected)
    unshaped = shaped_reward(reward, potential, mask, beta=0.0, gamma=1.0)
    assert torch.equal(unshaped, reward.masked_fill(~mask, 0.0))


def test_one_shape_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"one shape, got \[\(2, 3\), \(2, 1\), \(2, 3\)\]"):
        shaped_reward(torch.zeros(2, 3), torch.zeros(2, 1), torch.ones(2, 3, dtype=torch.bool), 1.0, 1.0)


# A grid of 3 x 4 (Russell and Norvig's): a wall, a goal of +1, a pit of -1, 0.04 a step, moves that slip sideways.

ROWS, COLUMNS = 3, 4
CELLS = [(r, c) for r in range(ROWS) for c in range(COLUMNS) if (r, c) != (1, 1)]
GOAL, PIT = CELLS.index((0, 3)), CELLS.index((1, 3))
TERMINAL = torch.tensor([cell in (GOAL, PIT) for cell in range(len(CELLS))])
MOVES = [(-1, 0), (0, 1), (1, 0), (0, -1)]


def transitions() -> Tensor:
    """P(s' | s, a), S x A x S: the move with 0.8, either side with 0.1, against a wall nothing."""
    chances = torch.zeros(len(CELLS), len(MOVES), len(CELLS), dtype=torch.float64)
    for s, (r, c) in enumerate(CELLS):
        for a in range(len(MOVES)):
            for move, chance in ((MOVES[a], 0.8), (MOVES[a - 1], 0.1), (MOVES[(a + 1) % 4], 0.1)):
                there = (r + move[0], c + move[1])
                chances[s, a, CELLS.index(there) if there in CELLS else s] += chance
    return chances


def environment_reward() -> Tensor:
    """R(s, a, s'), S x A x S."""
    reward = torch.full((len(CELLS), len(MOVES), len(CELLS)), -0.04, dtype=torch.float64)
    reward[:, :, GOAL] += 1
    reward[:, :, PIT] -= 1
    return reward


def solve(reward: Tensor, gamma: float) -> Tensor:
    """Q*(s, a) by value iteration, over the states that are not terminal."""
    chances, value = transitions(), torch.zeros(len(CELLS), dtype=torch.float64)
    for _ in range(2000):
        action_value = (chances * (reward + gamma * value)).sum(-1)
        updated = action_value.amax(1).masked_fill(TERMINAL, 0.0)
        if torch.equal(updated, value):
            break
        value = updated
    return action_value[~TERMINAL]


def best_actions(action_value: Tensor) -> Tensor:
    """Which actions are optimal, ties included."""
    return action_value >= action_value.amax(1, keepdim=True) - 1e-9


def shape_by_potential(reward: Tensor, potential: Tensor, beta: float, gamma: float) -> Tensor:
    """Every transition as a response of its own: the step, then s' unless it is terminal."""
    states, actions, _ = reward.shape
    before = potential[:, None, None].expand_as(reward)
    after = potential.expand_as(reward)
    step_BT = torch.stack([reward, torch.zeros_like(reward)], -1).flatten(0, -2)
    potential_BT = torch.stack([before, after], -1).flatten(0, -2)
    goes_on = (~TERMINAL).expand(states, actions, -1)
    mask_BT = torch.stack([torch.ones_like(goes_on), goes_on], -1).flatten(0, -2)
    return shaped_reward(step_BT, potential_BT, mask_BT, beta, gamma)[:, 0].view_as(reward)


@pytest.mark.parametrize("gamma", [0.5, 0.9, 1.0])
def test_potentials_keep_the_optimal_policy_and_bonuses_do_not(gamma: float) -> None:
    reward = environment_reward()
    plain = solve(reward, gamma)
    changed = 0
    for seed, beta in enumerate([0.1, 1.0, 5.0, -2.0, 1.0, 1.0]):
        potential = torch.randn(len(CELLS), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        shaped = solve(shape_by_potential(reward, potential, beta, gamma), gamma)
        assert torch.equal(best_actions(shaped), best_actions(plain))
        # Q'(s, a) = Q(s, a) - beta Phi(s)
        assert_close(shaped, plain - beta * potential[~TERMINAL, None], rtol=0, atol=1e-9)
        # The plain form, R + beta Phi(s, a) with Phi of the state that is reached, pays for staying where Phi is high.
        # (At gamma = 1 such a loop has no finite value.)
        if gamma < 1:
            bonus = solve(reward + beta * potential, gamma)
            changed += not torch.equal(best_actions(bonus), best_actions(plain))
    assert changed == 6 * (gamma < 1)


# Phi of partial captions


class Words(Term):
    """Counts words; remembers what it was asked."""

    def __init__(self, sign: int = 1) -> None:
        self.sign = sign
        self.calls: list[list[tuple[str, str]]] = []

    def __call__(
        self, captions: Sequence[str], rows: Sequence[Row], finished: Sequence[bool] | None = None
    ) -> list[float]:
        assert finished is None and all(row.scene is None for row in rows)
        self.calls.append([(row.id, caption) for row, caption in zip(rows, captions, strict=True)])
        return [float(len(caption.split())) + 0.5 for caption in captions]


def test_distinct_prefixes_are_scored_once() -> None:
    first, second = (Row(name, None, "Describe.", scene="the oracle") for name in ("r1", "r2"))
    term = Words()
    # Two responses to r1 with a common beginning, one to r2; a token that decodes to nothing yet repeats its prefix.
    prefixes = [["", "a", "a dog"], ["", "a", "a", "a cat"], [""]]
    assert prefix_potentials(term, prefixes, [first, first, second]) == [[0.5, 1.5, 2.5], [0.5, 1.5, 1.5, 2.5], [0.5]]
    assert term.calls == [[("r1", ""), ("r1", "a"), ("r1", "a dog"), ("r1", "a cat"), ("r2", "")]]


def test_rows_of_one_id_are_not_mixed_up() -> None:
    rows = [Row("same", None, "Describe.", (reference,)) for reference in ("a red dog runs", "two cats")]
    bleu = build_term("bleu", max_order=1)
    (wrong,), (right,) = prefix_potentials(bleu, [["two cats"], ["two cats"]], rows)
    assert wrong == 0.0 and right == pytest.approx(1.0)


def test_costs_count_negative_and_nothing_is_no_call() -> None:
    row = Row("r1", None, "Describe.")
    assert prefix_potentials(Words(sign=-1), [["a dog"]], [row]) == [[-2.5]]
    term = Words()
    assert prefix_potentials(term, [[], []], [row, row]) == [[], []] and term.calls == []
    with pytest.raises(ValueError):
        prefix_potentials(term, [["a"]], [row, row])


def test_a_potential_that_is_not_finite_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Words, "__call__", lambda self, captions, rows: [NAN] * len(captions))
    with pytest.raises(UserError, match=r"'detail' gave nan for sample 'r1', partial caption 'a do'"):
        prefix_potentials(Words(), [["a do"]], [Row("r1", None, "Describe.")], name="detail")
