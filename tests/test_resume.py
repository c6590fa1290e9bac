"""Runs that are left, killed, damaged, resumed: in the end nothing tells them from one left alone."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmft import run
from mmft.cli import main
from mmft.config import load_recipe
from mmft.report.folder import RunFolder, read_lines
from mmft.train.update import Updater
from mmft.types import Stopped, UserError

SMALL = (
    "train.steps=4", "train.batch=8", "train.samples_per_prompt=2", "train.minibatches=2", "train.epochs=2",
    "train.save_every=1", "train.keep=2", "eval.samples=4", "eval.every=2", "data.samples=12", "kl.target=0.5",
    "generation.max_new_tokens=6", "model.lora.r=2", "logging.samples_every=1", "reward.tripwire.window=2",
)  # fmt: skip
EQUAL = (
    "metrics.jsonl", "samples.jsonl", "eval_samples.jsonl", "eval.json", "adapter/adapter_model.safetensors",
    "critic/value_head.safetensors", "reward/state.json",
)  # fmt: skip


def recipe(root: Path, *overrides: str, name: str = "caption_ppo_fixed") -> Any:
    return load_recipe(name, [*SMALL, f"logging.dir={root}", *overrides])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    return run.train(recipe(tmp_path_factory.mktemp("alone")))


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, stopped after two of four steps; tests work on copies."""
    folder = tmp_path_factory.mktemp("left")
    with pytest.MonkeyPatch.context() as patch:
        press(patch, signal.SIGTERM, at=9)  # 4 calls a step
        with pytest.raises(Stopped):
            run.train(recipe(folder))
    return folder / "caption_ppo_fixed"


@pytest.fixture
def copy(left: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(left, tmp_path / left.name))


def press(patch: pytest.MonkeyPatch, number: int, at: int) -> None:
    """Sends this process a signal in the midst of an update: in the `at`-th micro-batch of the run."""
    calls, step = [0], Updater._step

    def pressing(self: Updater, *args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            os.kill(os.getpid(), number)
        return step(self, *args, **options)

    patch.setattr(Updater, "_step", pressing)


def same(one: Path, other: Path) -> None:
    different = [name for name in EQUAL if (one / name).read_bytes() != (other / name).read_bytes()]
    assert not different
    steps = [[line["step"] for line in read_lines(folder / "timing.jsonl")] for folder in (one, other)]
    assert steps[0] == steps[1]


def picture_text(i: int) -> str:
    """A small picture in base64."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (10 * i, 255 - 10 * i, 7)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


# Leaving


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_leaves_and_the_run_goes_on(
    number: int, status: int, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "caption_ppo_fixed", *SMALL, f"logging.dir={tmp_path}"]
    folder = tmp_path / "caption_ppo_fixed"
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        press(patch, number, at=7)  # in the second step
        assert main(command) == status
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    said = capsys.readouterr().err
    assert f"to go on: mmft train {folder / 'recipe.yaml'} --resume {folder}\n" in said
    assert "Traceback" not in said and saved(folder) == ["step-1"], "the step was undone, and the first is saved"
    assert not (folder / "eval.json").exists() and not (folder / "run.lock").exists()
    assert main([*command, "--resume"]) == 0
    same(alone, folder)


def test_a_second_ctrl_c_leaves_at_once(tmp_path: Path) -> None:
    """The last checkpoint is intact, and the run goes on from it."""
    script = f"""
import os, signal, sys, time
sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}
import test_resume as t
from mmft.train.update import Updater
from mmft.cli import main
calls, step = [0], Updater._step
def pressing(self, *args, **options):
    calls[0] += 1
    if calls[0] == 7:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    return step(self, *args, **options)
