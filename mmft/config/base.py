"""What every block of a recipe is built on, and the names of what is bundled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticCustomError

BUILTIN_PREFIX = "builtin:"
BUILTIN_MODELS = ("tiny-vlm",)
BUILTIN_REWARDS = ("caption-reward",)
ASSETS = Path(__file__).resolve().parent.parent / "assets"


def conflict(key: str, text: str) -> PydanticCustomError:
    """A rule of ours that is broken, reported at `key` relative to where it is checked ("": right there)."""
    return PydanticCustomError("conflict", "{text}", {"text": text, "key": key})


def yaml_switch(value: Any) -> Any:
    """YAML 1.1 reads a bare `on` or `off` as a boolean; give the words back."""
    return ("on" if value else "off") if isinstance(value, bool) else value


class Block(BaseModel):
    """Base of every block: immutable, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


def bundled(path: str, names: tuple[str, ...]) -> str:
    """`path` if it is no `builtin:` name or one of `names`. Raises where there is no such thing."""
    if path.startswith(BUILTIN_PREFIX) and path.removeprefix(BUILTIN_PREFIX) not in names:
        raise conflict(
            "", f"nothing bundled is called {path!r}; there is {', '.join(BUILTIN_PREFIX + n for n in names)}"
        )
    return path


def resolve(path: str) -> str:
    """What `from_pretrained` is given: a bundled model's folder, or the path or hub id as written."""
    return str(ASSETS / path.removeprefix(BUILTIN_PREFIX)) if path.startswith(BUILTIN_PREFIX) else path
