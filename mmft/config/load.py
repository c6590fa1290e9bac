"""Recipes from YAML and `key=value`, and back to YAML."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from mmft.config.errors import RecipeError, element_type, is_model, kinds, nearest, summarize, union_members
from mmft.config.reward_recipe import RewardRecipe
from mmft.config.schema import Recipe

RECIPES, REWARD_MODELS = "recipes", "reward_models"  # folders of what `mmft train` and `mmft reward train` take
COMMAND_LINE = "command line"
R = TypeVar("R", bound=BaseModel)
_KEY = re.compile(r"\w+(\.\w+)*")


def recipe_folders(kind: str = RECIPES) -> list[Path]:
    """Where recipes are looked for by name: the working folder's, a clone's, an installed wheel's."""
    return [
        Path(kind),
        Path(__file__).resolve().parents[2] / kind,
        Path(sys.prefix) / "share" / "mmft" / kind,
    ]


def find_recipes(kind: str = RECIPES) -> dict[str, Path]:
    """Name -> file of every recipe at hand; the first folder that has a name wins."""
    found: dict[str, Path] = {}
    for folder in recipe_folders(kind):
        for path in sorted(folder.glob("*.yaml")):
            found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply `key=value` overrides, and check it.

    path: a YAML file, or the name of a shipped recipe (`caption_ppo`).
    overrides: dotted keys with YAML values, as in `train.lr=1e-4`, `reward.terms.0.weight=2`, `model.lora=null`.
        A mapping as value replaces the block. A new `type` drops the file's keys that the new type does not have.
    Raises RecipeError, whose message is one line naming the file (or the command line), the key, and what is wrong.
    """
    return _load(path, overrides, Recipe, RECIPES)


def load_reward_recipe(path: str | Path, overrides: Sequence[str] = ()) -> RewardRecipe:
    """The same for a reward model's recipe: a YAML file, or the name of a shipped one (`caption`)."""
    return _load(path, overrides, RewardRecipe, REWARD_MODELS)


def is_reward_recipe(path: str | Path) -> bool:
    """Whether `path` is for `mmft reward train`: a name or a file of `reward_models`, or a file with such keys.

    A file that holds keys of both kinds is a recipe of `mmft train`, whose errors then name the keys that it lacks.
    """
    file = Path(path)
    if not file.is_file():
        return str(path) in find_recipes(REWARD_MODELS) and str(path) not in find_recipes()
    if file.resolve().parent.name in (RECIPES, REWARD_MODELS):
        return file.resolve().parent.name == REWARD_MODELS
    keys = {str(key) for key in _read(file)}
    reward, policy = set(RewardRecipe.model_fields), set(Recipe.model_fields)
    return bool(keys & (reward - policy)) and not keys & (policy - reward)


def _load(path: str | Path, overrides: Sequence[str], schema: type[R], kind: str) -> R:
    file = _find(path, kind)
    config = _read(file)
    config.setdefault("name", file.stem)
    assigned = [_split(override) for override in overrides]
    from_file = _plain(config)
    for key, value in assigned:
        _assign(config, key, value)
    try:
        raw = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise RecipeError(f"{file}: {_first_line(error)}") from error
    set_keys = [key for key, _ in assigned]
    _drop_foreign_keys(raw, schema, "", _types(from_file), set_keys)
    try:
        # JSON is pydantic's strict mode with lists for tuples: "3" is no number and 1 is no boolean.
        return schema.model_validate_json(json.dumps(raw), strict=True)
    except TypeError as error:  # bytes, which YAML can spell and no key takes
        raise RecipeError(f"{file}: {_first_line(error)}") from error
    except ValidationError as error:
        key, complaint = summarize(error.errors(), schema)
    where = COMMAND_LINE if _from_command_line(key, set_keys, from_file) else file
    raise RecipeError(f"{where}: {key}: {complaint}")


def dump_recipe(recipe: BaseModel) -> str:
    """The resolved recipe as YAML that `load_recipe` reads back as an equal recipe."""
    return OmegaConf.to_yaml(OmegaConf.create(recipe.model_dump(mode="json")))


