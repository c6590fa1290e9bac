"""The policy: a pretrained vision-language model, its processor and its LoRA adapters.

Nothing here knows a model by name. What differs between families is read from the config, the processor and the
modules.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, prepare_model_for_kbit_training
from safetensors import SafetensorError
from tokenizers import AddedToken
from torch import nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedModel

from mmft.config import ModelConfig
from mmft.models.lora import add_adapter, language_model, lora_targets
from mmft.models.processors import load_processor
from mmft.models.structure import context_length, output_head
from mmft.types import UserError

__all__ = [
    "Policy",
    "context_length",
    "eos_ids",
    "language_model",
    "load_adapter",
    "load_policy",
    "load_pretrained",
    "lora_targets",
    "output_head",
    "picture_token_ids",
]

# `image_token_id`, `boi_token_index`, `video_start_token`, `visual_indicator_token_ids`, `img_line_break_token` ...
_PICTURE_TOKEN = re.compile(
    r"(?:^|_)(image|img|video|audio|vision|visual|media|frame|slice|tile|boi|eoi|boa|eoa)(_\w+)?(?<!_per)"
    r"_(token|placeholder)(_id|_index|_ids)?$"
)


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
    model, processor = load_pretrained(config, dtype, device)
    if config.lora is None:
        return Policy(model, processor)
    return Policy(add_adapter(model, config.lora), processor)


def load_pretrained(
    config: ModelConfig, dtype: torch.dtype | None = None, device: str = "cpu"
) -> tuple[PreTrainedModel, Any]:
    """The bare checkpoint, on its device and for inference, and its processor."""
    path = config.resolved_path()
    if path.startswith(("/", ".", "~")) and not Path(path).is_dir():
        raise UserError(f"model.path: {config.path!r}: no such folder")
    wanted: Any = dtype if config.dtype == "auto" and dtype is not None else config.dtype
    options: dict[str, Any] = {}
    if config.quantization:
        # Quantised weights are made on their device and stay there.
        options = {"quantization_config": _quantization(config, wanted, device), "device_map": {"": device}}
    try:
        processor = load_processor(path, config.trust_remote_code)
        model, info = AutoModelForImageTextToText.from_pretrained(
            path,
            dtype=wanted,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except UserError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"model.path: {config.path!r} cannot be loaded: {first}") from error
    _check_weights(model, info, config.path)
    if config.quantization:
        # Freezes it, and turns what was not quantised (norms, head) to float32, for inference too: one model for both.
        # Its hook on the embedding is for reentrant checkpointing, which isn't used here.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    else:
        model.to(device)
    return model.eval(), processor


def _quantization(config: ModelConfig, dtype: Any, device: str) -> BitsAndBytesConfig:
    """How bitsandbytes stores the frozen weights. 4 bits: normal floats, their scales quantised too (QLoRA, Dettmers
    et al. 2023, arXiv:2305.14314).
    """
    key = f"model.quantization: {config.quantization}"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{key} needs bitsandbytes, which is not installed: pip install bitsandbytes")
    if torch.device(device).type == "cpu":
        # bitsandbytes 0.50 repacks 4-bit weights on a CPU at each change between running and saving, and rounds them
        # each time: what is saved is then not what was trained. Its 8-bit weights lose their scales to DoRA.
        if config.quantization == "4bit":
            raise UserError(f"{key} needs a GPU; on a CPU use 8bit or remove the key")
        if config.lora is not None and config.lora.use_dora:
            raise UserError(f"{key} with model.lora.use_dora needs a GPU; remove one of the two keys")
    if config.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype, torch.bfloat16)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def load_adapter(config: ModelConfig, adapter: Path, dtype: torch.dtype | None = None, device: str = "cpu") -> Policy:
    """The checkpoint with adapters from a PEFT folder, or weights that were trained in full; for inference."""
    model, processor = load_pretrained(config, dtype, device)
    if not (adapter / "adapter_config.json").is_file():
        model = AutoModelForImageTextToText.from_pretrained(adapter, dtype=dtype, use_safetensors=True)
        return Policy(model.to(device).eval(), processor)
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


def picture_token_ids(model: nn.Module, processor: Any) -> list[int]:
    """Ids that stand for pictures (placeholders, boundaries): sampled, they would corrupt every later pass. Never
    allowed.

    From every `*image*_token*` attribute of the config and its parts, of the processor and of the tokenizer. Ids
    outside the output vocabulary (Mllama's) cannot be sampled and are left out.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    config = model.config
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    holders = (config, config.get_text_config(decoder=True), *parts, processor, tokenizer)
    # A tokenizer keeps the tokens it was given names for in a map, not as attributes.
    named = [getattr(holder, "special_tokens_map", {}) for holder in holders[-2:]]
    found: set[int] = set()
    for names in (*(vars(holder) for holder in holders if holder is not None), *named):
        for name, value in names.items():
            if _PICTURE_TOKEN.search(name):
                found.update(_as_ids(value, tokenizer))
    head = output_head(model)
    return sorted(i for i in found if 0 <= i < head.weight.shape[0])


def _as_ids(value: Any, tokenizer: Any) -> list[int]:
    if isinstance(value, bool) or value is None:
        return []
    if isinstance(value, int):
        return [value]
    if isinstance(value, AddedToken):
        value = value.content
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
