"""One-line errors: pydantic's report of a bad recipe turned into file, dotted key, what is wrong, nearest valid key."""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from mmft.types import UserError


class RecipeError(UserError, ValueError):
    """A recipe that cannot run. One line: where, key, what is wrong."""


def nearest(word: str, options: Iterable[str]) -> str | None:
    """The option most like `word`, or None when none is like it."""
    return next(iter(difflib.get_close_matches(word, list(options), n=1, cutoff=0.6)), None)


def union_members(annotation: Any) -> list[Any]:
    """The alternatives of an annotation, without None and Annotated wrappers."""
    if get_origin(annotation) is Annotated:
        return union_members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for part in get_args(annotation) for member in union_members(part)]
    return [] if annotation is type(None) else [annotation]


def is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def type_tag(model: type[BaseModel]) -> str:
    """The value of `type` that selects a member of a union."""
    return str(get_args(model.model_fields["type"].annotation)[0])


def kinds(annotation: Any) -> dict[str, type[BaseModel]]:
    """`type` -> model, for a block that is selected by `type`; empty for any other."""
    models = [member for member in union_members(annotation) if is_model(member)]
    return {type_tag(model): model for model in models if "type" in model.model_fields}


def element_type(annotation: Any) -> Any:
    """What a list holds, or None when the annotation is not a list."""
    for member in union_members(annotation):
        if get_origin(member) in (tuple, list):
            return get_args(member)[0]
    return None


def locate(root: type[BaseModel], location: Iterable[int | str]) -> tuple[list[str], type[BaseModel]]:
    """The user's path to an error and the model that holds its last key.

    pydantic mixes its own tags of union members into a location; the schema tells them from keys.
    """
    keys: list[str] = []
    holder: type[BaseModel] = root
    annotation: Any = root
    for part in location:
        tagged = kinds(annotation)
        if len(tagged) > 1 and not (is_model(annotation)):
            annotation = tagged.get(str(part))
            continue
        member = next(iter(union_members(annotation)), None)
        if member is not None and is_model(member):
            keys.append(str(part))
            holder = member
            field = member.model_fields.get(str(part))
            annotation = field.annotation if field else None
        elif isinstance(part, int) and element_type(annotation) is not None:
            keys.append(str(part))
            annotation = element_type(annotation)
    return keys, holder


def leaf_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of a schema, without those inside lists."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for member in union_members(field.annotation):
            if is_model(member):
                yield from leaf_keys(member, f"{prefix}{name}.")


def unknown_key(root: type[BaseModel], holder: type[BaseModel], keys: Sequence[str]) -> str:
    """What to say of a key that `holder` does not have, though another type in its place may."""
    suggestion = nearest(keys[-1], holder.model_fields)
    if suggestion is None:
        elsewhere = (path for path in leaf_keys(root) if path.rpartition(".")[2] == keys[-1])
        suggestion = next((path for path in elsewhere if path != ".".join(keys)), None)
    if suggestion:
        return f"unknown key; did you mean {suggestion}?"
    return f"unknown key; valid keys: {', '.join(holder.model_fields)}"


def unknown_choice(value: Any, choices: list[str], noun: str = "value") -> str:
    suggestion = nearest(str(value), choices)
    hint = f"did you mean {suggestion}?" if suggestion else f"there is {', '.join(choices)}"
    return f"unknown {noun} {_shorten(value)}; {hint}"


def describe(error: ErrorDetails, root: type[BaseModel]) -> tuple[str, str]:
    """Dotted key and complaint of one pydantic error."""
    keys, holder = locate(root, error["loc"])
    context: dict[str, Any] = error.get("ctx", {})
    kind, value = error["type"], error["input"]
    if kind == "extra_forbidden":
        return ".".join(keys), unknown_key(root, holder, keys)
    if kind == "missing":
        return ".".join(keys), "missing"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        choices = [choice.strip("' ") for choice in context.get("expected_tags", "").split(",") if choice.strip()]
        field = holder.model_fields[[key for key in keys if not key.isdigit()][-1]]
        choices = choices or list(kinds(element_type(field.annotation) or field.annotation))
        if kind == "union_tag_invalid":
            return ".".join([*keys, "type"]), unknown_choice(value.get("type"), choices, "type")
        return ".".join([*keys, "type"]), f"missing; one of {', '.join(choices)}"
    if kind == "conflict":
        return ".".join([*keys, context["key"]]).rstrip("."), context["text"]
    if kind == "literal_error" and isinstance(value, str):
        literals = [str(choice) for member in _literals(holder, keys) for choice in get_args(member)]
        if literals:
            return ".".join(keys), unknown_choice(value, literals, "type" if keys[-1] == "type" else "value")
    if kind == "string_pattern_mismatch":
        return ".".join(keys), f"{_shorten(value)} will not do; expected: {holder.model_fields[keys[-1]].description}"
    return ".".join(keys), f"{_requirement(error)}, got {_shorten(value)}"


def _literals(holder: type[BaseModel], keys: list[str]) -> list[Any]:
    field = holder.model_fields.get(keys[-1])
    return [] if field is None else [m for m in union_members(field.annotation) if get_origin(m) is Literal]


def _requirement(error: ErrorDetails) -> str:
    """pydantic's message as a requirement, in YAML's words and without the parser's remarks."""
    if error["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return "must be a mapping of keys"
    if error["type"] in ("tuple_type", "list_type"):
        return "must be a list"
    if error["type"] == "too_short":
        return f"must have at least {error['ctx']['min_length']} item"
    message = error["msg"].split(", ")[0] if "parse" in error["msg"] else error["msg"]
    return message.replace("Input should", "must", 1)


def _shorten(value: Any, limit: int = 60) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)  # null and true, as in the file
    return text if len(text) <= limit else text[: limit - 3] + "..."


def summarize(errors: Iterable[ErrorDetails], root: type[BaseModel]) -> tuple[str, str]:
    """The first bad key and what is wrong with it, with a count of the other bad keys.

    A field with several allowed types fails once for each of them: these belong together.
    """
    complaints: dict[str, list[str]] = {}
    for error in errors:
        key, complaint = describe(error, root)
        complaints.setdefault(key, []).append(complaint)
    # The alternative that got further into the value says more than those that refused it whole.
    deepest = {key for key in complaints if not any(other.startswith(f"{key}.") for other in complaints)}
    complaints = {key: texts for key, texts in complaints.items() if key in deepest}
    # An unknown key is most often the cause of a missing one, so it is named first.
    ordered = sorted(complaints.items(), key=lambda item: not item[1][0].startswith("unknown"))
    key, texts = ordered[0]
    more = f" (and {len(ordered) - 1} more)" if len(ordered) > 1 else ""
    return key, "; or ".join(dict.fromkeys(texts)) + more