def _find(path: str | Path, kind: str) -> Path:
    file = Path(path)
    if file.is_file():
        return file
    if file.is_dir():
        raise RecipeError(f"{path}: a folder, not a recipe file")
    shipped = find_recipes(kind)
    if str(path) in shipped:
        return shipped[str(path)]
    suggestion = nearest(file.stem, shipped)
    hint = f"; did you mean {shipped[suggestion]}?" if suggestion else ""
    raise RecipeError(f"{path}: no such recipe{hint}")


def _read(file: Path) -> DictConfig:
    try:
        config = OmegaConf.load(file)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise RecipeError(f"{file}: {line}{error.problem}") from error
    except Exception as error:  # YAML's constructors of numbers, dates and binaries raise whatever they please
        raise RecipeError(f"{file}: not a readable YAML file: {_first_line(error)}") from error
    # OmegaConf reads a bare word as {word: None}; both that and a list are no recipe.
    if not isinstance(config, DictConfig) or not config:
        raise RecipeError(f"{file}: must hold keys such as model, data and reward")
    return config


def _split(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not _KEY.fullmatch(key):
        raise RecipeError(f"{COMMAND_LINE}: {override!r}: an override is written key=value, as in train.lr=1e-4")
    try:
        return key, _plain(OmegaConf.from_dotlist([f"value={text}"]))["value"]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise RecipeError(f"{COMMAND_LINE}: {key}: {text!r} is not a YAML value") from error


def _plain(config: Any) -> Any:
    """Plain containers, with `${...}` left as written: it is resolved once every override is in place."""
    return OmegaConf.to_container(config, resolve=False)


def _assign(config: DictConfig, key: str, value: Any) -> None:
    try:
        OmegaConf.update(config, key, value, merge=False)
    except (OmegaConfBaseException, ValueError) as error:
        raise RecipeError(f"{COMMAND_LINE}: {key}: {_first_line(error)}") from error


def _types(node: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted path of every block that has a `type` -> that type."""
    found: dict[str, Any] = {}
    if isinstance(node, dict):
        if "type" in node:
            found[prefix] = node["type"]
        for key, child in node.items():
            found |= _types(child, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(node, list):
        for index, child in enumerate(node):
            found |= _types(child, f"{prefix}.{index}")
    return found


def _drop_foreign_keys(raw: Any, annotation: Any, path: str, before: dict[str, Any], set_keys: list[str]) -> None:
    """Where an override changed a block's `type`, remove keys of the old type that the new one does not have.

    Otherwise `data.type=imagefolder` on a recipe about scenes would fail on `samples`, which the user never wrote.
    """
    if isinstance(raw, list):
        for index, child in enumerate(raw):
            _drop_foreign_keys(child, element_type(annotation), f"{path}.{index}", before, set_keys)
    if not isinstance(raw, dict) or annotation is None:
        return
    tagged = kinds(annotation)
    models = [member for member in union_members(annotation) if is_model(member)]
    model = tagged.get(str(raw.get("type"))) if tagged else next(iter(models), None)
    if model is None:
        return
    if path in before and before[path] != raw.get("type"):
        kept = set(model.model_fields) | {key.removeprefix(f"{path}.").split(".")[0] for key in set_keys}
        for key in [key for key in raw if key not in kept]:
            del raw[key]
    for key, child in raw.items():
        field = model.model_fields.get(str(key))
        if field is not None:
            _drop_foreign_keys(child, field.annotation, f"{path}.{key}" if path else str(key), before, set_keys)


def _from_command_line(key: str, set_keys: list[str], from_file: Any) -> bool:
    """Whether a bad key was written by an override: itself, inside its value, or missing beside it."""
    node: Any = from_file
    for part in key.split("."):
        if isinstance(node, list):
            node = node[int(part)] if part.isdigit() and int(part) < len(node) else None
        else:
            node = node.get(part) if isinstance(node, dict) else None
    for own in set_keys:
        block = own.rpartition(".")[0]
        beside = own.startswith(f"{key}.") or (block and key.startswith(f"{block}."))
        if key == own or key.startswith(f"{own}.") or (node is None and beside):
            return True
    return False


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
