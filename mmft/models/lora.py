"""LoRA adapters on the language side, found by structure: which layers they go on, and putting them there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import peft
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from mmft.config import LoraConfig
from mmft.models.structure import language_model, language_parts, output_head
from mmft.types import UserError

__all__ = ["add_adapter", "language_model", "lora_targets", "measure_magnitudes", "peft_config", "trainability_kept"]

_KEY = "model.lora.target_modules"


def add_adapter(model: nn.Module, config: LoraConfig) -> PeftModel:
    """Freezes the model and puts fresh adapters on it, named `default`.

    A fresh adapter is the identity: the policy begins as the pretrained model, to the bit.
    Raises UserError for names that no module has.
    """
    model.requires_grad_(False)
    adapted = get_peft_model(model, peft_config(model, config)).train(model.training)
    if config.use_dora:
        measure_magnitudes(adapted)
    return adapted


def peft_config(model: nn.Module, config: LoraConfig) -> peft.LoraConfig:
    """PEFT's form of the recipe's `model.lora` for this model."""
    targets = lora_targets(model, config.target_modules)
    adapted = [module for name, module in _linears(model) if re.fullmatch(targets, name)]
    return peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights=True if config.init == "default" else config.init,
        modules_to_save=[full for name in config.modules_to_save for full in _whole_modules(model, name)] or None,
        fan_in_fan_out=all(isinstance(module, Conv1D) for module in adapted),
    )


def _whole_modules(model: nn.Module, name: str) -> list[str]:
    """The name, or full names of what it stands for where PEFT would take more: to it, `head` ends `lm_head` too."""
    ending = [full for full, _ in model.named_modules() if full.endswith(name)]
    meant = [full for full in ending if _ends(full, name)]
    if not meant:
        raise UserError(f"model.lora.modules_to_save: the model has no module named {name!r}")
    return [name] if meant == ending else meant


@torch.no_grad()
def measure_magnitudes(model: nn.Module, adapter: str = "default") -> None:
    """DoRA's magnitudes of a fresh adapter again, in the type that the forward pass computes with.

    PEFT measures them before it turns the adapter to float32; in bfloat16 a fresh adapter would not be the identity.
    """
    for module in model.modules():
        magnitudes = getattr(module, "lora_magnitude_vector", {})
        if adapter in magnitudes:
            A, B = (factor[adapter].weight for factor in (module.lora_A, module.lora_B))
            weight = dequantize_module_weight(module.get_base_layer()).to(A.dtype)
            norm = magnitudes[adapter].get_weight_norm(weight, B @ A, module.scaling[adapter])
            magnitudes[adapter].weight.copy_(norm)


@contextmanager
def trainability_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards each weight trains if it did before: adding, loading or choosing an adapter, PEFT freezes others."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, trains in before:
            if parameter.requires_grad != trains:
                parameter.requires_grad_(trains)


def lora_targets(model: nn.Module, wanted: str | Sequence[str]) -> str:
    """PEFT's `target_modules` for `language`, `all-linear` or a list of names: a pattern on full module names.

    A bare list such as [q_proj] would match the vision tower too in most families, so names are confined to the
    language model unless `all-linear` asks for everything. The output head is never among them. A listed name may be
    the end of a dotted one: `self_attn.q_proj` leaves cross-attention alone.
    """
    parts = [""] if wanted == "all-linear" else language_parts(model)
    found = [name for name, _ in _linears(model) if any(_inside(name, part) for part in parts)]
    names = sorted({name.rpartition(".")[2] for name in found})
    if not names:
        raise UserError(f"{_KEY}: the language model has no linear layers to adapt")
    if not isinstance(wanted, str):
        unknown = [name for name in wanted if not any(_ends(full, name) for full in found)]
        if unknown:
            raise UserError(f"{_KEY}: no linear layer named {unknown[0]!r}; there are {', '.join(names)}")
        names = list(wanted)
    pattern = _pattern(parts, names)
    allowed = set(found)
    spared = [name for name, _ in model.named_modules() if name not in allowed and re.fullmatch(pattern, name)]
    return _pattern(parts, names, spared) if spared else pattern


def _pattern(parts: Iterable[str], names: Iterable[str], spared: Iterable[str] = ()) -> str:
    """Names at the end of a path inside one of the parts, but those spared. Written out in adapter_config.json."""
    inside = "|".join(re.escape(part) + r"\." for part in parts if part)
    start = f"(?:{inside})" if inside else ""
    never = f"(?!(?:{'|'.join(re.escape(name) for name in spared)})$)" if spared else ""
    return f"^{never}{start}(?:.*\\.)?(?:{'|'.join(re.escape(name) for name in names)})$"


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers that an adapter can go on: not the output head, nor one whose weight another module reads
    without calling it (inside nn.MultiheadAttention), nor one that answers with more than its product (a router).
    """
    head = output_head(model)
    wrapped: tuple[str, ...] = ()  # what already has an adapter or a trained copy counts once, without its insides
    for name, module in model.named_modules():
        if name.startswith(wrapped):
            continue
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            wrapped += (f"{name}.",)
        inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        linear = isinstance(inner, nn.Linear | Conv1D) and not isinstance(inner, NonDynamicallyQuantizableLinear)
        if linear and module is not head and _gives_one_tensor(inner):
            yield name, inner


@torch.no_grad()
def _gives_one_tensor(module: nn.Module) -> bool:
    """Asked only of a model's own kinds of linear layer (Llama 4's router gives scores and logits)."""
    if not type(module).forward.__module__.startswith("transformers.models."):
        return True
    return isinstance(module(module.weight.new_zeros(1, module.in_features)), torch.Tensor)


def _inside(name: str, part: str) -> bool:
    return not part or name == part or name.startswith(f"{part}.")


def _ends(full: str, name: str) -> bool:
    return full == name or full.endswith(f".{name}")
