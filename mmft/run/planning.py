"""`mmft plan`: memory and time of a recipe before it is launched.

Memory is counted part by part without loading a weight (`mmft.models.footprint`). Time comes from a probe: two small
batches go through the recipe's own trainer, and what a phase took in each tells what it takes a step and a row.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from rich.console import Console

from mmft.config import Recipe
from mmft.data.sources import open_source
from mmft.models.footprint import Footprint
from mmft.models.prompts import Prompt
from mmft.models.reward_footprint import reward_footprint
from mmft.report.plan_table import print_plan
from mmft.run.device import device_of, dtype_of, quiet_loading
from mmft.run.probing import Timing, probe
from mmft.types import UserError

GB = 2**30
PHASES = ("encode", "sample", "reward", "update", "evaluate")
_PROMPTS = 16  # training pictures that prompts are measured on; as many as are encoded at once
_RUNNING = 160 * 2**20  # of libraries that have begun to work, data and the reward's statistics, measured on a CPU
# What an allocator holds beside what lives, as a share of what comes and goes: malloc's heap after tensors of many
# sizes (measured: 0.4 to 0.7), and blocks that CUDA's caching allocator could not use again.
_SLACK = {"cpu": 0.5, "cuda": 0.1}
_GPU_PROGRAM = GB // 2  # a CUDA context with the kernels of torch and cuBLAS's workspace
_PROGRAM = GB // 2  # of Python and its libraries, where the system does not say
_CACHES = (1.0, 0.5, 0.25, 0.1)  # GiB for features of pictures
_SAME_RESULTS = {
    "train.micro_batch",
    "train.share_prompts",
    "model.encode_once",
    "eval.batch",
    "model.feature_cache_gb",
}
_WORTH = 0.01  # of a peak: a change that saves less is none
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Memory:
    """Bytes of each part in each phase of a step: part -> phase -> bytes."""

    parts: dict[str, dict[str, int]]

    def total(self, phase: str) -> int:
        return sum(sizes.get(phase, 0) for sizes in self.parts.values())

    def excess(self, available: int) -> int:
        """What phases need beyond `available`, added up: 0 where it fits."""
        return sum(max(0, self.total(phase) - available) for phase in PHASES)

    @property
    def peak_phase(self) -> str:
        return max(PHASES, key=self.total)

    @property
    def peak(self) -> int:
        return self.total(self.peak_phase)


@dataclass(frozen=True)
class Change:
    """A key to change, what that saves after the changes before it, and the peak that is left. Bytes."""

    key: str
    value: Any
    saves: int
    peak: int

    def __str__(self) -> str:
        return f"{self.key}={json.dumps(self.value) if isinstance(self.value, bool | dict) else self.value}"


@dataclass
class Plan:
    """What `mmft plan` found. available: the device's memory in bytes; time: None without a probe."""

    recipe: Recipe
    device: str
    memory: Memory
    available: int
    facts: dict[str, Any]
    advice: list[Change] = field(default_factory=list)
    time: Timing | None = None

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.available

    def record(self) -> dict[str, Any]:
        """For machines: sizes in bytes, times in seconds."""
        memory = self.memory
        advice = [{"change": str(c), "saves": c.saves, "peak": c.peak} for c in self.advice]
        return {
            "recipe": self.recipe.name,
            "device": self.device,
            **self.facts,
            "memory": {
                "parts": memory.parts,
                "phases": {phase: memory.total(phase) for phase in PHASES},
                "peak": {"phase": memory.peak_phase, "bytes": memory.peak},
                "available": self.available,
                "fits": self.fits,
            },
            "advice": advice,
            "time": None if self.time is None else self.time.record(self.recipe),
        }


def plan(recipe: Recipe, memory: str | None = None, with_probe: bool = True, as_json: bool = False) -> bool:
    """Prints what a run of `recipe` needs; returns whether it fits.

    memory: of the device, as in "24GB"; None asks the device. with_probe: measure the time, where it fits.
    """
    available = None if memory is None else parse_size(memory)
    if recipe.algorithm.type == "sft":
        raise UserError("algorithm sft: mmft plan knows reinforcement learning alone, which needs more")
    quiet_loading()
    console = Console(stderr=True)
    with console.status("counting memory"):
        found = predict(recipe, available)
    if with_probe and found.fits:
        with console.status("trying two small steps"):
            found.time = probe(recipe)
    if as_json:
        print(json.dumps(found.record(), indent=2))
    else:
        print_plan(found.record())
    return found.fits


