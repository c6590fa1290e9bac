"""Prompts and responses laid out as model inputs.

Rows apart: [prompt | response | padding], right-padded, which every decoder reads alike. Rows of one prompt together:
[prompt | response 1 | ... | response n] under a tree mask, in which a response sees the prompt and itself, at the
positions it would have alone; the prompt's forward and backward are then computed once for all its responses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from mmft.models.prompts import Prompt, pad_sequences, stack_token_inputs

REPEAT_LAST: Literal["last"] = "last"
Growth = dict[str, int | Literal["last"]]  # what a per-token input holds at an answer's tokens
# What a prompt's token sees: what precedes it, and beside that the rest of its picture, or of the prompt.
PromptSees = Literal["before", "pictures", "all"]


@dataclass
class Packed:
    """Inputs of a forward pass, and where its output predicts each response's tokens.

    row_B: the row of the inputs that holds response b; index_BT: the position in it whose output predicts token t.
    index_BT runs one past the response where the batch is wide enough: V of the state after the last token. Positions
    beyond a response point at its last token and mean nothing. `pinned`: see `PictureInputs`.
    """

    inputs: dict[str, Any]
    row_B: Tensor
    index_BT: Tensor
    pinned: Any = None
    width: int = field(init=False)

    def __post_init__(self) -> None:
        ids = self.inputs.get("decoder_input_ids", self.inputs.get("input_ids"))
        self.width = ids.shape[1]

    def to(self, device: torch.device | str) -> Packed:
        inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.inputs.items()}
        return Packed(inputs, self.row_B.to(device), self.index_BT.to(device), self.pinned)


def response_rows(responses_BT: Tensor, mask_BT: Tensor) -> list[Tensor]:
    """Each response's kept tokens, on the CPU."""
    lengths = mask_BT.sum(1).tolist()
    return [row[:n] for row, n in zip(responses_BT.cpu(), lengths, strict=True)]


def pack_apart(prompts: Sequence[Prompt], responses: list[Tensor], width: int, pad_id: int, growth: Growth) -> Packed:
    """One row a response, for decoders that read prompt and response as one sequence."""
    sequences = [torch.cat([p.input_ids.cpu(), r]) for p, r in zip(prompts, responses, strict=True)]
    inputs: dict[str, Any] = pad_sequences(sequences, pad_id, "right")
    grown = [grow(p, len(r), growth) for p, r in zip(prompts, responses, strict=True)]
    inputs |= stack_token_inputs(prompts, inputs["input_ids"].shape[1], "right", grown)
    starts = torch.tensor([len(p) - 1 for p in prompts])
    last = torch.tensor([len(s) - 1 for s in sequences])
    index_BT = torch.minimum(starts[:, None] + torch.arange(width)[None, :], last[:, None])
    return Packed(inputs, torch.arange(len(prompts)), index_BT)


def pack_decoder(responses: list[Tensor], width: int, pad_id: int, start_id: int) -> Packed:
    """One row a response, for a decoder of its own: [start | response without its last token]."""
    start = torch.tensor([start_id])
    padded = pad_sequences([torch.cat([start, r[: width - 1]]) for r in responses], pad_id, "right")
    inputs = {"decoder_input_ids": padded["input_ids"], "decoder_attention_mask": padded["attention_mask"]}
    last = padded["attention_mask"].sum(1) - 1
    index_BT = torch.minimum(torch.arange(width)[None, :].expand(len(responses), -1), last[:, None])
    return Packed(inputs, torch.arange(len(responses)), index_BT)


def grow(prompt: Prompt, tokens: int, growth: Growth) -> dict[str, Tensor]:
    """The prompt's per-token inputs and, behind them, those of an answer of so many tokens."""
    grown = {}
    for name, value in prompt.token_inputs.items():
        rule = growth.get(name, REPEAT_LAST)
        shape = (tokens, *value.shape[1:])
        tail = value[-1:].expand(shape) if rule == REPEAT_LAST else value.new_full(shape, rule)
        grown[name] = torch.cat([value, tail])
    return grown


