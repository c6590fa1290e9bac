"""Encode once: each distinct picture goes through the frozen vision tower a single time.

Sampling, old log-probabilities, reference, values, every epoch of the update and every sample of one picture read the
same features, for as long as they fit the memory budget. Features are found by the content of the picture's tensors.

Two ways lead features into a model. Where `forward` takes `mm_encoder_outputs`, what `get_image_features` gave goes in
there, tower and connector both done. Elsewhere the tower's own output is put in its place while the model runs.
"""

from __future__ import annotations

import inspect
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmft.models.prompts import Prompt, cat_padded, stack_pictures

Way = Literal["outputs", "tower", "off"]

_BATCH = 16  # pictures encoded at once
_BATCH_ELEMENTS = 2**23  # and their pixels together: a large picture fills two cores alone
PIXELS = {"pixel_values", "flattened_patches"}
_TEXT_INPUTS = {"input_ids", "decoder_input_ids", "inputs_embeds"}
_DROPPED = {
    "hidden_states",
    "attentions",
    "last_hidden_state",
    "vision_outputs",
    "qformer_outputs",
}  # large, and not what the language model reads
_A_TENSOR_A_LAYER = {"hidden_states", "attentions"}  # or None, of layers that nobody asked for


@dataclass
class PictureInputs:
    """What a batch reads of its pictures: `inputs` for the model's forward, and `pinned`, the tower's output."""

    inputs: dict[str, Any] = field(default_factory=dict)
    pinned: Any = None


