"""Prompts as the model reads them: one row each, unpadded, so that a batch of any rows can be made at any padding side.

A picture's tensors stay with its prompt. Whatever picks, permutes or repeats rows therefore moves pictures along with
them; there is no second index that could go wrong.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from mmft.types import Row, UserError

_NOT_PICTURES = {"input_ids", "attention_mask", "labels", "decoder_input_ids", "decoder_attention_mask"}


@dataclass(frozen=True, eq=False)
class Prompt:
    """One prompt, without padding.

    input_ids: (P,) int64, empty for a model whose encoder reads pictures alone. pictures: what the processor gives
    beside them, each tensor as for a batch of one. token_inputs: (P, ...), inputs besides the ids that the model reads
    for each token, such as token types. picture_count: how many pictures those tensors are of.
    """

    input_ids: Tensor
    pictures: dict[str, Tensor] = field(default_factory=dict)
    token_inputs: dict[str, Tensor] = field(default_factory=dict)
    picture_count: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)

    @cached_property
    def key(self) -> bytes:
        """A digest of everything the model reads: equal prompts are one prompt, whoever made them."""
        return _digest(self.picture_key, self.input_ids, *self.token_inputs.values())

    @cached_property
    def picture_key(self) -> bytes:
        """A digest of the pictures' tensors, by content; empty without a picture."""
        return _digest(*(part for name in sorted(self.pictures) for part in (name.encode(), self.pictures[name])))


def counted(pictures: int) -> str:
    return {0: "no picture", 1: "one picture"}.get(pictures, f"{pictures} pictures")


def _digest(*parts: bytes | Tensor) -> bytes:
    if not any(len(part) for part in parts):
        return b""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            part = part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        digest.update(part)
    return digest.digest()


