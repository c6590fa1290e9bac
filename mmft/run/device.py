"""Where a run computes, in which numbers, and how quietly its libraries load."""

from __future__ import annotations

import torch
from huggingface_hub.utils import enable_progress_bars
from transformers.utils import logging as transformers_logging

from mmft.config import Recipe, RewardRecipe
from mmft.types import UserError


def device_of(recipe: Recipe | RewardRecipe) -> str:
    device = recipe.train.device
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device: cuda is not available here; use auto or cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def dtype_of(recipe: Recipe) -> torch.dtype:
    """Weights' type where `model.dtype` is auto: `train.precision`, whose auto is bf16 on hardware that has it."""
    precision = recipe.train.precision
    if precision == "auto":
        # Weights that train need more than 8 bits: a small step would round to none.
        frozen = recipe.model.lora is not None and not recipe.model.lora.modules_to_save
        precision = "bf16" if frozen and has_bf16(device_of(recipe)) else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def has_bf16(device: str) -> bool:
    """Whether matrix products in bf16 are the device's own; emulated, they are slower than fp32."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    return any(getattr(torch.cpu, f"_is_{kind}_supported", bool)() for kind in ("amx_tile", "avx512_bf16"))


def quiet_loading() -> None:
    """No bar for reading weights from disk where the log is quiet too (not under `--debug`); downloads keep theirs."""
    if transformers_logging.get_verbosity() >= transformers_logging.ERROR:
        transformers_logging.disable_progress_bar()
        enable_progress_bars()
