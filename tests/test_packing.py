"""Prompts and responses as model inputs, by hand."""

from __future__ import annotations

import torch

from mmft.models.packing import (
    REPEAT_LAST,
    groups_of,
    grow,
    pack_apart,
    pack_decoder,
    pack_together,
    response_rows,
    split_groups,
    tree_mask,
)
from mmft.models.prompts import Prompt

PAD = 0
ANSWERS = torch.tensor([[11, 12, 0], [21, 0, 0], [31, 32, 33]])
MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]]).bool()


def prompt(*ids: int, **token_inputs: list[int]) -> Prompt:
    return Prompt(torch.tensor(ids), {}, {name: torch.tensor(v) for name, v in token_inputs.items()})


def test_apart() -> None:
    prompts = [prompt(5, 6), prompt(7), prompt(8, 9)]
    packed = pack_apart(prompts, response_rows(ANSWERS, MASK), 3, PAD, {})
    assert packed.inputs["input_ids"].tolist() == [[5, 6, 11, 12, 0], [7, 21, 0, 0, 0], [8, 9, 31, 32, 33]]
    assert packed.inputs["attention_mask"].sum(1).tolist() == [4, 2, 5]
    # token t is foreseen one position before it; one past the end where the batch is wide enough, then the last token
    assert packed.index_BT.tolist() == [[1, 2, 3], [0, 1, 1], [1, 2, 3]]
    assert packed.row_B.tolist() == [0, 1, 2]


def test_decoder_of_its_own() -> None:
    packed = pack_decoder(response_rows(ANSWERS, MASK), 3, PAD, start_id=2)
    assert packed.inputs["decoder_input_ids"].tolist() == [[2, 11, 12], [2, 21, 0], [2, 31, 32]]
    assert packed.inputs["decoder_attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 1]]
    assert packed.index_BT.tolist() == [[0, 1, 2], [0, 1, 1], [0, 1, 2]]


def test_together() -> None:
    """Rows 0 and 1 share a prompt of two tokens, row 2 has its own of one."""
    shared, own = prompt(5, 6), prompt(7)
    packed = pack_together(
        [shared, shared, own], response_rows(ANSWERS, MASK), 3, PAD, {}, [[0, 1], [2]],
        [torch.arange(2), torch.arange(1)],
    )  # fmt: skip
    assert packed.inputs["input_ids"].tolist() == [[5, 6, 11, 12, 21], [7, 31, 32, 33, 0]]
    assert packed.inputs["attention_mask"].tolist() == [[0, 0, 1, 1, 2], [0, 1, 1, 1, -1]]
    # each response goes on where the prompt ended, not where the one before it ended
    assert packed.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 2], [0, 1, 2, 3, 0]]
    assert packed.row_B.tolist() == [0, 0, 1]
    # the first token is foreseen by the prompt's last, whatever lies between
    assert packed.index_BT.tolist() == [[1, 2, 3], [1, 4, 4], [0, 1, 2]]


def test_positions_in_space_go_on_after_the_largest() -> None:
    """Three axes; a picture's positions may lie beyond the prompt's last."""
    own = prompt(5, 6)
    places = torch.tensor([[0, 1], [0, 4], [0, 2]])
    packed = pack_together([own], [torch.tensor([11, 12])], 2, PAD, {}, [[0]], [places])
    assert packed.inputs["position_ids"].tolist() == [[[0, 1, 5, 6]], [[0, 4, 5, 6]], [[0, 2, 5, 6]]]


def test_tree_mask() -> None:
    """[prompt, prompt, a, a, b, padding]"""
    seen = tree_mask(torch.tensor([[0, 0, 1, 1, 2, -1]]))[0, 0].int().tolist()
    assert seen == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],  # b sees the prompt and not a
        [0, 0, 0, 0, 0, 1],  # padding sees itself alone, and nobody sees it
    ]


def test_token_inputs_grow_by_rule() -> None:
    own = prompt(5, 6, token_type_ids=[3, 4], cross_attention_mask=[7, 8])
    grown = grow(own, 2, {"token_type_ids": 1, "cross_attention_mask": REPEAT_LAST})
    assert grown["token_type_ids"].tolist() == [3, 4, 1, 1]
    assert grown["cross_attention_mask"].tolist() == [7, 8, 8, 8]


def test_groups_are_found_by_content() -> None:
    picture = {"pixel_values": torch.ones(1, 3)}
    a, same, other = prompt(5), Prompt(torch.tensor([5])), Prompt(torch.tensor([5]), picture)
    assert groups_of([a, other, same, a]) == [[0, 2, 3], [1]]
    assert Prompt(torch.tensor([5]), {"pixel_values": torch.ones(1, 3)}).key == other.key
    assert Prompt(torch.tensor([5]), {"pixel_values": torch.ones(3, 1)}).key != other.key


def test_long_answers_are_cut_apart() -> None:
    """A dense mask over eight answers of 500 tokens to a prompt of 10 costs more than the prompt; of 5 tokens, not."""
    prompts = [prompt(*range(10))] * 8
    assert split_groups([list(range(8))], prompts, [5] * 8, hidden=64) == [list(range(8))]
    assert max(len(g) for g in split_groups([list(range(8))], prompts, [500] * 8, hidden=64)) == 1
