"""A critic as a second LoRA adapter on the policy's base: a trunk of its own for the price of an adapter.

The policy's adapter is `default`, the critic's `critic`. Which of them computes is switched by name, and both can be
part of one loss. PEFT's own `set_adapter` cannot do that: it takes `requires_grad` from every other adapter, and a
gradient that arrives at a weight without it is dropped without a word.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from mmft.config import LoraConfig
from mmft.models.lora import measure_magnitudes, peft_config, trainability_kept
from mmft.types import UserError

CRITIC = "critic"


def add_value_adapter(model: PeftModel, config: LoraConfig | None = None) -> None:
    """Adds the critic's adapter, fresh and trainable. It computes nothing until `adapter_active(model, "critic")`.

    config: its rank and targets; None takes the policy's, without `modules_to_save`.
    """
    if config is None:
        wanted = copy.deepcopy(model.peft_config[model.active_adapter])
        wanted.modules_to_save, wanted.inference_mode = None, False
    else:
        wanted = peft_config(model.get_base_model(), config)
    with trainability_kept(model):
        model.add_adapter(CRITIC, wanted)
    if wanted.use_dora:
        measure_magnitudes(model, CRITIC)
    _thaw(model, CRITIC)


@contextmanager
def adapter_active(model: nn.Module, name: str) -> Iterator[None]:
    """While open, the adapter `name` computes, in the model or in what wraps it; `requires_grad` of the others stays.

    Both a loss over passes inside and outside, and gradient checkpointing of a pass inside, give each adapter its own
    gradient. Where adapters are switched off (`disable_adapter`), they stay off.
    """
    peft_model = _peft_model(model)
    if name not in peft_model.peft_config:
        raise ValueError(f"no adapter is named {name!r}; there are {', '.join(peft_model.peft_config)}")
    if not peft_model.peft_config[name].inference_mode:
        _thaw(peft_model, name)  # leaving PEFT's disable_adapter freezes all but the active one
    with trainability_kept(peft_model), _computing(peft_model.modules(), name), _recomputed_with(peft_model, name):
        yield


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """While open, the model is the pretrained one. As PEFT's `disable_adapter`, which is slower and freezes the
    critic's adapter when it ends.
    """
    switched = [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    before = [module._disable_adapters for module in switched]
    for module in switched:
        module._disable_adapters = True
    try:
        yield
    finally:
        for module, was in zip(switched, before, strict=True):
            module._disable_adapters = was


@contextmanager
def _computing(modules: Iterable[nn.Module], name: str) -> Iterator[None]:
    """The names that PEFT's layers look their adapters up by, and nothing else, changed for a while."""
    before = []
    for module in modules:
        if isinstance(module, BaseTunerLayer):
            before.append((module, module._active_adapter))
            module._active_adapter = [name]
        elif isinstance(module, AuxiliaryTrainingWrapper):
            before.append((module, module._active_adapter))
            module._active_adapter = [name] if name in module._adapters else []
    try:
        yield
    finally:
        for module, active in before:
            module._active_adapter = active


@contextmanager
def _recomputed_with(model: nn.Module, name: str) -> Iterator[None]:
    """A checkpointed layer computes again in the backward pass, when this context is long closed: it must then switch
    by itself. Else it would give the critic's gradient to the policy.
    """
    before = []
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False) and hasattr(module, "_gradient_checkpointing_func"):
            before.append((module, module._gradient_checkpointing_func))
            module._gradient_checkpointing_func = partial(_checkpoint, before[-1][1], module, name)
    try:
        yield
    finally:
        for module, checkpoint in before:
            module._gradient_checkpointing_func = checkpoint


def _checkpoint(checkpoint: Any, layer: nn.Module, name: str, function: Any, *args: Any, **kwargs: Any) -> Any:
    def switched(*inputs: Any, **named: Any) -> Any:
        with _computing(layer.modules(), name):
            return function(*inputs, **named)

    return checkpoint(switched, *args, **kwargs)


def save_value_adapter(model: nn.Module, folder: Path, weights: dict[str, Tensor] | None = None) -> Path:
    """The critic's adapter in PEFT's format, in a folder of its own: the old one or the whole new one. weights: whole
    tensors by name, of a model whose own are in parts.
    """
    aside = folder.with_name(folder.name + ".tmp")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        whole = {} if weights is None else {"state_dict": dict(weights)}
        _peft_model(model).save_pretrained(str(aside), selected_adapters=[CRITIC], **whole)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(aside / CRITIC, folder)  # PEFT puts any adapter but `default` one folder down
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def load_value_adapter(model: nn.Module, folder: Path) -> None:
    """The critic's adapter as it was saved, trainable, in place of the one that is there, if any."""
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder}: no saved critic adapter")
    peft_model = _peft_model(model)
    # PEFT draws initial weights before it reads; a resumed run's random numbers must go on where they were.
    with trainability_kept(peft_model), torch.random.fork_rng():
        peft_model.load_adapter(str(folder), adapter_name=CRITIC, is_trainable=True)
    _thaw(peft_model, CRITIC)


def critic_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What trains in the critic's adapter; empty where there is none."""
    return [p for name, p in model.named_parameters() if p.requires_grad and CRITIC in name.split(".")]


def _thaw(model: nn.Module, name: str) -> None:
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            for kind in module.adapter_layer_names:
                held = getattr(module, kind)
                if name in held:
                    held[name].requires_grad_(True)


def _peft_model(model: nn.Module) -> PeftModel:
    found = next((module for module in model.modules() if isinstance(module, PeftModel)), None)
    if found is None:
        raise ValueError("the model has no adapters")
    return found