Updater._step = pressing
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main(["train", "caption_ppo_fixed", *t.SMALL, "logging.dir={tmp_path}"]))
"""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    assert time.monotonic() - began < 60 and "Traceback" not in done.stderr
    folder = tmp_path / "caption_ppo_fixed"
    assert saved(folder) == ["step-1"] and len(list(read_lines(folder / "metrics.jsonl"))) == 1


# Going on


@pytest.mark.parametrize("damaged", [False, True])
def test_it_goes_on_from_the_newest_good_checkpoint(
    alone: Path, copy: Path, damaged: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert saved(copy) == ["step-1", "step-2"]
    if damaged:
        weights = copy / "checkpoints" / "step-2" / "trainer.safetensors"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    run.train(recipe(copy.parent), "")
    said = " ".join(capsys.readouterr().err.split())
    warning = "trainer.safetensors: altered or damaged since it was written; the one before it is used"
    assert (warning in said) == damaged
    assert f"going on after step {1 if damaged else 2}" in said
    same(alone, copy)
    assert saved(copy) == ["step-3", "step-4"]


def test_a_given_checkpoint_is_the_one(alone: Path, copy: Path) -> None:
    given = copy / "checkpoints" / "step-1"
    run.train(recipe(copy.parent), str(given))
    same(alone, copy)


def test_a_run_without_a_checkpoint_begins_anew(alone: Path, copy: Path) -> None:
    shutil.rmtree(copy / "checkpoints")
    run.train(recipe(copy.parent), str(copy))
    same(alone, copy)


def test_a_run_folder_that_was_moved(alone: Path, copy: Path, tmp_path: Path) -> None:
    moved = copy.rename(tmp_path / "elsewhere")
    assert run.train(load_recipe(moved / "recipe.yaml"), str(moved)) == moved
    same(alone, moved)


def test_how_often_it_is_saved_changes_nothing(alone: Path, tmp_path: Path) -> None:
    folder = run.train(recipe(tmp_path, "train.save_every=0", "train.workers=0"))
    same(alone, folder)
    assert saved(folder) == ["step-4"], "the end is always kept"


def test_a_table_goes_on_at_the_row(tmp_path: Path) -> None:
    """One row of it is bad, and counted once."""
    rows = [{"image": picture_text(i), "caption": f"a {i}"} for i in range(24)]
    rows[5]["image"] = base64.b64encode(b"no picture").decode()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    overrides = ("data.type=table", f"data.path={tmp_path / 'rows.jsonl'}", "data.eval_fraction=0.2", "train.steps=3",
                 "reward.tripwire.action=off", "eval.every=0", "data.max_bad_fraction=0.3")  # fmt: skip
    small = [setting for setting in SMALL if not setting.startswith("data.")]

    def table(name: str) -> Any:
        return load_recipe("caption_ppo_fixed", [*small, f"logging.dir={tmp_path / name}", *overrides])

    whole = run.train(table("whole"))
    with pytest.MonkeyPatch.context() as patch:
        press(patch, signal.SIGTERM, at=5)
        with pytest.raises(Stopped):
            run.train(table("cut"))
    cut = run.train(table("cut"), resume="")
    for name in ("metrics.jsonl", "samples.jsonl", "bad_rows.jsonl", "eval.json", "adapter/adapter_model.safetensors"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_finished_run_has_nothing_to_do(alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in alone.rglob("*") if path.is_file()}

    before = times()
    run.train(recipe(alone.parent), "")
    assert f"{alone} is finished; nothing is left to do" in capsys.readouterr().err
    assert times() == before


def test_a_finished_run_can_be_trained_longer(alone: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(alone, tmp_path / alone.name))
    longer = recipe(tmp_path, "train.steps=5")
    with pytest.raises(UserError, match=r"train.steps \(4 -> 5\); --force"):
        run.train(longer, "")
    run.train(longer, "", force=True)
    steps = [line["step"] for line in read_lines(folder / "metrics.jsonl") if "objective/kl" in line]
    assert steps == [1, 2, 3, 4, 5]
    weights = "adapter/adapter_model.safetensors"
    assert (folder / weights).read_bytes() != (alone / weights).read_bytes()


# What is refused


def test_a_changed_recipe_is_told_by_key(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = ["train.lr=1e-5", "reward.terms.0.weight=3"]
    with pytest.raises(UserError) as error:
        run.train(recipe(copy.parent, *changed), "")
    for part in ("reward.terms.0.weight (1.0 -> 3.0)", "train.lr (0.0005 -> 1e-05)", "--force goes on with the new"):
        assert part in str(error.value)
    before = (copy / "metrics.jsonl").read_bytes()
    run.train(recipe(copy.parent, *changed), "", force=True)
    assert (copy / "metrics.jsonl").read_bytes().startswith(before)
    assert "going on with other values" in " ".join(capsys.readouterr().err.split())
    assert load_recipe(copy / "recipe.yaml").train.lr == 1e-5


def test_other_models_are_refused(copy: Path) -> None:
    """--force is for values; weights of other shapes cannot be taken back."""
    with pytest.raises(UserError, match="lora|weights|shape"):
        run.train(recipe(copy.parent, "model.lora.r=4"), "", force=True)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("", "no run to resume; leave --resume out"),
        ("nowhere", "nowhere: no such run folder"),
        ("{copy}/checkpoints/step-9", "no manifest.json: not a checkpoint"),
        ("{copy}/checkpoints", "not a run that can be resumed"),
        ("{copy}/recipe.yaml", "no such run folder"),
    ],
)
def test_what_is_not_there(copy: Path, tmp_path: Path, where: str, said: str) -> None:
    root = copy.parent if where else tmp_path / "empty"
    with pytest.raises(UserError, match=said):
        run.train(recipe(root), where.format(copy=copy))


def test_a_given_checkpoint_that_is_damaged_is_refused(copy: Path) -> None:
    given = copy / "checkpoints" / "step-2"
    (given / "guard.json").unlink()
    with pytest.raises(UserError, match=r"step-2/guard.json: missing from the checkpoint"):
        run.train(recipe(copy.parent), str(given))


def test_samples_that_were_lost_are_told(copy: Path) -> None:
    os.truncate(copy / "metrics.jsonl", 5)
    with pytest.raises(UserError, match=r"metrics.jsonl: shorter than at the checkpoint \(0 of "):
        run.train(recipe(copy.parent), "")


def test_two_processes_cannot_write_one_run(copy: Path) -> None:
    with RunFolder(copy).lock(), pytest.raises(UserError, match="another run is writing here"):
        run.train(recipe(copy.parent), "")


# Faults on the way


def test_a_full_disk_ends_the_run_and_costs_no_checkpoint(
    copy: Path, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mmft.train.checkpoint._seal", full)
        with pytest.raises(UserError, match=r"step-3: cannot be written \(No space left on device\)"):
            run.train(recipe(copy.parent), "")
    assert saved(copy) == ["step-1", "step-2"]
    run.train(recipe(copy.parent), "")
    same(alone, copy)


def killing(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).parents[1] / "scripts" / "kill_and_resume.py"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, env=environment)


def check_killing(done: subprocess.CompletedProcess[str], kills: int) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"killed {kills} times and resumed: every bit as it is without" in done.stdout


def test_killed_at_every_kind_of_moment() -> None:
    check_killing(killing("--kills", "6", "--steps", "8"), 6)


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("algorithm.critic=adapter",)])
def test_killed_twenty_times(more: tuple[str, ...]) -> None:
    check_killing(killing("--kills", "20", "--seed", "1", *more), 20)
