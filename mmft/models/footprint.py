"""How much memory a model's weights and passes take, counted without loading a weight.

The model is built from its config on the meta device, adapters included, and its passes run on fake tensors: shapes,
types and lifetimes are real, contents are not there. What lives at once is counted, whatever a family's layers, its
attention and its adapters keep. Where a pass asks for the contents of a tensor, its size is estimated from the linear
layers instead, and `Footprint.estimated` says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mmft.config import ModelConfig
from mmft.functional.lm_head import CHUNK_ELEMENTS, Forbidden, head_logprobs
from mmft.models.critic import ValueHead
from mmft.models.decoding import Sampling, cache_of
from mmft.models.encode_once import FeatureStore
from mmft.models.fake_tensors import FakeTensors, LiveBytes, empty_policy, size_of
from mmft.models.interface import Interface
from mmft.models.packing import Packed, additive, split_groups, tree_mask
from mmft.models.prepacked import BOUND
from mmft.models.prompts import Prompt, stack_pictures
from mmft.models.scoring import response_states
from mmft.models.structure import language_parts, output_head
from mmft.models.value_adapter import CRITIC, adapter_active, critic_parameters

T = TypeVar("T")
# A weight of a frozen linear layer in bytes; 4 bits are normal floats in blocks of 64 whose scales are quantised too.
QUANTIZED_BYTES = {"4bit": 0.5 + 0.127 / 8, "8bit": 1.0}
_TOGETHER, _TOGETHER_ELEMENTS = 16, 2**23  # prompts whose pictures are encoded at once, and their pixels
_EVERYTHING = 2**62  # bytes: no feature is dropped
_FAILURES = (ValueError, TypeError, RuntimeError, KeyError, AttributeError, IndexError, AssertionError)


@dataclass(frozen=True)
class Weights:
    """Bytes. frozen: what never changes; packed: its copies in the processor library's layout, on a CPU in bf16;
    trained: adapters, or all weights; critic: the value head and its adapter. parameters, trainable: how many numbers.
    """

    frozen: int
    packed: int
    trained: int
    critic: int
    parameters: int
    trainable: int


@dataclass(frozen=True)
class TrainingBytes:
    """A micro-batch: what is kept for its backward pass, the output layer's buffers, and what passing backward takes
    beside both.
    """

    kept: int
    logits: int
    backward: int

    @property
    def peak(self) -> int:
        return self.kept + self.logits + self.backward


@dataclass(frozen=True)
class SamplingBytes:
    """Keys and values at the longest, the buffers that a token is drawn with, and what passes take beside both."""

    cache: int
    logits: int
    passes: int


@dataclass(frozen=True)
class PictureBytes:
    """each: the features of a prompt's pictures, as they are kept; encode: what encoding takes at most."""

    each: int
    encode: int


