"""Everything a trainer has learned or counted, as JSON and tensors: with it, training goes on to the same numbers.

Weights that do not train are not in it. With adapters it is small, so that a step can be undone as well.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmft.train.sharding import full, put
from mmft.types import UserError

if TYPE_CHECKING:
    from mmft.train.ppo import VisionPPOTrainer

NUMBERS, TENSORS = "trainer.json", "trainer.safetensors"
_WEIGHT, _OPTIMIZER = "weight/", "optimizer/"


def save_state(trainer: VisionPPOTrainer, folder: Path, numbers: Mapping[str, Any] | None = None) -> None:
    """Writes `trainer.json` and `trainer.safetensors`. All processes call it between two steps, the first writes."""
    state, tensors = {**numbers_of(trainer), **(numbers or {})}, tensors_of(trainer)
    if trainer.ranks.is_main:
        (folder / NUMBERS).write_text(json.dumps(state), encoding="utf-8")
        save_file(tensors, folder / TENSORS)


def load_state(trainer: VisionPPOTrainer, folder: Path) -> dict[str, Any]:
    """Takes back what `save_state` wrote, and returns its numbers; `train` then goes on behind that step."""
    state: dict[str, Any] = json.loads((folder / NUMBERS).read_text(encoding="utf-8"))
    load_numbers(trainer, state)
    load_tensors(trainer, load_file(folder / TENSORS))
    trainer.loaded = True
    return state


def numbers_of(trainer: VisionPPOTrainer) -> dict[str, Any]:
    """What is not a tensor, JSON-ready. All processes take part."""
    learned = getattr(trainer.reward_model, "function", None)
    return {
        "step": trainer.state.global_step,
        "episode": trainer.state.episode,
        "kl": trainer.kl.state_dict(),
        "schedule": _plain(trainer.lr_scheduler.state_dict()),
        "data": trainer.batches.state_dict(),
        "interface": trainer.interface.state_dict(),
        "micro_batch": trainer.updater.micro_batch,
        "reward": learned.state_dict() if hasattr(learned, "state_dict") else None,
        "random": trainer.ranks.gather_list([_random_states()]),
    }


def load_numbers(trainer: VisionPPOTrainer, state: Mapping[str, Any]) -> None:
    """Takes back what `numbers_of` gave."""
    trainer.state.global_step, trainer.state.episode = state["step"], state["episode"]
    trainer.kl.load_state_dict(state["kl"])
    trainer.lr_scheduler.load_state_dict(dict(state["schedule"]))
    trainer.batches.load_state_dict(state["data"])
    trainer.interface.load_state_dict(state["interface"])
    trainer.updater.micro_batch = state["micro_batch"]
    if state["reward"] is not None:
        trainer.reward_model.function.load_state_dict(state["reward"])
    states = state["random"]
    _load_random(states[trainer.ranks.index % len(states)])


def tensors_of(trainer: VisionPPOTrainer) -> dict[str, Tensor]:
    """Copies of all trained weights and of the optimizer's state, on the CPU."""
    tensors = {_WEIGHT + name: parameter for name, parameter in trained(trainer).items()}
    for index, state in trainer.engine.state().items():
        tensors |= {f"{_OPTIMIZER}{index}/{name}": value for name, value in state.items()}
    return {name: full(tensor.detach()).to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


@torch.no_grad()
def load_tensors(trainer: VisionPPOTrainer, tensors: Mapping[str, Tensor]) -> None:
    """Takes back what `tensors_of` gave. Raises UserError where it is of other weights."""
    own = trained(trainer)
    saved = {name.removeprefix(_WEIGHT): t for name, t in tensors.items() if name.startswith(_WEIGHT)}
    for name in sorted(own.keys() | saved.keys()):
        ours, theirs = own.get(name), saved.get(name)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            raise UserError(
                f"the checkpoint is of another model: {name} is {_shape(theirs)} there and {_shape(ours)} here"
            )
    for name, parameter in own.items():
        put(parameter, saved[name])
    trainer.engine.weights_changed()
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith(_OPTIMIZER):
            index, name = key.removeprefix(_OPTIMIZER).split("/")
            state.setdefault(int(index), {})[name] = tensor
    trainer.engine.load_state(state)
    for group, lr in zip(trainer.optimizer.param_groups, trainer.lr_scheduler.get_last_lr(), strict=True):
        group["lr"] = lr


def trained(trainer: VisionPPOTrainer) -> dict[str, torch.nn.Parameter]:
    """The weights that train, by name: the policy's, the critic's."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _shape(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"of shape {tuple(tensor.shape)}"


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's state without its functions, which are made anew."""
    return {name: value for name, value in state.items() if name != "lr_lambdas"} | {
        "lr_lambdas": [None] * len(state.get("lr_lambdas", []))
    }


def _random_states() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    kind, keys, place, has_gauss, cached = np.random.get_state()
    states: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [kind, keys.tolist(), place, has_gauss, cached],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return states


def _load_random(states: Mapping[str, Any]) -> None:
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, place, has_gauss, cached = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), place, has_gauss, cached))
    torch.set_rng_state(_bytes(states["torch"]))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(states["cuda"]))


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
