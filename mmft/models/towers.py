"""Frozen pretrained towers of a reward model: what they see in a picture and read in a caption, token by token.

A tower is any checkpoint that transformers loads. Pictures go through the vision tower found inside it; captions
through a sentence encoder or a language model, or, *grounded*, through a whole vision-language model that reads the
caption after the picture. Towers are never trained, so what they give is computed once for each distinct input.
"""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, PreTrainedModel

from mmft.models.prompts import Prompt, PromptBuilder, pad_prompts, pad_sequences, special_tokens, without_special
from mmft.types import Row, UserError

# log p is of the order of 10 where features are of the order of 1.
_LOGPROB_SCALE = 0.25


@dataclass
class Tokens:
    """Features of N inputs: `features_BND`, right-padded, and `mask_BN`, True = a token."""

    features_BND: Tensor
    mask_BN: Tensor

    def __getitem__(self, index: Tensor) -> Tokens:
        mask_BN = self.mask_BN[index]
        width = max(1, int(mask_BN.sum(1).max())) if len(index) else 1
        return Tokens(self.features_BND[index, :width], mask_BN[:, :width])

    def to(self, device: torch.device | str) -> Tokens:
        return Tokens(self.features_BND.to(device), self.mask_BN.to(device))

    @classmethod
    def cat(cls, parts: Sequence[Tokens]) -> Tokens:
        width = max(part.mask_BN.shape[1] for part in parts)

        def widen(x: Tensor) -> Tensor:
            return torch.cat([x, x.new_zeros((x.shape[0], width - x.shape[1], *x.shape[2:]))], 1)

        return cls(torch.cat([widen(p.features_BND) for p in parts]), torch.cat([widen(p.mask_BN) for p in parts]))


def load_tower(
    path: str, grounded: bool, dtype: torch.dtype, trust_remote_code: bool = False, subfolder: str = ""
) -> PreTrainedModel:
    """A frozen checkpoint in evaluation mode. Raises UserError where it cannot be loaded."""
    kind: Any = AutoModelForImageTextToText if grounded else AutoModel
    try:
        options = {"trust_remote_code": trust_remote_code, "subfolder": subfolder}
        config = AutoConfig.from_pretrained(path, **options)
        model = kind.from_pretrained(path, config=config, dtype=dtype, use_safetensors=True, **options)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"reward model: the tower {path!r} cannot be loaded: {first}") from error
    return model.eval().requires_grad_(False)


def find_vision_tower(model: nn.Module) -> nn.Module:
    """The outermost part of a checkpoint that takes pixels alone: itself, or what is inside a CLIP or a VLM."""
    for name, module in model.named_modules():
        takes_pixels = getattr(module, "main_input_name", None) == "pixel_values"
        if isinstance(module, PreTrainedModel) and takes_pixels and (name or not _reads_text(module)):
            return module
    raise UserError(f"reward model: {type(model).__name__} has no vision tower")


def _reads_text(model: PreTrainedModel) -> bool:
    return getattr(model.config, "text_config", None) is not None


class VisionTower:
    """Pictures -> the last hidden states of a vision tower.

    Equation: E01
        E_image = f_image(X_image; theta_image),   theta frozen
    """

    def __init__(self, model: PreTrainedModel, image_processor: Any, max_tokens: int = 64):
        self.tower = find_vision_tower(model)
        self.image_processor = image_processor
        self.max_tokens = max_tokens
        self.dim = _hidden_size(self.tower)

    @torch.no_grad()
    def __call__(self, images: Sequence[Image | None], batch: int = 64) -> Tokens:
        """B pictures -> (B, N, D); a row without a picture keeps no token."""
        parameter = next(self.tower.parameters())
        parts = []
        for start in range(0, len(images), batch):
            chunk = images[start : start + batch]
            seen = [i for i, image in enumerate(chunk) if image is not None]
            if not seen:
                parts.append(_no_tokens(len(chunk), self.dim, parameter))
                continue
            pixels = self.image_processor([chunk[i] for i in seen], return_tensors="pt")["pixel_values"]
            if pixels.dim() != 4:
                raise UserError("reward model: the vision tower's processor gives tiles, not one picture; use another")
            hidden = self.tower(pixel_values=pixels.to(parameter.device, parameter.dtype)).last_hidden_state
            hidden = pool_patches(hidden, self.max_tokens)
            features = hidden.new_zeros(len(chunk), *hidden.shape[1:])
            features[seen] = hidden
            mask = torch.zeros(len(chunk), hidden.shape[1], dtype=torch.bool)
            mask[seen] = True
            parts.append(Tokens(features, mask.to(features.device)))
        return Tokens.cat(parts)