class Footprint:
    """A policy without contents, whose weights and passes can be measured.

    Args:
        config: the recipe's `model`.
        dtype: of the weights. Quantised weights compute in float32 streams, as their loading leaves them.
        device: "cpu" or "cuda"; attention is the one that torch would take there.
        critic: "shared" or "adapter".

    Raises UserError for a checkpoint that is not there or is no vision-language model.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: str, critic: str = "shared"):
        self.config, self.device, self.critic = config, torch.device(device), critic
        self.dtype = torch.float32 if config.quantization else dtype
        self.model, self.processor = empty_policy(config, self.dtype, critic)
        self.weights = self._weights()
        self.fake = FakeTensors()
        self.fake.materialise(self.model, self.device)
        self.interface = Interface(self.model, self.processor, config.encode_once)
        self.head = self.interface.head
        self.store = FeatureStore(self.interface.base, _EVERYTHING)
        self.value_head = ValueHead(self.interface.hidden_size)
        self.fake.materialise(self.value_head, self.device)
        self.estimated: set[str] = set()
        self._known: dict[tuple[Any, ...], Any] = {}

    # Weights.

    def _weights(self) -> Weights:
        base: Any = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        own = {id(p) for p in critic_parameters(self.model)}
        every = list(self.model.parameters())
        policy = [p for p in every if p.requires_grad and id(p) not in own]
        frozen = [p for p in every if not p.requires_grad]
        width = int(output_head(base).weight.shape[1])  # type: ignore[index, arg-type]
        value = sum(size_of(p) for p in ValueHead(width).parameters())
        buffers = sum(size_of(b) for b in self.model.buffers())
        return Weights(
            frozen=self._frozen_bytes(frozen) + buffers,
            packed=self._packed_bytes(base),
            trained=sum(size_of(p) for p in policy),
            critic=value + sum(size_of(p) for p in every if id(p) in own),
            parameters=sum(p.numel() for p in frozen) or sum(p.numel() for p in policy),
            trainable=sum(p.numel() for p in policy),
        )

    def _frozen_bytes(self, frozen: Sequence[nn.Parameter]) -> int:
        if self.config.quantization is None:
            return sum(size_of(p) for p in frozen)
        each = QUANTIZED_BYTES[self.config.quantization]
        head = output_head(self.model)
        linear = {id(m.weight) for m in self.model.modules() if type(m) is nn.Linear and m is not head}
        return int(sum(p.numel() * (each if id(p) in linear else 4) for p in frozen))

    def _packed_bytes(self, base: Any) -> int:
        """See `mmft.models.prepacked`: frozen linear layers of the language side, up to its bound."""
        if self.device.type != "cpu" or self.dtype != torch.bfloat16:
            return 0
        parts = [*(base.get_submodule(name) for name in language_parts(base)), output_head(base)]
        weights = {
            id(m.weight): m.weight for part in parts for m in part.modules()
            if type(m) is nn.Linear and not m.weight.requires_grad and m.weight.dtype == torch.bfloat16
        }  # fmt: skip
        size = sum(size_of(w) for w in weights.values())
        return size if size <= BOUND else 0

    # Passes. What they take is linear in the number of prompts: one and two are tried.

    def training(self, rows: int, group: int, prompt: int, new: int) -> TrainingBytes:
        """A micro-batch of `rows` answers of `new` tokens, `group` of them to each prompt of `prompt` tokens."""
        key = ("training", rows, group, prompt, new)
        return self._counted(key, lambda: self._training(rows, group, prompt, new), self._estimated_training)

    def _training(self, rows: int, group: int, prompt: int, new: int) -> TrainingBytes:
        passed, length = self.layout(rows, group, prompt, new)
        answers = math.ceil(rows / passed)
        kept, peak = self._linear(("trunk", answers, length, new), self._trunk, passed)
        logits = self._once(("head", rows * new), lambda: self._head(rows * new))
        return TrainingBytes(kept, logits, max(0, peak - kept - logits))

    def _trunk(self, passed: int, answers: int, length: int, new: int) -> tuple[int, int]:
        """(kept, peak) of forward and backward pass up to the output layer, critic included."""
        with self._open() as live:
            begun = live.start()
            packed = self._packed(passed, answers, length, new)
            read = states = self._states(packed)
            if self.critic == "adapter":
                with adapter_active(self.model, CRITIC):
                    read = self._states(packed)
            loss = self.value_head(read).sum() + states.sum()
            kept = live.now - begun
            del states, read
            loss.backward()
            return kept, live.peak - begun

    def _head(self, tokens: int) -> int:
        none = torch.zeros(0, dtype=torch.long, device=self.device)
        with self._open() as live:
            states = torch.empty(tokens, self.interface.hidden_size, dtype=self.interface.dtype, device=self.device)
            begun = live.start()
            states.requires_grad_()
            logprobs, _ = head_logprobs(self.head, states, self._zeros(tokens), Forbidden(none, none))
            logprobs.sum().backward()
            return live.peak - begun

    def sampling(self, rows: int, distinct: int, prompt: int, new: int, greedy: bool = False) -> SamplingBytes:
        """`rows` answers of `new` tokens to `distinct` prompts."""
        key = ("sampling", rows, distinct, prompt, new, greedy)
        return self._counted(key, lambda: self._sampling(rows, distinct, prompt, new, greedy), self._estimated_sampling)

    def _sampling(self, rows: int, distinct: int, prompt: int, new: int, greedy: bool) -> SamplingBytes:
        (reading,) = self._linear(("prompts", prompt), self._reading, distinct)
        cache, step = self._linear(("step", prompt + new), self._last_step, rows)
        drawn = self._once(("draw", rows, greedy), lambda: self._drawing(rows, greedy))
        return SamplingBytes(cache, drawn, max(0, step - drawn, reading - cache - drawn))

    @torch.no_grad()
    def _reading(self, distinct: int, prompt: int) -> tuple[int]:
        with self._open() as live:
            begun = live.start()
            self._read(distinct, prompt)
            return (live.peak - begun,)

    @torch.no_grad()
    def _last_step(self, rows: int, length: int) -> tuple[int, int]:
        """Keys and values before the last token, and what its pass takes beside them."""
        with self._open() as live:
            begun = live.start()
            cache = self._read(rows, length - 1)
            full = live.now - begun
            live.start()
            token = self._inputs(rows, 1) | {"attention_mask": self._zeros(rows, length)}
            self.model(**self.interface.accept(token), cache=cache, use_cache=True, return_dict=True)
            return full, live.peak - begun - full

    @torch.no_grad()
    def _drawing(self, rows: int, greedy: bool) -> int:
        with self._open() as live:
            begun = live.start()
            logits = torch.empty(rows, self._vocabulary, dtype=self.interface.dtype, device=self.device)
            sampling = Sampling(1, greedy=greedy)
            scores = sampling.scores(logits, 0)
            sampling.choose(scores)
            scores.logsumexp(-1)
            return live.peak - begun

    def pictures(self, prompts: Sequence[Prompt]) -> PictureBytes:
        """Features of a prompt's pictures, and encoding those of distinct prompts among these together."""
        shown = [p for p in prompts if p.pictures]
        if not shown:
            return PictureBytes(0, 0)
        largest = max(shown, key=_elements)
        distinct = len({p.picture_key for p in shown})  # content is read here: inside there is none
        together = max(1, min(distinct, _TOGETHER, _TOGETHER_ELEMENTS // max(1, _elements(largest))))
        key = ("pictures", largest.picture_key)
        each, encode = self._counted(key, lambda: self._pictures(largest), lambda *_: self._estimated_pictures(largest))
        return PictureBytes(each, together * encode)

    def _pictures(self, prompt: Prompt) -> tuple[int, int]:
        while self.store.way != "off":
            self.store.clear()
            try:
                with self._open() as live:
                    begun = live.start()
                    self.store.inputs([prompt])
                    kept = live.now - begun
                    return kept, live.peak - begun - kept
            except _FAILURES:
                if self.store.ways[1] == "off":
                    raise
                self.store.give_up_way()
        raise ValueError("no way to the pictures' features")

    def encodes_once(self, prompt: Prompt) -> bool:
        """Whether the features of a prompt's pictures are wanted and stay what they are."""
        return self.config.encode_once != "off" and bool(prompt.pictures) and not self.trains_tower(prompt)

    def trains_tower(self, prompt: Prompt) -> bool:
        """Whether a gradient reaches tower or connector."""
        if not prompt.pictures:
            return False
        return self._counted(("trains",), lambda: self._trains(prompt), lambda *_: self._trains_outside_language())

    def _trains(self, prompt: Prompt) -> bool:
        with self._open():
            return self.store.trains(prompt)

    def _trains_outside_language(self) -> bool:
        inside = [self.interface.base.get_submodule(name) for name in language_parts(self.interface.base)]
        language = {id(p) for part in (*inside, self.head) for p in part.parameters()}
        return any(p.requires_grad and id(p) not in language for p in self.interface.base.parameters())

    def tower_graph(self, prompt: Prompt, rows: int) -> int:
        """What the backward pass needs of tower and connector, for the pictures of `rows` such prompts; 0 where
        neither trains.
        """
        if not self.trains_tower(prompt):
            return 0
        key = ("tower", prompt.picture_key, rows)
        return self._counted(
            key, lambda: self._tower_graph(prompt, rows), lambda *_: self._estimated_tower(prompt, rows)
        )

    def _tower_graph(self, prompt: Prompt, rows: int) -> int:
        with self._open() as live:
            begun = live.start()
            self.store.trains(replace(prompt, pictures=stack_pictures([prompt] * rows)))
            return live.peak - begun

    # How passes are put together.

    def _open(self) -> AbstractContextManager[LiveBytes]:
        held = [*self.model.parameters(), *self.model.buffers(), *self.value_head.parameters()]
        return self.fake.counting([*held, *(p.grad for p in held if p.grad is not None)])

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.long, device=self.device)

    def _inputs(self, rows: int, length: int) -> dict[str, Any]:
        """Inputs of a pass over text; models that count positions in space would ask the pictures for them."""
        if self.interface.encoder_decoder:
            raise ValueError("a decoder of its own reads no prompt")
        inputs = {"input_ids": self._zeros(rows, length), "attention_mask": self._zeros(rows, length)}
        if any(hasattr(m, "get_rope_index") for m in self.interface.base.modules()):
            inputs["position_ids"] = self._zeros(3, rows, length)
        return inputs

    def _packed(self, passed: int, answers: int, length: int, new: int) -> Packed:
        """`passed` rows of `length` tokens, each with so many answers."""
        inputs = self._inputs(passed, length)
        if answers > 1:
            inputs["attention_mask"] = additive(tree_mask(inputs["attention_mask"]), self.interface.dtype)
            inputs.setdefault("position_ids", self._zeros(passed, length))
        rows = passed * answers
        return Packed(self.interface.accept(inputs), self._zeros(rows), self._zeros(rows, new))

    def layout(self, rows: int, group: int, prompt: int, new: int) -> tuple[int, int]:
        """(rows of the pass, tokens of each): answers of one prompt lie in one row as far as that pays."""
        window, group = self.interface.window, min(group, rows)
        if group == 1 or not self.interface.share_prompts or (window is not None and prompt + new >= window):
            return rows, prompt + new
        one = Prompt(torch.zeros(prompt, dtype=torch.long))
        cut = split_groups([list(range(group))], [one] * group, [new] * group, self.interface.hidden_size)
        return math.ceil(rows / group) * len(cut), prompt + len(cut[0]) * new

    def _states(self, packed: Packed) -> Tensor:
        with response_states(self.head, packed) as kept:
            self.model(**packed.inputs, use_cache=False, return_dict=True)
        return kept["states"]

    def _read(self, rows: int, length: int) -> Any:
        keep = {"logits_to_keep": 1} if "logits_to_keep" in self.interface.takes else {}
        inputs = self.interface.accept(self._inputs(rows, length))
        return cache_of(self.model(**inputs, use_cache=True, return_dict=True, **keep))

    def _linear(self, key: tuple[Any, ...], count: Callable[..., tuple[int, ...]], number: int) -> tuple[int, ...]:
        """`count(number, *key[1:])`, from one and two."""
        one, two = (self._once((*key, n), lambda n=n: count(n, *key[1:])) for n in (1, 2))  # type: ignore[misc]
        return tuple(a + (number - 1) * (b - a) for a, b in zip(one, two, strict=True))

    def _once(self, key: tuple[Any, ...], count: Callable[[], T]) -> T:
        if key not in self._known:
            self._known[key] = count()
        return self._known[key]

    def _counted(self, key: tuple[Any, ...], count: Callable[[], T], estimate: Callable[..., T]) -> T:
        """What is counted, or where that fails what is estimated."""
        if key[0] not in self.estimated or key in self._known:
            try:
                return self._once(key, count)
            except _FAILURES:
                self.estimated.add(key[0])
        return self._once(key, lambda: estimate(*key[1:]))

    # Where a pass cannot be counted.

    def _estimated_training(self, rows: int, group: int, prompt: int, new: int) -> TrainingBytes:
        groups, length = self.layout(rows, group, prompt, new)
        kept = groups * length * self._token_bytes(language=True) * (2 if self.critic == "adapter" else 1)
        return TrainingBytes(kept, 16 * max(CHUNK_ELEMENTS, self._vocabulary), 2 * kept // layer_count(self._text))

    def _estimated_sampling(self, rows: int, distinct: int, prompt: int, new: int, greedy: bool) -> SamplingBytes:
        heads = getattr(self._text, "num_attention_heads", 1)
        width = self.interface.hidden_size // heads * (getattr(self._text, "num_key_value_heads", None) or heads)
        cache = rows * (prompt + new) * 2 * layer_count(self._text) * width * self.dtype.itemsize
        passes = distinct * prompt * self._token_bytes(language=True) // layer_count(self._text)
        return SamplingBytes(cache, rows * self._vocabulary * (12 if greedy else 28), passes)

    def _estimated_pictures(self, prompt: Prompt) -> tuple[int, int]:
        builder = self.interface.builder
        stands_for_one = builder.tokenizer.convert_tokens_to_ids(builder.placeholder) if builder.placeholder else None
        tokens = prompt.input_ids.tolist().count(stands_for_one) or len(prompt) or 1
        vision = getattr(self.interface.base.config, "vision_config", None)
        encode = self._estimated_tower(prompt, 1) // layer_count(vision)
        return tokens * self.interface.hidden_size * self.dtype.itemsize, encode

    def _estimated_tower(self, prompt: Prompt, rows: int) -> int:
        patch = getattr(getattr(self.interface.base.config, "vision_config", None), "patch_size", None)
        side = patch if isinstance(patch, int) else 14
        return rows * (_elements(prompt) // (3 * side**2) + 1) * self._token_bytes(language=False)

    def _token_bytes(self, language: bool) -> int:
        """Inputs and outputs of one side's linear layers for one token."""
        parts = [self.interface.base.get_submodule(name) for name in language_parts(self.interface.base)]
        inside = {m for part in (*parts, self.head) for m in part.modules()}
        layers = [m for m in self.interface.base.modules() if type(m) is nn.Linear and m is not self.head]
        return self.dtype.itemsize * sum(m.in_features + m.out_features for m in layers if (m in inside) == language)

    @property
    def _text(self) -> Any:
        return self.interface.base.config.get_text_config(decoder=True)

    @property
    def _vocabulary(self) -> int:
        return int(self.head.weight.shape[0])  # type: ignore[index]


def layer_count(config: Any) -> int:
    names = ("num_hidden_layers", "num_layers", "decoder_layers", "depth", "depths")
    found = next((value for name in names if (value := getattr(config, name, None))), 12)
    return sum(found) if isinstance(found, list | tuple) else int(found)


def _elements(prompt: Prompt) -> int:
    """Numbers of a prompt's pixels."""
    return sum(tensor.numel() for tensor in prompt.pictures.values() if tensor.is_floating_point())