class FeatureStore:
    """Features of pictures by content, the least recently used dropped where they pass `budget` bytes.

    `hits` and `misses` count lookups; a miss is one pass of the tower. Weights of tower and connector are taken as
    they are: whoever changes them calls `clear`.
    `steady`: on a CPU, whose arithmetic depends on how many pictures go together, encode each alone: features are then
    the same to the bit whatever is known already, and a resumed run begins with an empty store.
    """

    def __init__(self, model: nn.Module, budget: int, way: Way | None = None, steady: bool = False):
        self.model = model
        self.budget = budget
        self.steady = steady
        self.features = _features_function(model)
        self.tower = vision_tower(model)
        self.ways: list[Way] = [way] if way else self._possible_ways()
        self.hits = self.misses = 0
        self.around: Callable[[], AbstractContextManager[Any]] = nullcontext  # in which the tower's weights are whole
        self._seconds = 0.0
        self._known: OrderedDict[bytes, Any] = OrderedDict()
        self._bytes = 0

    @property
    def way(self) -> Way:
        """The first way not found wanting; "off" hands over pixels."""
        return self.ways[0]

    def _possible_ways(self) -> list[Way]:
        takes_outputs = "mm_encoder_outputs" in inspect.signature(self.model.forward).parameters
        ways: list[Way] = ["outputs"] if takes_outputs and self.features is not None else []
        return [*ways, *(["tower"] if self.tower is not None else []), "off"]  # type: ignore[list-item]

    def give_up_way(self) -> None:
        """Goes on with the next way: this one was seen to change the model's answers."""
        if len(self.ways) > 1:
            self.ways.pop(0)
        self.clear()

    def clear(self) -> None:
        self._known.clear()
        self._bytes = 0

    def inputs(self, prompts: Sequence[Prompt]) -> PictureInputs:
        """What the model's forward takes for the pictures of these rows, in their order."""
        if not any(p.pictures for p in prompts):
            return PictureInputs()
        if self.way == "off":
            return PictureInputs(self._to_model(stack_pictures(prompts)))
        features = self._of([p for p in prompts if p.pictures])
        if self.way == "tower":
            return PictureInputs(self._to_model(stack_pictures(prompts)), merge_outputs(features))
        kept = {name: tensor for name, tensor in stack_pictures(prompts).items() if self._is_kept(name, tensor)}
        return PictureInputs(self._to_model(kept) | {"mm_encoder_outputs": {"image": merge_outputs(features)}})

    def trains(self, prompt: Prompt) -> bool:
        """Whether a gradient would reach weights of tower or connector: then features grow stale with every update."""
        weights = [p for p in self.model.parameters() if p.requires_grad]
        if self.way == "off" or not weights:
            return False
        with torch.enable_grad():
            outputs = [tensor for tensor in _tensors(self._run([prompt])) if tensor.requires_grad]
        if not outputs:
            return False
        # Outputs may ask for a gradient though no weight behind them trains, as for recomputed activations.
        ones = [torch.ones_like(tensor) for tensor in outputs]
        return any(g is not None for g in torch.autograd.grad(outputs, weights, ones, allow_unused=True))

    def _is_kept(self, name: str, tensor: Tensor) -> bool:
        """Grids and sizes are still read, by position ids for one; pixels and their masks are not."""
        accepted = name in inspect.signature(self.model.forward).parameters
        return accepted and not tensor.is_floating_point() and not name.startswith("pixel")

    def _of(self, prompts: Sequence[Prompt]) -> list[Any]:
        missing: dict[bytes, Prompt] = {}
        for prompt in prompts:
            key = prompt.picture_key
            if key in self._known:
                self._known.move_to_end(key)
                self.hits += 1
            elif key not in missing:
                missing[key] = prompt
                self.misses += 1
            else:
                self.hits += 1
        fresh = dict(zip(missing, self._encode(list(missing.values())), strict=True))
        found = [fresh[p.picture_key] if p.picture_key in fresh else self._known[p.picture_key] for p in prompts]
        for key, output in fresh.items():
            self._remember(key, output)
        return found

    def _remember(self, key: bytes, output: Any) -> None:
        self._known[key] = output
        self._bytes += _size(output)
        while self._bytes > self.budget and self._known:
            _, dropped = self._known.popitem(last=False)
            self._bytes -= _size(dropped)

    @torch.no_grad()
    def _encode(self, prompts: list[Prompt]) -> list[Any]:
        began = time.perf_counter()
        encoded: list[Any] = []
        alone = self.steady and next(self.model.parameters()).device.type == "cpu"
        with self.around() if prompts else nullcontext():
            for batch in _equal_batches(prompts, 1 if alone else _BATCH):
                parts = split_output(self._run(batch), len(batch)) if len(batch) > 1 else None
                encoded += parts or [self._run([prompt]) for prompt in batch]
        self._seconds += time.perf_counter() - began
        return encoded

    def take_seconds(self) -> float:
        """Seconds spent on encoding since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _run(self, prompts: Sequence[Prompt]) -> Any:
        pictures = self._to_model(stack_pictures(prompts))
        if self.way == "outputs":
            names = list(inspect.signature(self.features).parameters)
            known = {n: v for n, v in pictures.items() if n in names}
            left = [v for n, v in pictures.items() if n not in known and v.is_floating_point()]
            if names[0] not in known and left:  # the processor calls the pixels otherwise
                known[names[0]] = left[0]
            return without_dropped(self.features(**known, return_dict=True))
        ids = {}
        if len(prompts[0]) and "input_ids" in inspect.signature(self.model.forward).parameters:
            stacked = torch.stack([p.input_ids[: min(len(q) for q in prompts)] for p in prompts])
            ids = self._to_model({"input_ids": stacked, "attention_mask": torch.ones_like(stacked)})
        return output_of(self.tower, self.model, ids | pictures)

    def _to_model(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        parameter = next(self.model.parameters())
        dtype = getattr(self.model, "dtype", parameter.dtype)
        return {k: v.to(parameter.device, dtype if v.is_floating_point() else v.dtype) for k, v in tensors.items()}


def vision_tower(model: nn.Module) -> nn.Module | None:
    """The outermost part of a model whose forward reads pictures and no text; None where there is none."""
    for name, module in model.named_modules():
        if name:
            reads = inspect.signature(module.forward).parameters
            if not PIXELS.isdisjoint(reads) and _TEXT_INPUTS.isdisjoint(reads):
                return module
    return None


def _features_function(model: nn.Module) -> Any:
    inner = getattr(model, "base_model", model)
    return getattr(inner, "get_image_features", None) or getattr(model, "get_image_features", None)


class _Captured(Exception):
    pass


def output_of(part: nn.Module, model: nn.Module, inputs: dict[str, Any]) -> Any:
    """What `part` answers inside a forward of `model`, which ends there."""
    seen: list[Any] = []

    def capture(_: nn.Module, args: Any, output: Any) -> None:
        seen.append(output)
        raise _Captured

    handle = part.register_forward_hook(capture)
    try:
        model(**inputs)
    except _Captured:
        return seen[0]
    finally:
        handle.remove()
    raise RuntimeError(f"{type(model).__name__} does not run its {type(part).__name__}")


@contextmanager
def _in_place_of(part: nn.Module, output: Any) -> Iterator[None]:
    before = part.__dict__.get("forward")
    part.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if before is None:
            del part.forward
        else:
            part.forward = before


def pinned(part: nn.Module | None, output: Any) -> Any:
    """A context in which `part` answers `output` whatever it is asked; nothing changes where that is None."""
    return nullcontext() if part is None or output is None else _in_place_of(part, output)


def _equal_batches(prompts: list[Prompt], limit: int) -> Iterator[list[Prompt]]:
    """Runs of prompts with pictures alike, so that no padding changes what a tower sees, and each gives as much."""
    batch: list[Prompt] = []
    for prompt in prompts:
        elements = sum(t.numel() for t in prompt.pictures.values())
        room = len(batch) < limit and (len(batch) + 1) * elements <= _BATCH_ELEMENTS
        if batch and not (room and _alike(batch[0].pictures, prompt.pictures)):
            yield batch
            batch = []
        batch.append(prompt)
    if batch:
        yield batch


def _alike(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Equal shapes, and equal sizes, grids and masks in them: a prompt's pictures may be padded to one shape."""
    if {name: tensor.shape for name, tensor in one.items()} != {name: tensor.shape for name, tensor in other.items()}:
        return False
    said = [n for n, tensor in one.items() if not (tensor.is_floating_point() or n.endswith("input_ids"))]
    return all(torch.equal(one[name], other[name]) for name in said)


