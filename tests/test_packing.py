"""Prompts and responses as model inputs, by hand."""

from __future__ import annotations

import torch

from mmft.models.packing import (
    REPEAT_LAST,
    Packed,
    additive,
    groups_of,
    grow,
    pack_apart,
    pack_decoder,
    pack_together,
    prompt_blocks,
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


def test_together_in_any_order() -> None:
    """Rows of a group need not be neighbours, and a row goes where its own group lies."""
    shared, own = prompt(5, 6, 7), prompt(8)
    packed = pack_together(
        [shared, own, shared], response_rows(ANSWERS, MASK), 3, PAD, {}, [[1], [0, 2]],
        [torch.arange(1), torch.arange(3)],
    )  # fmt: skip
    assert packed.inputs["input_ids"].tolist() == [[8, 21, 0, 0, 0, 0, 0, 0], [5, 6, 7, 11, 12, 31, 32, 33]]
    assert packed.inputs["attention_mask"].tolist() == [[0, 1, -1, -1, -1, -1, -1, -1], [0, 0, 0, 1, 1, 2, 2, 2]]
    assert packed.inputs["position_ids"].tolist() == [[0, 1, 0, 0, 0, 0, 0, 0], [0, 1, 2, 3, 4, 3, 4, 5]]
    assert packed.row_B.tolist() == [1, 0, 1]
    assert packed.index_BT.tolist() == [[2, 3, 4], [0, 1, 1], [2, 5, 6]]


def test_every_packing_foresees_the_same_tokens() -> None:
    """The ids up to each place in `index_BT` end in the prompt and the answer so far, however rows are laid out."""
    shared, own = prompt(5, 6), prompt(7)
    prompts, responses = [shared, own, shared], response_rows(ANSWERS, MASK)
    together = pack_together(
        prompts, responses, 3, PAD, {}, groups_of(prompts), [torch.arange(2), torch.arange(1)]
    )  # fmt: skip
    seen = tree_mask(together.inputs["attention_mask"])[:, 0]
    for packed in (pack_apart(prompts, responses, 3, PAD, {}), together):
        for b, response in enumerate(responses):
            for t in range(len(response)):
                row, place = packed.inputs["input_ids"][packed.row_B[b]], packed.index_BT[b, t]
                read = row[: place + 1] if packed is not together else row[seen[packed.row_B[b], place]]
                assert read.tolist() == [*prompts[b].input_ids.tolist(), *response[:t].tolist()]


def test_positions_in_space_go_on_after_the_largest() -> None:
    """Three axes; a picture's positions may lie beyond the prompt's last."""
    own = prompt(5, 6, 7)
    places = torch.tensor([[0, 1, 3], [0, 4, 3], [0, 2, 3]])
    packed = pack_together([own], [torch.tensor([11, 12])], 2, PAD, {}, [[0]], [places])
    assert packed.inputs["position_ids"].tolist() == [[[0, 1, 3, 5, 6]], [[0, 4, 3, 5, 6]], [[0, 2, 3, 5, 6]]]


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


def test_tree_mask_with_blocks() -> None:
    """[prompt 0, picture 1, picture 1, prompt 0, a, b]: a block's tokens see one another, and nothing else changes."""
    segments = torch.tensor([[0, 0, 0, 0, 1, 2]])
    plain, seen = tree_mask(segments), tree_mask(segments, torch.tensor([[0, 1, 1, 0, 0, 0]]))
    assert (seen ^ plain).nonzero().tolist() == [[0, 0, 1, 2]]
    apart = tree_mask(segments, torch.tensor([[0, 1, 2, 0, 0, 0]]))
    assert torch.equal(apart, plain), "two pictures do not see each other"


def test_a_mask_as_it_is_added() -> None:
    seen = additive(torch.tensor([[True, False]]), torch.bfloat16)
    assert seen.dtype == torch.bfloat16 and seen.tolist() == [[0.0, torch.finfo(torch.bfloat16).min]]


def test_blocks_of_a_prompt() -> None:
    """[text, picture, picture, text, picture, answer, padding]: a picture's type is another than an answer's."""
    types, segments = torch.tensor([[0, 1, 1, 0, 1, 0, 0]]), torch.tensor([[0, 0, 0, 0, 0, 1, -1]])
    packed = Packed(
        {"input_ids": torch.zeros(1, 7), "attention_mask": segments, "token_type_ids": types, "image_mask": 1 - types},
        torch.zeros(1), torch.zeros(1, 1),
    )  # fmt: skip
    growth = {"token_type_ids": 0, "image_mask": REPEAT_LAST}
    assert prompt_blocks(packed, "before", growth) is None
    assert prompt_blocks(packed, "all", growth).tolist() == [[1, 1, 1, 1, 1, 0, 0]]
    assert prompt_blocks(packed, "pictures", growth).tolist() == [[0, 1, 1, 0, 2, 0, 0]]
    assert prompt_blocks(packed, "pictures", {"token_type_ids": 1}).tolist() == [[1, 0, 0, 2, 0, 0, 0]]


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


def cut(prompt_tokens: int, answer_tokens: int, answers: int, hidden: int) -> list[int]:
    """Sizes of what one group of equal answers is cut into."""
    rows = list(range(answers))
    groups = split_groups([rows], [prompt(*range(prompt_tokens))] * answers, [answer_tokens] * answers, hidden)
    assert [i for group in groups for i in group] == rows, "every row once, in order"
    return [len(group) for group in groups]


def test_groups_are_cut_where_that_costs_least() -> None:
    """A row of L tokens costs L + L^2 / (6 hidden); hidden = 1."""
    # 6 + 3: apart 2 (9 + 81/6) = 45, together 12 + 144/6 = 36
    assert cut(6, 3, 2, hidden=1) == [2]
    # 8 + 7: apart 2 (15 + 225/6) = 105, together 22 + 484/6 = 102.7; 8 + 8: 117.3 and 120
    assert cut(8, 7, 2, hidden=1) == [2] and cut(8, 8, 2, hidden=1) == [1, 1]
    # 1 + 12: apart 2 (13 + 169/6) = 82.3, together 25 + 625/6 = 129.2
    assert cut(1, 12, 2, hidden=1) == [1, 1]
    # 6 + 6 of three: apart 3 (12 + 144/6) = 108, in two rows 2 (18 + 324/6) = 144, together 24 + 576/6 = 120
    assert cut(6, 6, 3, hidden=1) == [1, 1, 1]
    # 12 + 4 of four: apart 4 (16 + 256/6) = 234.7, in twos 2 (20 + 400/6) = 173.3, in three and one 2 (24 + 576/6) =
    # 240, together 28 + 784/6 = 158.7
    assert cut(12, 4, 4, hidden=1) == [4]
    # 12 + 8 of four: apart 346.7, in twos 2 (28 + 784/6) = 317.3, together 44 + 1936/6 = 366.7
    assert cut(12, 8, 4, hidden=1) == [2, 2]
    # where attention is cheap beside the layers, the prompt is saved whatever the answers
    assert cut(10, 500, 8, hidden=10**6) == [8]


def test_the_longest_answer_counts() -> None:
    prompts = [prompt(*range(6))] * 2
    assert split_groups([[0, 1]], prompts, [3, 3], hidden=1) == [[0, 1]]
    assert split_groups([[0, 1]], prompts, [3, 30], hidden=1) == [[0], [1]]
