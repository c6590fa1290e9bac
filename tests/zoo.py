"""A zoo: a tiny random checkpoint of every image-text-to-text family, with its processor, built from configs alone.

Sizes are toys'; traits are the real ones': what a processor returns, how many tiles a picture becomes, which inputs
are per token, where the placeholder lies. That is where code for "any model" goes wrong.

Not here, though transformers 5.24 maps them: Llama 4, whose forward fails in that release (it asks an output for
`image_outputs` that it hasn't); Gemma 3n, FastVLM and Perception LM, whose towers come from timm.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torchvision_shim
import zoo_captioners  # noqa: F401  # each module enters its families
import zoo_grids  # noqa: F401
import zoo_llava  # noqa: F401
import zoo_tiles  # noqa: F401
from zoo_parts import FAMILIES, Family

__all__ = ["FAMILIES", "Family", "build", "missing"]


def build(name: str, folder: Path) -> Path:
    """Saves the family's checkpoint and processor in `folder`, for `from_pretrained`. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    FAMILIES[name].build(folder)
    return folder


def missing(name: str) -> str:
    """Why the family's processor cannot be had here, or "" where it can."""
    family = FAMILIES[name]
    absent = [package for package in family.packages if importlib.util.find_spec(package) is None]
    reason = torchvision_shim.reason() if family.needs_torchvision else ""
    return reason or (f"{', '.join(absent)} not installed" if absent else "")