def groups_of(prompts: Sequence[Prompt]) -> list[list[int]]:
    """Rows that share a prompt, by the prompt's content, in order of first appearance."""
    groups: dict[bytes, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(prompt.key, []).append(i)
    return list(groups.values())


def split_groups(
    groups: list[list[int]], prompts: Sequence[Prompt], lengths: list[int], hidden: int
) -> list[list[int]]:
    """Groups cut where one more answer in a row would cost more than it saves.

    A row of L tokens costs about L + L^2 / (6 * hidden) units: the linear layers, and attention, which under a dense
    mask also multiplies what the mask removes.
    """
    cut = []
    for group in groups:
        longest = max(lengths[i] for i in group)
        prompt = len(prompts[group[0]])

        def cost(size: int, n: int = len(group), p: int = prompt, t: int = longest) -> float:
            tokens = p + size * t
            return math.ceil(n / size) * (tokens + tokens**2 / (6 * hidden))

        size = min(range(1, len(group) + 1), key=cost)
        cut += [group[start : start + size] for start in range(0, len(group), size)]
    return cut


def pack_together(
    prompts: Sequence[Prompt],
    responses: list[Tensor],
    width: int,
    pad_id: int,
    growth: Growth,
    groups: list[list[int]],
    positions: Sequence[Tensor],
) -> Packed:
    """One row a group. `positions`: for each group its prompt's position ids, (P,) or (axes, P). In the place of an
    attention mask stand segments (G, L): 0 the prompt, 1 .. n its responses, -1 padding; see `tree_mask`.
    """
    rows, grown, places, segments = [], [], [], []
    row_B = torch.zeros(len(prompts), dtype=torch.long)
    index_BT = torch.zeros(len(prompts), width, dtype=torch.long)
    for g, (group, of_prompt) in enumerate(zip(groups, positions, strict=True)):
        prompt = prompts[group[0]]
        end, follows = len(prompt), of_prompt.max() + 1
        ids, place, segment = [prompt.input_ids.cpu()], [of_prompt], [torch.zeros(end, dtype=torch.long)]
        for k, i in enumerate(group):
            steps = torch.arange(len(responses[i]))
            row_B[i] = g
            read = torch.arange(width).clamp(max=len(steps))  # tokens of the response read before token t
            index_BT[i] = torch.where(read > 0, end - 1 + read, len(prompt) - 1)
            ids.append(responses[i])
            place.append((follows + steps).expand(*of_prompt.shape[:-1], -1))
            segment.append(torch.full_like(steps, k + 1))
            end += len(steps)
        rows.append(torch.cat(ids))
        places.append(torch.cat(place, -1))
        segments.append(torch.cat(segment))
        grown.append(grow(prompt, end - len(prompt), growth))
    inputs: dict[str, Any] = pad_sequences(rows, pad_id, "right")
    length = inputs["input_ids"].shape[1]
    shared = [prompts[group[0]] for group in groups]
    inputs |= stack_token_inputs(shared, length, "right", grown)
    inputs["position_ids"] = torch.stack([_right_padded(p, length, 0) for p in places], -2)
    inputs["attention_mask"] = torch.stack([_right_padded(s, length, -1) for s in segments])
    return Packed(inputs, row_B, index_BT)


def _right_padded(x: Tensor, length: int, value: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, length - x.shape[-1]), value=value)


def tree_mask(segment_GL: Tensor, block_GL: Tensor | None = None) -> Tensor:
    """(G, 1, L, L) bool, True = query row i sees key j: what lies before it in its own segment and in segment 0, the
    prompt; tokens of one block, numbered from 1, see one another as well. Padding (-1) sees itself, so that no row of
    a softmax is empty, and is seen by none.
    """
    length = segment_GL.shape[1]
    before = torch.ones(length, length, dtype=torch.bool, device=segment_GL.device).tril()
    own = segment_GL[:, :, None] == segment_GL[:, None, :]
    prompt = (segment_GL == 0)[:, None, :] & (segment_GL >= 0)[:, :, None]
    allowed = before & (own | prompt)
    if block_GL is not None:
        allowed = allowed | ((block_GL[:, :, None] == block_GL[:, None, :]) & (block_GL > 0)[:, :, None])
    return allowed[:, None]


def prompt_blocks(packed: Packed, seen: PromptSees, growth: Growth) -> Tensor | None:
    """(G, L) blocks for `tree_mask`: the prompt as one, or each run of its tokens of another type than an answer's.

    `packed` is `pack_together`'s, with segments in the place of an attention mask.
    """
    is_prompt = packed.inputs["attention_mask"] == 0
    if seen == "before":
        return None
    if seen == "all":
        return is_prompt.long()
    inside = torch.zeros_like(is_prompt)
    for name, rule in growth.items():
        if rule != REPEAT_LAST and name in packed.inputs:
            inside = inside | (is_prompt & (packed.inputs[name] != rule))
    starts = inside & ~torch.nn.functional.pad(inside, (1, 0))[:, :-1]
    return starts.cumsum(1) * inside


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as what is added to attention scores, which every attention implementation takes."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
