"""What is published of a folder: files on a list, copied aside and cleaned, and nothing else."""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mmft.hub.scrub import check_clean, without_paths
from mmft.types import UserError

_WEIGHTS = ("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json")
_READERS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "vocab.txt", "merges.txt", "sentencepiece.bpe.model", "spiece.model", "chat_template.jinja",
    "chat_template.json", "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
_RECORD = ("recipe.yaml", "eval.json")
# Keys of configs and of recipes whose values can be paths of this machine.
_CONFIG_PATHS = frozenset({"_name_or_path", "name_or_path", "vision", "text"})
_RECIPE_PATHS = frozenset({"path", "heldout_path", "pictures", "dir", "model", "accelerate", "vision", "text"})


@dataclass(frozen=True)
class Kind:
    """One kind of thing that is published. files: patterns of paths in its folder. mark: the file that tells it."""

    name: str
    mark: str
    files: tuple[str, ...]


KINDS = {
    kind.name: kind
    for kind in (
        Kind("adapter", "adapter_config.json", ("adapter_config.json", "adapter_model.safetensors", *_RECORD)),
        Kind(
            "reward", "config.json",
            ("config.json", "terms.json", *_WEIGHTS, *_READERS, *_RECORD, *(f"{part}/{name}" for part in
             ("vision", "vision_tower", "text_tower") for name in ("config.json", *_WEIGHTS, *_READERS))),
        ),
        Kind("model", "config.json", ("config.json", "generation_config.json", *_WEIGHTS, *_READERS, *_RECORD)),
    )
}  # fmt: skip


def kind_of(folder: Path) -> Kind:
    """What a folder holds: an adapter, a reward model, or a whole model. Raises UserError where it is none."""
    if (folder / "adapter_config.json").is_file():
        return KINDS["adapter"]
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{folder}: holds neither an adapter nor a model")
    return KINDS["reward" if config.get("model_type") == "caption_reward" else "model"]


def published(kind: Kind, names: list[str]) -> list[str]:
    """Those of the names that are published of this kind, in order."""
    return sorted(name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in kind.files))


def stage(source: Path, kind: Kind, out: Path, card: str, record: Mapping[str, str], base: str | None = None) -> Path:
    """Copies what is published of `source` to the new folder `out`, with a README.md and the texts of `record`.

    Paths of this machine are cut from configs and recipes; base: the adapter's base model on the hub, None for one that
    is not there. Raises UserError where a secret is found.
    """
    out.mkdir(parents=True)
    here = [path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()]
    for name in published(kind, [name for name in here if name not in record]):
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".json") and target.name in ("adapter_config.json", "config.json", "tokenizer_config.json"):
            content = without_paths(json.loads((source / name).read_text(encoding="utf-8")), _CONFIG_PATHS)
            if name == "adapter_config.json":
                content["base_model_name_or_path"] = base
            target.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        else:
            shutil.copyfile(source / name, target)
    for name, text in record.items():
        (out / name).write_text(_clean_recipe(text, base) if name == "recipe.yaml" else text, encoding="utf-8")
    (out / "README.md").write_text(card, encoding="utf-8")
    check_clean(out, (str(source.resolve()), str(source.resolve().parent)))
    return out


def _clean_recipe(text: str, base: str | None) -> str:
    """A recipe that others can run: with the base model's name on the hub, in a folder of their own."""
    recipe: dict[str, Any] = without_paths(yaml.safe_load(text), _RECIPE_PATHS)
    if base is not None and "model" in recipe:
        recipe["model"]["path"] = base
    if "logging" in recipe:
        recipe["logging"].pop("dir", None)
    recipe.pop("hub", None)
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
