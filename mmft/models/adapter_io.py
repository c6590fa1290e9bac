"""Saving adapters so that what is on disk is what was trained, or the save fails."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmft.models.lora import trainability_kept
from mmft.types import UserError

_CHECK = "mmft_saved_copy"


@torch.no_grad()
def save_adapter(model: Any, folder: Path, probe: dict[str, Tensor]) -> Path:
    """Saves a PeftModel's active adapter (or a whole model) to `folder`, reads it back and compares logits on `probe`,
    to the bit. Other adapters, such as the critic's, are no part of it.

    The folder is written aside and renamed, so it is either the old adapter or the whole new one.
    Raises UserError when it can't be written, RuntimeError when what was read back answers differently.
    """
    aside = folder.with_name(folder.name + ".tmp")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        chosen = {"selected_adapters": [model.active_adapter]} if hasattr(model, "peft_config") else {}
        model.save_pretrained(str(aside), safe_serialization=True, **chosen)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error
    if hasattr(model, "peft_config"):
        try:
            _compare(model, aside, probe)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(aside, folder)
    return folder


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