def without_dropped(output: Any) -> Any:
    """The output with what the language model reads alone.

    A model writes its features as `pooler_output` even on a tower's output that has no such field; it is one then.
    """
    pooled = getattr(output, "pooler_output", None)
    if pooled is None:
        return output
    kind = type(output) if "pooler_output" in output else BaseModelOutputWithPooling
    kept = {name: value for name, value in output.items() if name not in _DROPPED}
    return kind(**{**kept, "pooler_output": pooled})


def split_output(output: Any, rows: int) -> list[Any] | None:
    """An output of `rows` rows of equal pictures, row by row; None where it is not plain how it divides."""
    if not hasattr(output, "items"):
        return None
    parts: list[dict[str, Any]] = [{} for _ in range(rows)]
    for name, value in output.items():
        pieces = _split_value(name, value, rows)
        if pieces is None:
            return None
        for part, piece in zip(parts, pieces, strict=True):
            part[name] = piece
    return [type(output)(**part) for part in parts]


def _split_value(name: str, value: Any, rows: int) -> list[Any] | None:
    if isinstance(value, list | tuple) and name in _A_TENSOR_A_LAYER:
        layers = [[None] * rows if layer is None else _split_value("", layer, rows) for layer in value]
        return None if None in layers else [type(value)(pieces) for pieces in zip(*layers, strict=True)]
    a_picture_each = isinstance(value, list | tuple) and name == "pooler_output"
    if not (a_picture_each or (isinstance(value, Tensor) and value.dim())) or len(value) % rows:
        return None
    step = len(value) // rows
    pieces = [value[i * step : (i + 1) * step] for i in range(rows)]
    # views would keep all rows alive
    return [p.clone() if isinstance(p, Tensor) else type(p)(t.clone() for t in p) for p in pieces]


def merge_outputs(outputs: Sequence[Any]) -> Any:
    """Outputs of single rows as that of a batch."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return cat_padded(list(outputs))
    if isinstance(first, tuple) and not hasattr(first, "_fields"):
        return tuple(_merge_value("", list(values)) for values in zip(*outputs, strict=True))
    return type(first)(**{name: _merge_value(name, [output[name] for output in outputs]) for name in first})


def _merge_value(name: str, values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor) and first.dim():
        return cat_padded(values)
    a_picture_each = name == "pooler_output" or len({len(v) for v in values if isinstance(v, list | tuple)}) > 1
    if isinstance(first, list | tuple) and a_picture_each:
        return type(first)(item for value in values for item in value)
    if isinstance(first, list | tuple):  # a tensor (or list of pictures) a layer
        return type(first)(_merge_value("pooler_output", list(items)) for items in zip(*values, strict=True))
    return first


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _size(output: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(output))
