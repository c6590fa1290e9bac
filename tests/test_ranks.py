"""Several processes give one process's numbers for the same global batch."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from ranks import launch

COMMON = {
    "total_episodes": 24, "num_mini_batches": 2, "num_ppo_epochs": 2, "kl_coef": 0.1, "kl_target": 0.5,
    "whiten_rewards": True, "l2": 1e-2, "adapter_penalty": 1e-3, "missing_eos_penalty": 0.5, "entropy_coef": 0.01,
    "samples_per_prompt": 2, "response_length": 6, "learning_rate": 3e-3,
}  # fmt: skip


def close(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["drawn"] == other["drawn"]
    assert len(one["logs"]) == len(other["logs"]) > 0
    for ours, theirs in zip(one["logs"], other["logs"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5, rel=1e-5)
    assert one["weights"].keys() == other["weights"].keys()
    for name, weight in one["weights"].items():
        assert weight == pytest.approx(other["weights"][name], abs=1e-5), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process with a batch of 8."""
    out = tmp_path_factory.mktemp("alone") / "run.json"
    return launch(1, out, COMMON | {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1})


def test_one_process_that_accumulates(alone: dict[str, Any], tmp_path: Path) -> None:
    """A micro-batch of 2 in minibatches of 4: the sums are the same, in another order."""
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    close(alone, launch(1, tmp_path / "run.json", COMMON | halves))


def test_two_processes(alone: dict[str, Any], tmp_path: Path) -> None:
    quarter = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    both = launch(2, tmp_path / "run.json", COMMON | quarter)
    assert both["processes"] == 2 and both["same_everywhere"] and both["restored"]
    close(alone, both)


def test_ranks_without_a_picture_do_not_hang(tmp_path: Path) -> None:
    """The tower trains, and no row of one process has a picture: it has no gradient there."""
    settings = COMMON | {
        "without_picture": list(range(24)), "train_tower": True, "num_mini_batches": 1, "samples_per_prompt": 4,
        "adapter_penalty": 0.0, "l2": 0.0,
    }  # fmt: skip
    del settings["without_picture"][3]
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    both = launch(2, tmp_path / "two.json", settings | sizes)
    assert both["same_everywhere"]
    sizes = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    close(launch(1, tmp_path / "one.json", settings | sizes), both)


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}  # fmt: skip


def test_weights_in_parts(alone: dict[str, Any], tmp_path: Path) -> None:
    """FSDP2 in two processes."""
    quarter = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    both = launch(2, tmp_path / "run.json", COMMON | quarter, **FSDP2)
    assert both["sharded"] and both["processes"] == 2 and both["restored"]
    close(alone, both)


def test_weights_in_parts_and_minibatches_of_one_process_alone(tmp_path: Path) -> None:
    """All rows of a minibatch are of one prompt, so of one process: the other goes along for as many passes."""
    settings = COMMON | {"samples_per_prompt": 8, "num_mini_batches": 4, "total_episodes": 16, "num_ppo_epochs": 1}
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    both = launch(2, tmp_path / "two.json", settings | sizes, **FSDP2)
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    close(launch(1, tmp_path / "one.json", settings | sizes), both)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed")
@pytest.mark.parametrize("stage", ["2", "3"])
def test_deepspeed(alone: dict[str, Any], tmp_path: Path, stage: str) -> None:
    quarter = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    zero = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage}
    both = launch(2, tmp_path / "run.json", COMMON | quarter, **zero)
    assert both["sharded"] == (stage == "3") and both["processes"] == 2 and both["restored"]
    close(alone, both)
