"""Makes torchvision's wheel import beside a CPU-only torch, for the processors that need it.

The wheel's compiled operators want CUDA's libraries, and without them its import stops at the first operator it wants
to describe. Processors resize and crop through plain torch, so declaring those operators is enough:

    pip install --no-deps --target .torchvision torchvision==0.28.0 num2words docopt

in the repository's root, or in a folder that MMFT_TORCHVISION names. (SmolVLM's processor also wants num2words.)
"""

from __future__ import annotations

import importlib
import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

TOO_LATE = "transformers was imported before torchvision could be found"
_FOLDER = Path(__file__).resolve().parent.parent / ".torchvision"
# What `torchvision._meta_registrations` describes with `torch.library.register_fake`, whether or not it is compiled.
_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_kept: list[Any] = []  # a library's operators vanish with the object


def available(folder: Path | None = None) -> bool:
    """Whether torchvision imports and transformers uses it. Call it before anything imports transformers, which looks
    once, at its own import, and chooses its image processors by what it sees.
    """
    return reason(folder) == ""


@lru_cache(maxsize=1)
def reason(folder: Path | None = None) -> str:
    """Why torchvision cannot be used, or "" where it can."""
    if "transformers" in sys.modules and not sys.modules["transformers"].utils.is_torchvision_available():
        return TOO_LATE
    if _imports():
        return ""
    folder = folder or Path(os.environ.get("MMFT_TORCHVISION") or _FOLDER)
    if not (folder / "torchvision").is_dir():
        return "torchvision does not import, and MMFT_TORCHVISION names no folder with its wheel"
    # At the end: whatever else lies in the folder must not hide an installed package.
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    importlib.invalidate_caches()
    if _imports():
        return ""
    _declare_operators()
    return "" if _imports() else f"torchvision in {folder} does not import, even with its operators declared"


def _imports() -> bool:
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):  # RuntimeError: operator torchvision::nms does not exist
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        return False
    return True


def _declare_operators() -> None:
    from torch.library import Library

    library = Library("torchvision", "DEF")
    for schema in _OPERATORS:
        library.define(schema)
    _kept.append(library)
