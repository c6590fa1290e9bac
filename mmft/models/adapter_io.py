"""Saving adapters so that what is on disk is what was trained, or the save fails."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mmft.models.lora import trainability_kept
from mmft.types import UserError

_CHECK = "mmft_saved_copy"


@torch.no_grad()
def save_adapter(model: Any, folder: Path, probe: dict[str, Tensor], weights: dict[str, Tensor] | None = None) -> Path:
    """Saves a PeftModel's active adapter (or a whole model) to `folder`, reads it back and compares logits on `probe`,
    to the bit. Other adapters, such as the critic's, are no part of it.

    weights: whole tensors by name, of a model whose own are in parts; what is read back is then compared with them.

    The folder is written aside and renamed, so it is either the old adapter or the whole new one.
    Raises UserError when it can't be written, RuntimeError when what was read back answers differently.
    """
    aside = folder.with_name(folder.name + ".tmp")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        chosen = {"selected_adapters": [model.active_adapter]} if hasattr(model, "peft_config") else {}
        whole = {} if weights is None else {"state_dict": dict(weights)}
        model.save_pretrained(str(aside), safe_serialization=True, **chosen, **whole)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error
    if hasattr(model, "peft_config"):
        try:
            _compare(model, aside, probe) if weights is None else _compare_tensors(aside, weights)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(aside, folder)
    return folder


def _compare_tensors(folder: Path, weights: dict[str, Tensor]) -> None:
    read_back = load_file(folder / "adapter_model.safetensors")
    known = {_unnamed(name): tensor for name, tensor in weights.items()}
    if not all(name in known and torch.equal(tensor, known[name].cpu()) for name, tensor in read_back.items()):
        raise RuntimeError(f"{folder}: the saved adapter is not the trained one; not saved")


def _unnamed(name: str) -> str:
    """A parameter's name without that of its adapter, as PEFT saves it."""
    return name.replace(".modules_to_save", "").replace(".default", "")


def _compare(model: Any, folder: Path, probe: dict[str, Tensor]) -> None:
    active, was_training = model.active_adapter, model.training
    model.eval()
    trained = model(**probe).logits
    with trainability_kept(model):
        with torch.random.fork_rng():  # PEFT draws initial weights before it reads: a save must change nothing after
            model.load_adapter(str(folder), adapter_name=_CHECK)
        try:
            model.set_adapter(_CHECK)
            read_back = model(**probe).logits
        finally:
            model.set_adapter(active)
            model.delete_adapter(_CHECK)
            model.train(was_training)
    if not torch.equal(trained, read_back):
        worst = (trained - read_back).abs().max().item()
        raise RuntimeError(
            f"{folder}: the saved adapter gives other logits than the trained one (by {worst:.3g}); not saved"
        )
