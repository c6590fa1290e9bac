"""`accelerate=NAME`: which configs there are, that accelerate itself takes them, and the command in two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from mmft.cli import main
from mmft.report.folder import read_lines
from mmft.run import launching
from mmft.run.processes import Processes
from mmft.types import UserError

NAMES = ["ddp", "ddp_cpu", "deepspeed_cpu", "deepspeed_zero2", "deepspeed_zero3", "fsdp2", "fsdp2_cpu"]
SMALL = (
    "train.steps=2", "train.batch=8", "train.samples_per_prompt=2", "train.minibatches=2", "train.epochs=1",
    "eval.samples=3", "data.samples=12", "generation.max_new_tokens=4", "model.lora.r=2", "train.save_every=0",
    "logging.samples_every=1",
)  # fmt: skip


def test_the_shipped_configs(repository: Path) -> None:
    found = launching.configs()
    assert sorted(found) == NAMES
    assert all(path.read_text(encoding="utf-8").startswith("# ") for path in found.values())


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_takes_every_config(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own reader, checks and defaults."""
    monkeypatch.setattr(launching, "_devices", lambda path: 4)
    path = launching.find_config(name)
    arguments = launching.launch_arguments(path, ["train", "caption_ppo"])
    on_cpu = name.endswith("_cpu")
    assert arguments.num_processes == (2 if on_cpu else 4) and bool(arguments.cpu) == on_cpu
    assert arguments.module and arguments.training_script == "mmft"
    assert arguments.training_script_args == ["train", "caption_ppo"]
    assert bool(arguments.use_fsdp) == name.startswith("fsdp")
    assert bool(arguments.use_deepspeed) == name.startswith("deepspeed")
    if name.startswith("fsdp"):
        assert str(arguments.fsdp_version) == "2"
    if name.startswith("deepspeed"):
        assert int(arguments.zero_stage) == (2 if name.endswith("zero2") else 3)
        assert "zero_stage" in arguments.deepspeed_fields_from_accelerate_config.split(",")


def test_a_config_of_ones_own(tmp_path: Path) -> None:
    own = yaml.safe_load(launching.find_config("ddp_cpu").read_text(encoding="utf-8")) | {"num_processes": 3}
    file = tmp_path / "three.yaml"
    file.write_text(yaml.safe_dump(own), encoding="utf-8")
    assert launching.launch_arguments(launching.find_config(str(file)), []).num_processes == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnonsense: 3\n", "nonsense"),
        ("compute_environment: [", "three.yaml"),
        ("", "three.yaml"),
        ("- 1\n", "three.yaml"),
        ("compute_environment: LOCAL_MACHINE\ndistributed_type: NOTHING\n", "three.yaml"),
    ],
)
def test_a_config_that_accelerate_refuses_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "three.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=said) as error:
        launching.launch_arguments(file, [])
    assert "\n" not in str(error.value)


def test_names_are_suggested() -> None:
    with pytest.raises(UserError, match="no config 'ddp_cpus'; did you mean ddp_cpu?"):
        launching.find_config("ddp_cpus")
    with pytest.raises(UserError, match="no config 'x'; there are ddp, ddp_cpu, "):
        launching.find_config("x")


def test_gpus_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="ddp needs a GPU, and there is none here; ddp_cpu needs none"):
        launching.launch_arguments(launching.find_config("ddp"), [])


def test_deepspeed_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, before anything starts; and in processes that accelerate's own launcher started."""
    monkeypatch.setattr(launching, "_devices", lambda path: 4)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match="deepspeed_zero2: DeepSpeed is not installed: pip install deepspeed, or use"):
        launching.launch("deepspeed_zero2", ["train", "caption_ppo"])
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="DeepSpeed is not installed"):
        Processes(cpu=True)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed")
def test_an_optimizer_that_is_to_be_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu")
    with pytest.raises(UserError, match="does not offload the optimizer; set offload_optimizer_device: none"):
        Processes(cpu=True)


def test_the_same_command_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its overrides; and not again in the processes that it started."""
    seen: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(launching, "launch", lambda name, command: seen.append((name, list(command))) or 3)
    assert main(["train", "caption_ppo", "accelerate=ddp_cpu", "train.steps=2", "--resume", "--force"]) == 3
    ((name, command),) = seen
    assert name == "ddp_cpu" and command[:4] == ["train", "caption_ppo", "accelerate=ddp_cpu", "train.steps=2"]
    assert "--force" in command and any(part.startswith("--resume") for part in command)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr("mmft.run.train", lambda *arguments: None)
    assert main(["train", "caption_ppo", "accelerate=ddp_cpu"]) == 0
    assert len(seen) == 1


def test_errors_are_left_to_the_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each process says the same: it is printed once."""

    def children(arguments: SimpleNamespace) -> int:
        for rank in ("0", "1", "2"):
            monkeypatch.setenv("RANK", rank)
            assert launching.leave_error("error: the same")
        return 2

    monkeypatch.setattr(launching, "_run", children)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in (launching.ERRORS, "ACCELERATE_USE_CPU", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "")  # so that what launch sets is undone
    assert launching.launch("ddp_cpu", ["train", "caption_ppo"]) == 2
    assert capsys.readouterr().err == "error: the same\n"
    monkeypatch.delenv(launching.ERRORS)
    assert not launching.leave_error("error: nobody waits")


def mmft(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, "-m", "mmft", *arguments], capture_output=True, text=True,
        env=environment | {"OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip


NEEDS_DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed")


@pytest.mark.parametrize("config", ["ddp_cpu", pytest.param("deepspeed_cpu", marks=NEEDS_DEEPSPEED)])
def test_two_processes_run_a_recipe_as_one(tmp_path: Path, config: str) -> None:
    """One bar, one log, one run folder; the numbers of one process."""
    common = ["train", "caption_ppo_fixed", *SMALL]
    both = mmft(*common, f"logging.dir={tmp_path / 'two'}", f"accelerate={config}")
    assert both.returncode == 0, both.stderr
    assert both.stderr.count("adapter: ") == 1 and both.stderr.count("trained 2 steps") == 1
    assert "Traceback" not in both.stderr and "Warning" not in both.stderr
    assert mmft(*common, f"logging.dir={tmp_path / 'one'}").returncode == 0
    one, two = (tmp_path / name / "caption_ppo_fixed" for name in ("one", "two"))
    assert sorted(p.name for p in two.iterdir()) == sorted(p.name for p in one.iterdir())
    for ours, theirs in zip(read_lines(one / "metrics.jsonl"), read_lines(two / "metrics.jsonl"), strict=True):
        assert theirs == pytest.approx(ours, abs=1e-4, rel=1e-4)
    samples = [[line["id"] for line in read_lines(folder / "samples.jsonl")] for folder in (one, two)]
    assert samples[0] == samples[1]
    evaluated = [json.loads((folder / "eval.json").read_text())["samples"] for folder in (one, two)]
    assert evaluated == [3, 3], "three rows over two processes: none twice, none lost"


def test_an_error_in_two_processes_is_one_line(tmp_path: Path) -> None:
    done = mmft("train", "caption_ppo_fixed", "data.type=imagefolder", f"data.path={tmp_path / 'nothing'}",
                f"logging.dir={tmp_path}", "accelerate=ddp_cpu")  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path / 'nothing'}: no such folder\n"