def special_tokens(tokenizer: Any, *more: str) -> re.Pattern[str] | None:
    """Finds what a tokenizer would take for a special token; None where it has none of more than a character."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    spelled = {*tokenizer.all_special_tokens, *(token.content for token in added if token.special), *more}
    long = sorted((text for text in spelled if len(text) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, long)), re.IGNORECASE) if long else None


def without_special(text: str, special: re.Pattern[str] | None) -> str:
    """The text with a blank within each special token that is spelled in it, which keeps it readable and nothing more
    than words.
    """
    while special is not None and special.search(text):
        text = special.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
    return text


class PromptBuilder:
    """Turns rows into prompts with a processor (or a bare tokenizer, for text alone)."""

    def __init__(self, processor: Any):
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self._writes_placeholder: bool | None = None
        self._lock = threading.Lock()

    @cached_property
    def special(self) -> re.Pattern[str] | None:
        return special_tokens(self.tokenizer, self.placeholder)

    @property
    def pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)

    @cached_property
    def placeholder(self) -> str:
        """The text that stands for one picture in a prompt; empty where the model needs none."""
        token = getattr(self.processor, "image_token", None) or getattr(self.tokenizer, "image_token", None)
        return str(token) if token else ""

    def __call__(self, row: Row) -> Prompt:
        """A row's text is text: a special token spelled in it, such as a picture's placeholder, stays ordinary words.

        Raises UserError for a prompt without a token, and for more pictures than the processor takes.
        """
        with self._lock:  # tokenizers are not made for several threads
            return self._build(row)

    def _build(self, row: Row) -> Prompt:
        pictures = row.pictures
        text = self._text(row)
        bos = self.tokenizer.bos_token
        # A template may write BOS itself; the tokenizer must not add a second one.
        options = {"return_tensors": "pt", "add_special_tokens": not (bos and text.startswith(bos))}
        if not pictures:
            encoded = {"input_ids": self.tokenizer(text, **options)["input_ids"]}
        else:
            try:
                encoded = self._with_pictures(text, list(pictures), options)
            except (ValueError, TypeError, IndexError, RuntimeError) as error:
                line = (str(error).strip() or type(error).__name__).splitlines()[0]
                count = counted(len(pictures))
                raise UserError(f"row {row.id}: the processor does not take {count} in a prompt: {line}") from error
        prompt = self._prompt(dict(encoded), len(pictures))
        if "input_ids" in encoded and not len(prompt):
            raise UserError(f"row {row.id}: the prompt {row.prompt!r} has no token: nothing foresees an answer's first")
        return prompt

    def _prompt(self, encoded: dict[str, Any], count: int) -> Prompt:
        """Sorts what the processor gave into ids, per-token inputs and pictures."""
        if "input_ids" not in encoded:  # the encoder reads pictures alone, and a mask of theirs is theirs
            own = {k: v for k, v in encoded.items() if isinstance(v, Tensor) and not k.startswith("decoder_")}
            return Prompt(torch.empty(0, dtype=torch.long), own, picture_count=count)
        ids = encoded["input_ids"][0]
        own = {name: v for name, v in encoded.items() if isinstance(v, Tensor) and name not in _NOT_PICTURES}
        foreign = ("pixel", *(name.removesuffix("input_ids") for name in own if name.endswith("_input_ids")))
        tokens = {
            name: value[0]
            for name, value in own.items()
            if name.endswith(("_ids", "_mask")) and not name.startswith(foreign) and value.shape[:2] == (1, len(ids))
        }
        return Prompt(ids, {name: value for name, value in own.items() if name not in tokens}, tokens, count)

    def _with_pictures(self, text: str, pictures: list[Any], options: dict[str, Any]) -> Any:
        """Processors differ in who writes the placeholder of a prompt without a template: found out once."""
        plain = self.placeholder and not getattr(self.processor, "chat_template", None)
        if plain and self._writes_placeholder is None:
            self._writes_placeholder = self._processor_writes_placeholder(text, pictures, options)
        if plain and not self._writes_placeholder:
            text = self.placeholder * len(pictures) + text
        return self._process(text, pictures, options)

    def _process(self, text: str, pictures: list[Any], options: dict[str, Any]) -> Any:
        """Most processors take the pictures of all texts in one list, some only a list of them for each text."""
        try:
            return self.processor(text=[text], images=pictures, **options)
        except ValueError as error:
            if len(pictures) == 1:
                raise
            try:
                return self.processor(text=[text], images=[pictures], **options)
            except (ValueError, TypeError, IndexError, RuntimeError):
                raise error from None

    def _processor_writes_placeholder(self, text: str, pictures: list[Any], options: dict[str, Any]) -> bool:
        """Whether the processor puts placeholders into a text without any, and more of them into a text that has its
        own.
        """
        placeholder_id = self.tokenizer.convert_tokens_to_ids(self.placeholder)

        def count(prefix: str) -> int:
            ids = self._process(prefix + text, pictures, options)["input_ids"]
            return int((ids == placeholder_id).sum())

        level = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()  # some write a warning a call when the text lacks placeholders
        try:
            without = count("")
            try:
                return without > 0 and count(self.placeholder * len(pictures)) > without
            except ValueError:  # with those of the text there are more placeholders than pictures
                return True
        except (ValueError, IndexError):  # fewer placeholders than pictures
            return False
        finally:
            transformers_logging.set_verbosity(level)

    def _text(self, row: Row) -> str:
        said = without_special(row.prompt, self.special)
        if not getattr(self.processor, "chat_template", None):
            return said
        content = [*({"type": "image"} for _ in row.pictures), {"type": "text", "text": said}]
        message = {"role": "user", "content": content}
        return self.processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)

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
    """Model inputs of prompts alone: `input_ids`, `attention_mask`, per-token inputs (B, P, ...), and their pictures
    in the order of the rows.
    """
    inputs = pad_sequences([p.input_ids for p in prompts], pad_id, side)
    width = inputs["input_ids"].shape[1]
    return inputs | stack_token_inputs(prompts, width, side) | stack_pictures(prompts)


def pad_sequences(sequences: Sequence[Tensor], pad_id: int, side: Literal["left", "right"]) -> dict[str, Tensor]:
    width = max(len(s) for s in sequences)
    ids = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(sequences), width), dtype=torch.long)
    for i, sequence in enumerate(sequences):
        where = slice(width - len(sequence), width) if side == "left" else slice(0, len(sequence))
        ids[i, where] = sequence.cpu()
        mask[i, where] = 1
    return {"input_ids": ids, "attention_mask": mask}


def stack_token_inputs(
    prompts: Sequence[Prompt], width: int, side: Literal["left", "right"], grown: Sequence[dict[str, Tensor]] = ()
) -> dict[str, Tensor]:
    """Per-token inputs (B, width, ...), 0 at padding and in rows that lack them.

    `grown` are the prompts' own with an answer's part behind; without it, the prompts' as they are.
    """
    per_row = list(grown) or [p.token_inputs for p in prompts]
    stacked = {}
    for name in dict.fromkeys(name for row in per_row for name in row):
        rows = [row.get(name) for row in per_row]
        shape = tuple(max(sizes) for sizes in zip(*(r.shape[1:] for r in rows if r is not None), strict=True))
        out = torch.zeros((len(rows), width, *shape), dtype=next(r.dtype for r in rows if r is not None))
        for i, row in enumerate(rows):
            if row is not None:
                start = width - len(row) if side == "left" else 0
                out[i, start : start + len(row)][_corner(row.shape)] = row.cpu()
        stacked[name] = out
    return stacked


def stack_pictures(prompts: Iterable[Prompt]) -> dict[str, Tensor]:
    """Picture tensors of the rows, one after the other along their first dimension. Rows without a picture add
    nothing; where sizes differ (pictures a prompt, tiles, pixels), the smaller are filled up with 0 behind, as
    processors do.
    """
    pictures = [p.pictures for p in prompts]
    return {
        name: cat_padded([row[name] for row in pictures if name in row])
        for name in dict.fromkeys(name for row in pictures for name in row)
    }


def cat_padded(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one rank along their first dimension, the others filled up with 0 to the largest."""
    shape = [max(sizes) for sizes in zip(*(t.shape[1:] for t in tensors), strict=True)]
    if all(list(t.shape[1:]) == shape for t in tensors):
        return torch.cat(list(tensors))
    out = tensors[0].new_zeros(sum(len(t) for t in tensors), *shape)
    start = 0
    for tensor in tensors:
        out[start : start + len(tensor)][_corner(tensor.shape)] = tensor
        start += len(tensor)
    return out


def _corner(shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in shape)
