"""Where the parts of a vision-language model lie, found by structure and never by the family's name."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from mmft.types import UserError

# What is read off a picture: a module that takes one of these belongs to a vision tower or to what follows it, like
# the queries of a Q-Former.
_PICTURE_INPUTS = frozenset(("pixel_values", "flattened_patches", "patch_embeds", "query_embeds", "image_embeds"))
_STACKS = (nn.ModuleList, nn.ModuleDict)


def output_head(model: nn.Module) -> nn.Module:
    """The layer that turns hidden states into logits: the model's own, else that of the text decoder inside it.

    Raises UserError for a model without one: it has no log-probabilities.
    """
    found = _ask(model, "get_output_embeddings")
    if found is not None:
        return found
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and (found := _ask(module, "get_output_embeddings")) is not None:
            return found
    raise UserError(f"{type(model).__name__} has no output embedding: it writes no text")


def token_embedding(model: nn.Module) -> nn.Module | None:
    """The model's own input embedding, else that of the text decoder inside it; None where nothing reads tokens."""
    for module in model.modules():
        # A vision tower answers with its patches.
        if module is model or (isinstance(module, PreTrainedModel) and not _sees_pictures(module)):
            found = _ask(module, "get_input_embeddings")
            if isinstance(found, nn.Module):
                return found
    return None


def language_model(model: nn.Module) -> tuple[str, nn.Module]:
    """(dotted name, module) of the language side: the smallest module that holds the token embedding and layers, and
    with them the decoder of an encoder-decoder model.

    In most families the vision tower lies beside it. In some (GIT, Idefics, T5-Gemma 2) it holds the tower as well;
    `language_parts` tells them apart.
    """
    embedding = token_embedding(model)
    if embedding is None:
        raise UserError(f"{type(model).__name__} has no token embedding: it is no language model")
    path = next(name for name, module in model.named_modules() if module is embedding)
    needed = [embedding]
    decoder = _ask(model, "get_decoder") if model.config.is_encoder_decoder else None
    if decoder is not None and not _contains(decoder, embedding):
        needed.append(decoder)
    while path:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        if any(isinstance(m, nn.ModuleList) for m in module.modules()) and all(_contains(module, n) for n in needed):
            return path, module
    return "", model


def language_parts(model: nn.Module) -> list[str]:
    """Dotted names of the modules that together are the language side's layers, with no part of a vision tower,
    connector or Q-Former inside any of them.

    One name, `language_model`'s, where no picture comes near it.
    """
    prefix, language = language_model(model)
    embedding = token_embedding(model)
    assert embedding is not None  # or language_model had raised
    if not any(_sees_pictures(m) and not _contains(m, embedding) for m in language.modules()):
        return [prefix]
    return list(_token_readers(prefix, language, embedding))


def _token_readers(path: str, module: nn.Module, embedding: nn.Module) -> Iterator[str]:
    """Inside a module that mixes both sides: what owns the embedding is searched further; stacks of layers, and what
    takes an attention mask, read tokens; the rest (projections, resamplers) connects the two.
    """
    for name, child in module.named_children():
        inner = f"{path}.{name}" if path else name
        if _contains(child, embedding):
            yield from _token_readers(inner, child, embedding)
        elif not _sees_pictures(child) and (isinstance(child, _STACKS) or "attention_mask" in _inputs(child)):
            yield inner


def context_length(model: Any) -> int | None:
    """How many positions the language model has; None where the config sets no end, as with relative positions.

    Beyond it learned positions fail or repeat the last one, and rotary ones were never trained.
    """
    length = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return int(length) if length else None


def _sees_pictures(module: nn.Module) -> bool:
    return not _PICTURE_INPUTS.isdisjoint(_inputs(module))


def _inputs(module: nn.Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)


def _contains(module: nn.Module, part: nn.Module) -> bool:
    return any(m is part for m in module.modules())


def _ask(module: Any, question: str) -> Any:
    """What a model says of itself; None where it cannot tell."""
    try:
        return getattr(module, question)()
    except (AttributeError, NotImplementedError):
        return None
