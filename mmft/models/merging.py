"""An adapter folded into its base: a plain checkpoint that needs neither PEFT nor mmft."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForImageTextToText

from mmft.models.interface import Interface, evaluating
from mmft.models.policy import Policy
from mmft.types import Row, UserError

AGREEMENT = 1e-5  # of logits in float32, beside the largest of them
_WORDS = "a picture of two red apples"


@torch.no_grad()
def logits_of(policy: Policy, row: Row) -> Tensor:
    """Logits (T, V), float32 on the CPU, of a row's prompt and a fixed response: what shows that two models are one."""
    interface = Interface(policy.model, policy.processor, trains=False)
    ids = interface.builder.tokenizer(_WORDS, add_special_tokens=False)["input_ids"]
    response_BT = torch.tensor([ids], device=interface.device)
    packed = interface.pack([interface.builder(row)], response_BT, torch.ones_like(response_BT).bool(), share=False)
    with evaluating(policy.model):
        return policy.model(**packed.inputs).logits[0].float().cpu()


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference of two models' logits, beside the largest logit."""
    if a.shape != b.shape:
        return float("inf")
    return ((a - b).abs().max() / a.abs().max().clamp_min(1.0)).item()


def merged(policy: Policy) -> Policy:
    """The policy without its adapter, whose weights are in the model's now; the policy itself is used up.

    Raises UserError for weights that are not finite.
    """
    if not isinstance(policy.model, PeftModel):
        return policy
    try:
        model = policy.model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise UserError(f"the adapter cannot be merged: {error}") from error
    return Policy(model, policy.processor)


def save_plain(policy: Policy, out: Path) -> None:
    """Writes model and processor to the new folder `out`, whole or not at all."""
    aside = out.with_name(out.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        policy.model.save_pretrained(str(aside), safe_serialization=True)
        policy.processor.save_pretrained(str(aside))
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}") from error
    aside.rename(out)


def load_plain(folder: Path, processor: Any, dtype: torch.dtype) -> Policy:
    """The checkpoint of a folder as anybody loads it, with a processor that is at hand."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    return Policy(model.eval(), processor)