def _hidden_size(tower: nn.Module) -> int:
    size = getattr(tower.config, "hidden_size", None)
    if size is None:
        raise UserError(f"reward model: {type(tower).__name__} gives no sequence of features; take a transformer")
    return int(size)


def _no_tokens(rows: int, dim: int, like: Tensor) -> Tokens:
    return Tokens(like.new_zeros(rows, 1, dim), torch.zeros(rows, 1, dtype=torch.bool, device=like.device))


def pool_patches(hidden_BND: Tensor, most: int) -> Tensor:
    """At most `most` tokens of a picture: the patches of a square grid are averaged over squares, whatever else there
    is (a class token, a sequence of another shape) over runs. A large tower gives hundreds; a caption names a few
    things, and features of all pictures are kept in memory.
    """
    n = hidden_BND.shape[1]
    if n <= most:
        return hidden_BND
    side, small = math.isqrt(n), math.isqrt(most)
    if side * side == n:
        grid = hidden_BND.mT.unflatten(-1, (side, side)).float()
        return nn.functional.adaptive_avg_pool2d(grid, small).flatten(2).mT.to(hidden_BND.dtype)
    return nn.functional.adaptive_avg_pool1d(hidden_BND.mT.float(), most).mT.to(hidden_BND.dtype)


class TextTower:
    """Captions -> the last hidden states of a sentence encoder or language model that reads them alone.

    Equation: E01
        E_text = f_text(X_text; theta_text),   theta frozen
    """

    def __init__(self, model: PreTrainedModel, processor: Any, max_length: int):
        # The text side of a CLIP or VLM, the encoder of a T5, else the model itself.
        side = getattr(model, "language_model", None) or getattr(model, "text_model", None) or model
        self.model = side.get_encoder() if side.config.is_encoder_decoder else side
        self.tokenizer = getattr(processor, "tokenizer", processor)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.max_length = min(max_length, getattr(self.model.config, "max_position_embeddings", max_length))
        self.dim = _hidden_size(self.model)
        self.special = special_tokens(self.tokenizer)

    @torch.no_grad()
    def __call__(self, captions: Sequence[str], rows: Sequence[Row], batch: int = 256) -> Tokens:
        parameter = next(self.model.parameters())
        # Captions of one length together: less padding, and what comes out is put back in order.
        captions = [without_special(caption, self.special) for caption in captions]
        order = sorted(range(len(captions)), key=lambda i: len(captions[i]))
        parts = []
        for start in range(0, len(order), batch):
            encoded = self.tokenizer(
                [captions[i] for i in order[start : start + batch]], return_tensors="pt", padding=True,
                padding_side="right", truncation=True, max_length=self.max_length, return_attention_mask=True,
            ).to(parameter.device)  # fmt: skip
            mask = encoded["attention_mask"]
            if not mask.shape[1]:  # empty captions, and a tokenizer that adds nothing
                parts.append(_no_tokens(len(mask), self.dim, parameter))
                continue
            hidden = self.model(input_ids=encoded["input_ids"], attention_mask=mask).last_hidden_state
            parts.append(Tokens(hidden, mask.bool()))
        return _in_order(Tokens.cat(parts), order)