def predict(recipe: Recipe, available: int | None = None, counter: Counter | None = None) -> Plan:
    """Memory of a recipe and, where it is more than `available` (None: what the device has), what to change."""
    device = device_of(recipe)
    available = available_bytes(device) if available is None else available
    counter = counter or Counter(device, program_bytes(device))
    found = Plan(recipe, device, counter.memory(recipe), available, counter.facts(recipe))
    if not found.fits:
        found.advice = _advise(counter, recipe, available)
    return found


class Counter:
    """Memory of recipes on one device, where the process takes `program` bytes before it loads anything. Models,
    prompts and passes that recipes share are looked at once.
    """

    def __init__(self, device: str, program: int):
        self.device, self.program = device, program
        self._footprints: dict[str, Footprint] = {}
        self._prompts: dict[str, tuple[list[Prompt], int]] = {}

    def facts(self, recipe: Recipe) -> dict[str, Any]:
        model, (prompts, _) = self.footprint(recipe), self.prompts(recipe)
        return {
            "dtype": recipe.model.quantization or str(model.dtype).removeprefix("torch."),
            "parameters": model.weights.parameters,
            "trainable": model.weights.trainable,
            "prompt_tokens": max(len(p) for p in prompts),
            "encode_once": model.encodes_once(prompts[0]),
            "estimated": sorted(model.estimated),
        }

    def footprint(self, recipe: Recipe) -> Footprint:
        dtype = dtype_of(recipe) if recipe.model.dtype == "auto" else getattr(torch, recipe.model.dtype)
        options = (dtype, self.device, recipe.ppo.critic)
        key = f"{recipe.model.model_dump_json(exclude={'feature_cache_gb'})} {options}"
        if key not in self._footprints:
            self._footprints[key] = Footprint(recipe.model, *options)
        return self._footprints[key]

    def prompts(self, recipe: Recipe) -> tuple[list[Prompt], int]:
        """Prompts of the first training rows, and how many rows there are."""
        key = f"{recipe.data.model_dump_json()} {recipe.model.path}"
        if key not in self._prompts:
            source, builder = open_source(recipe.data, "train"), self.footprint(recipe).interface.builder
            self._prompts[key] = [builder(source[i]) for i in range(min(_PROMPTS, len(source)))], len(source)
        return self._prompts[key]

    def memory(self, recipe: Recipe) -> Memory:
        parts = {name: dict.fromkeys(PHASES, size) for name, size in self._always(recipe).items()}
        passing = self._passing(recipe)
        slack = {phase: sum(sizes.get(phase, 0) for sizes in passing.values()) for phase in PHASES}
        passing["allocator"] = {phase: int(_SLACK[self.device] * size) for phase, size in slack.items()}
        return Memory({name: sizes for name, sizes in (parts | passing).items() if any(sizes.values())})

    def _always(self, recipe: Recipe) -> dict[str, int]:
        """What is there from the first step to the last."""
        model, (prompts, rows) = self.footprint(recipe), self.prompts(recipe)
        weights, t = model.weights, recipe.train
        trained = weights.trained + weights.critic
        temporaries = 1 if self.device == "cuda" else 0  # AdamW's, over all weights at once
        copied = weights.trained if recipe.anchor.l2 and recipe.model.lora is None else 0
        pictures = min(rows, t.steps * (t.batch // t.samples_per_prompt)) + recipe.eval.samples
        kept = pictures * model.pictures(prompts).each if model.encodes_once(prompts[0]) else 0
        return {
            "program": self.program,
            "frozen weights": weights.frozen,
            "packed weights": weights.packed,
            "adapters" if recipe.model.lora is not None else "trained weights": weights.trained,
            "critic": weights.critic,
            "gradients": trained,
            "optimizer": (2 + temporaries) * trained,
            "anchor": copied,
            "reward model": self._reward(recipe)[0],
            "picture features": min(kept, int(recipe.model.feature_cache_gb * GB)),
        }

    def _passing(self, recipe: Recipe) -> dict[str, dict[str, int]]:
        """What is there while a phase runs."""
        model, (prompts, _) = self.footprint(recipe), self.prompts(recipe)
        t, tokens, longest = recipe.train, recipe.generation.max_new_tokens, max(len(p) for p in prompts)
        group, micro, at_once = t.samples_per_prompt, micro_batch(recipe), min(recipe.eval.batch, recipe.eval.samples)
        shared = group if t.share_prompts else 1
        update = model.training(micro, shared, longest, tokens)
        sample = model.sampling(t.batch, t.batch // group, longest, tokens)
        greedy = model.sampling(at_once, at_once, longest, tokens, greedy=True)
        pictures, distinct = model.pictures(prompts), len({p.picture_key for p in prompts if p.pictures})
        encoded = pictures.encode + distinct * pictures.each
        if distinct and not model.encodes_once(prompts[0]):  # each pass sees all of its pictures at once
            encoded = encoded * max(t.batch // group, at_once) // distinct
        tower = model.tower_graph(prompts[0], model.layout(micro, shared, longest, tokens)[0])
        # the first micro-batch's graph is kept while the others, the reference and the reward are computed
        return {
            "picture encoding": {"encode": encoded},
            "tower's activations": {"reward": tower, "update": tower},
            "key-value cache": {"sample": sample.cache, "evaluate": greedy.cache},
            "activations": {"reward": update.kept, "update": update.kept},
            "passes": {
                "sample": sample.passes,
                "reward": self._reward(recipe)[1],
                "update": update.backward,
                "evaluate": greedy.passes,
            },
            "logits": {"sample": sample.logits, "update": update.logits, "evaluate": greedy.logits},
        }

    def _reward(self, recipe: Recipe) -> tuple[int, int]:
        if recipe.reward.model is None:
            return 0, 0
        longest = max(len(p) for p in self.prompts(recipe)[0])
        t, tokens = recipe.train, recipe.generation.max_new_tokens
        return reward_footprint(recipe.reward.model, min(t.batch, 256), t.samples_per_prompt, longest, tokens)


def micro_batch(recipe: Recipe) -> int:
    return recipe.train.micro_batch or recipe.train.batch // recipe.train.minibatches


# What to change.


def changed(recipe: Recipe, changes: dict[str, Any]) -> Recipe | None:
    """The recipe with other values of dotted keys; None where they do not go together."""
    data = recipe.model_dump(mode="json")
    for key, value in changes.items():
        *blocks, last = key.split(".")
        block = data
        for name in blocks:
            block = block[name]
        block[last] = value
    try:
        return Recipe.model_validate_json(json.dumps(data))
    except ValidationError:
        return None


def _advise(counter: Counter, recipe: Recipe, available: int) -> list[Change]:
    """Changes, one after the other, with which the recipe fits, or which bring it nearest; the largest effect first."""
    chosen: dict[str, Any] = {}
    current = recipe
    while counter.memory(current).peak > available:
        step = _next_change(counter, current, available)
        if step is None:
            break
        chosen[step[0]] = step[1]
        current = changed(recipe, chosen) or current
    left = _milder(counter, recipe, chosen, available)
    found: list[Change] = []
    peak = counter.memory(recipe).peak
    while left:
        after, key = min((_peak(counter, recipe, {**done(found), k: v}), k) for k, v in left.items())
        found.append(Change(key, left.pop(key), peak - after, after))
        peak = after
    return found


def _milder(counter: Counter, recipe: Recipe, chosen: dict[str, Any], available: int) -> dict[str, Any]:
    """The changes as far as they are needed: with the later ones, less of an earlier one may be enough, or none."""
    for key, values in _options(counter, recipe):
        if key not in chosen:
            continue
        others = {k: v for k, v in chosen.items() if k != key}
        milder = [others]
        if chosen[key] in values:
            milder += [{**chosen, key: value} for value in values[: values.index(chosen[key])]]
        chosen = next((c for c in milder if _peak(counter, recipe, c) <= available), chosen)
    return dict(chosen)


def _peak(counter: Counter, recipe: Recipe, changes: dict[str, Any]) -> int:
    other = changed(recipe, changes)
    return sys.maxsize if other is None else counter.memory(other).peak


def done(changes: Sequence[Change]) -> dict[str, Any]:
    """The changed keys and their values."""
    return {change.key: change.value for change in changes}


def _next_change(counter: Counter, recipe: Recipe, available: int) -> tuple[str, Any] | None:
    """The first key that is enough by itself, with its mildest such value; else the key that saves most, those first
    that leave results as they are. None where nothing saves enough to matter.
    """
    before = counter.memory(recipe)
    least = before.excess(available) - _WORTH * before.peak
    best: dict[bool, tuple[int, str, Any]] = {}
    for key, values in _options(counter, recipe):
        for value in values:
            other = changed(recipe, {key: value})
            if other is None:
                continue
            excess, harmless = counter.memory(other).excess(available), key in _SAME_RESULTS
            if not excess:
                return key, value
            if excess < min(least, best[harmless][0] if harmless in best else least):
                best[harmless] = excess, key, value
    found = best.get(True) or best.get(False)
    return None if found is None else found[1:]


def _options(counter: Counter, recipe: Recipe) -> Iterator[tuple[str, list[Any]]]:
    """Keys that save memory, those first that change results least, and values from the mildest to the strongest; of
    those that change them much one step.
    """
    t, micro = recipe.train, micro_batch(recipe)
    minibatch = t.batch // t.minibatches
    yield "train.micro_batch", [n for n in range(micro - 1, 0, -1) if minibatch % n == 0]
    if t.samples_per_prompt > 1 and not t.share_prompts:
        yield "train.share_prompts", [True]
    if recipe.model.encode_once == "off":
        yield "model.encode_once", ["auto"]
    yield "eval.batch", [recipe.eval.batch >> k for k in range(1, recipe.eval.batch.bit_length())]
    prompts, _ = counter.prompts(recipe)  # below the features of one batch, each pass would encode anew
    needed = counter.footprint(recipe).pictures(prompts).each * (t.batch // t.samples_per_prompt)
    caches = [gb for gb in _CACHES if needed < gb * GB < recipe.model.feature_cache_gb * GB]
    yield "model.feature_cache_gb", caches
    if counter.footprint(recipe).dtype == torch.float32 and not recipe.model.quantization:
        yield "model.dtype", ["bfloat16"]
    if recipe.ppo.critic == "adapter":
        yield "algorithm.critic", ["shared"]
    if recipe.model.lora is None:
        yield "model.lora", [{}]
    elif not recipe.model.quantization and counter.device == "cuda":
        yield "model.quantization", ["8bit", "4bit"]
    half = t.batch // 2
    if t.batch % 2 == 0 and half % t.samples_per_prompt == 0 and half % t.minibatches == 0:
        yield "train.batch", [half]
    if recipe.generation.max_new_tokens >= 16:
        yield "generation.max_new_tokens", [recipe.generation.max_new_tokens // 2]


# The machine.


def parse_size(text: str) -> int:
    """Bytes of "24GB", "512 MiB" or "16g"; a GB is 2**30 bytes, as memory is sold."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])i?B?\s*", text, re.IGNORECASE)
    if found is None:
        raise UserError(f"--memory: {text!r} is not a size; write it as 24GB or 512MB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def program_bytes(device: str) -> int:
    """What the process takes of the device's memory beside the recipe: Python and its libraries, or a CUDA context."""
    if device == "cuda":
        return _GPU_PROGRAM
    pages = _read("/proc/self/statm").split()
    if len(pages) > 1:
        return int(pages[1]) * os.sysconf("SC_PAGE_SIZE") + _RUNNING
    return _PROGRAM + _RUNNING


def available_bytes(device: str) -> int:
    """Memory that a run could have: what is free now, with what this process has, within a container's limit."""
    if device == "cuda":
        return min(torch.cuda.mem_get_info()[0] + _GPU_PROGRAM, torch.cuda.mem_get_info()[1])
    free = re.search(r"MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"))
    if free is not None:
        sizes = [int(free[1]) * 1024 + program_bytes(device) - _RUNNING]
    else:
        sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    return min([*sizes, *([int(limit)] if limit.isdigit() else [])])


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="ascii")
    except OSError:
        return ""
