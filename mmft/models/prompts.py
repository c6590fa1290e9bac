"""Prompts as the model reads them: one row each, unpadded, so that a batch of any rows can be made at any padding side.

A picture's tensors stay with its prompt. Whatever picks, permutes or repeats rows therefore moves pictures along with
them; there is no second index that could go wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from mmft.types import Row, UserError

# Per-token inputs besides the ids: a model that needs one would be silently wrong if an answer's positions lacked it.
_TOKEN_INPUTS = ("token_type_ids", "mm_token_type_ids", "cross_attention_mask", "image_embeds_position_mask")


@dataclass(frozen=True, eq=False)
class Prompt:
    """One prompt: `input_ids` (P,) int64 without padding, and the picture tensors that the model takes beside it."""

    input_ids: Tensor
    pictures: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.input_ids)


class PromptBuilder:
    """Turns rows into prompts with a processor (or a bare tokenizer, for text alone), and prompts into batches."""

    def __init__(self, processor: Any):
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    @property
    def pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)

    def __call__(self, row: Row) -> Prompt:
        """Raises UserError for a prompt that holds the picture placeholder: it would stand for a picture that isn't
        there.
        """
        placeholder = getattr(self.processor, "image_token", None)
        if placeholder and placeholder in row.prompt:
            raise UserError(f"row {row.id}: the prompt holds the picture placeholder {placeholder!r}; remove it")
        text = self._text(row)
        bos = self.tokenizer.bos_token
        # A template may write BOS itself; the tokenizer must not add a second one.
        options = {"return_tensors": "pt", "add_special_tokens": not (bos and text.startswith(bos))}
        if row.image is None:
            encoded = self.tokenizer(text, **options)
        else:
            encoded = self.processor(text=[text], images=[row.image], **options)
        unsupported = [name for name in _TOKEN_INPUTS if name in encoded and self.processor is not self.tokenizer]
        if unsupported:
            raise UserError(
                f"this model's processor returns {', '.join(unsupported)}, which mmft does not extend over answers yet"
            )
        skip = {"input_ids", "attention_mask", "labels", "token_type_ids"}
        pictures = {name: value for name, value in encoded.items() if name not in skip and isinstance(value, Tensor)}
        return Prompt(encoded["input_ids"][0], pictures)

    def _text(self, row: Row) -> str:
        if getattr(self.processor, "chat_template", None):
            content: list[dict[str, str]] = [] if row.image is None else [{"type": "image"}]
            message = {"role": "user", "content": [*content, {"type": "text", "text": row.prompt}]}
            return self.processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        placeholder = getattr(self.processor, "image_token", "") if row.image is not None else ""
        return f"{placeholder}{row.prompt}"

    def collate(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The data loader's collator: rows stay whole beside their prompts."""
        return {"prompts": [self(row) for row in rows], "rows": list(rows)}


def prompts_of(batch: dict[str, Any]) -> list[Prompt]:
    """The prompts of a data loader's batch: ours, or those in TRL's padded `input_ids` and `attention_mask`."""
    if "prompts" in batch:
        return list(batch["prompts"])
    mask = batch["attention_mask"].bool()
    return [Prompt(ids[keep].cpu()) for ids, keep in zip(batch["input_ids"], mask, strict=True)]


def pad_prompts(prompts: Sequence[Prompt], pad_id: int, side: Literal["left", "right"]) -> dict[str, Tensor]:
    """Model inputs of prompts alone: `input_ids`, `attention_mask` (B, P), and their pictures in the order of the
    rows.
    """
    return pad_sequences([p.input_ids for p in prompts], pad_id, side) | stack_pictures(prompts)


def pad_sequences(sequences: Sequence[Tensor], pad_id: int, side: Literal["left", "right"]) -> dict[str, Tensor]:
    width = max(len(s) for s in sequences)
    ids = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(sequences), width), dtype=torch.long)
    for i, sequence in enumerate(sequences):
        where = slice(width - len(sequence), width) if side == "left" else slice(0, len(sequence))
        ids[i, where] = sequence.cpu()
        mask[i, where] = 1
    return {"input_ids": ids, "attention_mask": mask}


def stack_pictures(prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """Picture tensors of the rows, one after the other along their first dimension. Rows without a picture add
    nothing.
    """
    names = dict.fromkeys(name for p in prompts for name in p.pictures)
    return {name: torch.cat([p.pictures[name] for p in prompts if name in p.pictures]) for name in names}
