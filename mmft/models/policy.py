"""The policy: a pretrained vision-language model, its processor and its LoRA adapters.

Nothing here knows a model by name. What differs between families is read from the config, the processor and the
modules.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from mmft.config import ModelConfig
from mmft.types import UserError

_PICTURE_TOKEN = re.compile(r"(image|img|video|audio|vision|boi|eoi|media)\w*_token(_id|_index|_ids)?$")


@dataclass(frozen=True)
class Policy:
    """A model that captions (a PeftModel when it has adapters), and the processor that prepares its inputs."""

    model: Any
    processor: Any


def load_policy(config: ModelConfig, device: str = "cpu", dtype: torch.dtype | None = None) -> Policy:
    """The checkpoint with fresh adapters as the recipe says; `dtype` is used where `model.dtype` is auto.

    A fresh LoRA adapter is the identity: the policy begins as the pretrained model, to the bit.
    Raises UserError for a checkpoint that is not there, lacks weights, or holds NaN.
    """
    model, processor = load_pretrained(config, dtype)
    model.to(device)
    if config.lora is None:
        return Policy(model, processor)
    model.requires_grad_(False)
    lora = LoraConfig(
        r=config.lora.r,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=lora_targets(model, config.lora.target_modules),
    )
    return Policy(get_peft_model(model, lora), processor)


def load_pretrained(config: ModelConfig, dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, Any]:
    """The bare checkpoint and its processor."""
    if config.quantization:
        raise UserError("model.quantization: loading in 4 or 8 bits is not supported yet; remove the key")
    path = config.resolved_path()
    if path.startswith(("/", ".", "~")) and not Path(path).is_dir():
        raise UserError(f"model.path: {config.path!r}: no such folder")
    wanted: Any = dtype if config.dtype == "auto" and dtype is not None else config.dtype
    try:
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=config.trust_remote_code)
        model, info = AutoModelForImageTextToText.from_pretrained(
            path,
            dtype=wanted,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"model.path: {config.path!r} cannot be loaded: {first}") from error
    _check_weights(model, info, config.path)
    model.eval()
    return model, processor


def load_adapter(config: ModelConfig, adapter: Path, dtype: torch.dtype | None = None) -> Policy:
    """The checkpoint with adapters from a PEFT folder, or weights that were trained in full; for inference."""
    if not (adapter / "adapter_config.json").is_file():
        _, processor = load_pretrained(config, dtype)
        model = AutoModelForImageTextToText.from_pretrained(adapter, dtype=dtype, use_safetensors=True)
        return Policy(model.eval(), processor)
    model, processor = load_pretrained(config, dtype)
    return Policy(PeftModel.from_pretrained(model, str(adapter)).eval(), processor)


def _check_weights(model: nn.Module, info: dict[str, Any], path: str) -> None:
    """transformers loads a checkpoint with missing or broken tensors with a warning at most; training on it is for
    nothing.
    """
    if info.get("missing_keys"):
        missing = sorted(info["missing_keys"])
        raise UserError(f"model.path: {path!r} lacks {len(missing)} weights, the first is {missing[0]}")
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            raise UserError(f"model.path: {path!r} holds weights that are not finite in {name}")


def language_model(model: nn.Module) -> tuple[str, nn.Module]:
    """(dotted name, module) of the language side: the decoder that owns the token embedding, found by structure.

    It is the smallest module that holds the input embedding and repeated layers; the vision tower is never inside it.
    """
    embedding = model.get_input_embeddings()
    name = next((n for n, module in model.named_modules() if module is embedding), None)
    if not name or "." not in name:
        return "", model
    parent = name
    while "." in parent:
        parent = parent.rsplit(".", 1)[0]
        module = model.get_submodule(parent)
        if any(isinstance(child, nn.ModuleList) for child in module.modules()):
            return parent, module
    return "", model


def lora_targets(model: nn.Module, wanted: str | tuple[str, ...]) -> str | list[str]:
    """PEFT's `target_modules` for `language`, `all-linear` or a list of names.

    A bare list such as [q_proj] would match the vision tower too in most families, so names are confined to the
    language model unless `all-linear` asks for everything. Returns a pattern on full module names.
    """
    if wanted == "all-linear":
        return "all-linear"
    prefix, language = language_model(model)
    names = sorted({name.rsplit(".", 1)[-1] for name, _ in _linears(language, model)})
    if wanted != "language":
        unknown = [name for name in wanted if name not in names]
        if unknown:
            raise UserError(
                f"model.lora.target_modules: no linear layer named {unknown[0]!r}; there are {', '.join(names)}"
            )
        names = list(wanted)
    if not names:
        raise UserError("model.lora.target_modules: the language model has no linear layers to adapt")
    start = re.escape(prefix) + r"\." if prefix else ""
    return f"^{start}(.*\\.)?({'|'.join(re.escape(name) for name in names)})$"


def _linears(language: nn.Module, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    head = model.get_output_embeddings()
    return ((n, m) for n, m in language.named_modules() if isinstance(m, nn.Linear) and m is not head)


def picture_token_ids(model: nn.Module, processor: Any) -> list[int]:
    """Ids that stand for pictures (placeholders, boundaries): sampled, they would corrupt every later pass. Never
    allowed.

    From every `*image*_token*` attribute of the config and its parts, of the processor and of the tokenizer. Ids
    outside the output vocabulary cannot be sampled and are left out.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    found: set[int] = set()
    text_config = model.config.get_text_config()
    for holder in (model.config, text_config, processor, tokenizer):
        for name, value in vars(holder).items():
            if _PICTURE_TOKEN.search(name):
                found.update(_as_ids(value, tokenizer))
    for name in ("image_token", "image_token_id", "video_token", "boi_token", "eoi_token"):
        found.update(_as_ids(getattr(tokenizer, name, None), tokenizer))
    head = model.get_output_embeddings()
    size = head.weight.shape[0] if head is not None else text_config.vocab_size
    return sorted(i for i in found if 0 <= i < size)


def _as_ids(value: Any, tokenizer: Any) -> list[int]:
    if isinstance(value, bool) or value is None:
        return []
    if isinstance(value, int):
        return [value]
    if isinstance(value, str) and value in tokenizer.get_vocab():
        return [tokenizer.convert_tokens_to_ids(value)]
    if isinstance(value, list | tuple):
        return [i for item in value for i in _as_ids(item, tokenizer)]
    return []


def eos_ids(model: nn.Module, processor: Any) -> tuple[int, ...]:
    """Every token that ends a response: the checkpoint's generation config, else the tokenizer's EOS."""
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if ids is None:
        ids = getattr(processor, "tokenizer", processor).eos_token_id
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)