class GroundedTextTower:
    """Captions -> what a vision-language model makes of each token after it has seen the picture and the prompt.

    Equation: E01
        E_text = f_text(X_text | X_image; theta),   theta frozen

    For each token, the end-of-sequence token included: the state that foresaw it, the state that has read it, the
    log-probability it was given, and how far that lies below the likeliest token's. A wrong object, number or place
    is unlikely under a model that sees; so is what no sentence would say. Picture and prompt are computed once for
    each distinct pair and shared by all captions about it.
    """

    def __init__(self, model: PreTrainedModel, processor: Any, max_length: int):
        self.model = model
        self.builder = PromptBuilder(processor)
        self.tokenizer = self.builder.tokenizer
        self.max_length = max_length
        self.dim = 2 * int(model.get_output_embeddings().weight.shape[1]) + 2
        # transformers renames the argument and drops the old name in 5.40.
        self.cache_name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

    def __call__(self, captions: Sequence[str], rows: Sequence[Row], batch: int = 32) -> Tokens:
        """B captions of B rows -> (B, N, D). Rows with the same picture object and prompt are one."""
        about: dict[tuple[int, str], list[int]] = defaultdict(list)
        for i, row in enumerate(rows):
            about[id(row.image), row.prompt].append(i)
        prompts = [(self.builder(rows[indices[0]]), indices) for indices in about.values()]
        # Prompts of one length together: the shared part then has no padding, so that positions are the model's own.
        prompts.sort(key=lambda item: len(item[0]))
        parts, order = [], []
        for group in _equal_lengths(prompts, batch):
            own = [k for k, (_, indices) in enumerate(group) for _ in indices]
            order += [i for _, indices in group for i in indices]
            texts = [captions[i] for _, indices in group for i in indices]
            parts.append(self._read([prompt for prompt, _ in group], torch.tensor(own), texts))
        return _in_order(Tokens.cat(parts), order)

    @torch.no_grad()
    def _read(self, prompts: list[Prompt], own: Tensor, captions: list[str]) -> Tokens:
        """Captions, of which the i-th follows prompt `own[i]`."""
        model = self.model
        device = next(model.parameters()).device
        shared = pad_prompts(prompts, self.builder.pad_id, "left")
        shared = {k: v.to(device, model.dtype) if v.is_floating_point() else v.to(device) for k, v in shared.items()}
        first = model(**shared, use_cache=True, output_hidden_states=True, logits_to_keep=1)
        end = [self.tokenizer.eos_token_id]
        captions = [without_special(caption, self.builder.special) for caption in captions]
        ids = self.tokenizer(captions, add_special_tokens=False, truncation=True, max_length=self.max_length - 1)
        tokens = pad_sequences([torch.tensor(i + end) for i in ids["input_ids"]], self.builder.pad_id, "right")
        own = own.to(device)
        cache = getattr(first, self.cache_name, None)
        if not hasattr(cache, "batch_select_indices"):
            raise UserError(
                f"reward model: {type(model).__name__} keeps no cache to share; set model.grounded to false"
            )
        cache.batch_select_indices(own)
        mask = tokens["attention_mask"].to(device)
        output = model(
            input_ids=tokens["input_ids"].to(device),
            attention_mask=torch.cat([shared["attention_mask"][own], mask], 1),
            output_hidden_states=True,
            **{self.cache_name: cache},
        )
        after = output.hidden_states[-1]
        before = torch.cat([first.hidden_states[-1][own, -1:], after[:, :-1]], 1)
        logits = torch.cat([first.logits[own, -1:], output.logits[:, :-1]], 1)
        logprobs = logits.float().log_softmax(-1)
        likely = logprobs.gather(-1, tokens["input_ids"].to(device)[..., None])
        short = likely - logprobs.max(-1, keepdim=True).values
        evidence = (torch.cat([likely, short], -1) * _LOGPROB_SCALE).to(after.dtype)
        return Tokens(torch.cat([before, after, evidence], -1), mask.bool())


def _equal_lengths(prompts: list[tuple[Prompt, list[int]]], batch: int) -> list[list[tuple[Prompt, list[int]]]]:
    groups: list[list[tuple[Prompt, list[int]]]] = []
    for item in prompts:
        if groups and len(groups[-1]) < batch and len(groups[-1][0][0]) == len(item[0]):
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def _in_order(tokens: Tokens, order: Sequence[int]) -> Tokens:
    """Undoes a sorting: row k of `tokens` belongs at `order[k]`."""
    back = torch.empty(len(order), dtype=torch.long)
    back[torch.tensor(list(order), dtype=torch.long)] = torch.arange(len(order))
    return Tokens(tokens.features_BND[back], tokens.mask_BN[back])


def is_folder(path: str) -> bool:
    """Whether a tower is a folder on this machine, which must travel with the reward model, and no name to look up."""
    return Path(path).is_dir()
