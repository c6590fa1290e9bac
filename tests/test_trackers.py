"""Trackers: what they are given, that nothing is overwritten, and that a run outlives them."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import TrainerCallback

from mmft.report import trackers
from mmft.report.folder import RunFolder
from mmft.report.trackers import LIMIT, Tracker, check_trackers, open_trackers, thumbnail
from mmft.types import RewardOutput, Row, UserError

OUTPUT = RewardOutput([0.5, -1.0], {"bleu": [0.25, 0.0]}, {"bleu": [0.25, 0.0]}, {"bleu": [0.5, 0.0]})
ROWS = [
    Row("a", Image.new("RGB", (400, 100), "red"), "Describe | it.", ("a red <b>bar</b>", "a bar")),
    Row("b", None, "Say."),
]


def fake(name: str, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A stand-in for wandb or trackio that remembers what it was given."""
    logged: list[dict[str, Any]] = []
    module: Any = types.ModuleType(name)
    module.log, module.Image = logged.append, lambda picture: ("image", picture.size)
    module.Table = lambda columns, data: {"columns": columns, "data": data}
    monkeypatch.setitem(sys.modules, name, module)
    return logged


def callback(name: str, **methods: Any) -> Any:
    return type(name, (TrainerCallback,), methods)()


@pytest.mark.parametrize(
    ("kind", "module", "keys"),
    [
        ("WandbCallback", "wandb", ["samples/step-3", "samples/step-7"]),
        ("TrackioCallback", "trackio", ["samples", "samples"]),
    ],
)
def test_tables_stand_beside_each_other(
    kind: str, module: str, keys: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged = fake(module, monkeypatch)
    tracker = Tracker(callback(kind), RunFolder(tmp_path))
    for step in (3, 7):
        tracker.log_samples(step, ["a bar", "hm"], ROWS, OUTPUT)
    assert [key for entry in logged for key in entry] == keys
    table = logged[0][keys[0]]
    assert table["columns"] == ["picture", "prompt", "caption", "references", "reward", "bleu"]
    assert table["data"][0] == [("image", (192, 192)), "Describe | it.", "a bar", "a red <b>bar</b> | a bar", 0.5, 0.25]
    assert table["data"][1][0] is None


def test_thumbnails_keep_their_shape() -> None:
    small = thumbnail(ROWS[0])
    assert small is not None and small.size == (192, 192)
    assert small.getpixel((96, 96)) == (255, 0, 0) and small.getpixel((96, 60)) == (255, 255, 255)
    assert thumbnail(ROWS[1]) is None


def test_a_tracker_that_fails_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[str] = []

    def on_log(self: Any, *args: Any, **kwargs: Any) -> None:
        calls.append("log")
        raise ConnectionError("the network is gone\nand so on")

    tracker = Tracker(callback("WandbCallback", on_log=on_log), RunFolder(tmp_path))
    state = types.SimpleNamespace(is_world_process_zero=True, global_step=1)
    for _ in range(3):
        tracker.on_log(None, state, None, logs={"loss": 1.0})
    tracker.log_samples(1, ["x", "y"], ROWS, OUTPUT)
    assert calls == ["log"]
    said = " ".join(capsys.readouterr().err.split())
    assert said == "warning Wandb is left out from here on (ConnectionError: the network is gone)"


def test_logs_are_given_as_copies(tmp_path: Path) -> None:
    seen: list[Any] = []
    tracker = Tracker(callback("X", on_log=lambda self, *a, logs, **k: seen.append(logs)), RunFolder(tmp_path))
    logs = {"loss": 1.0}
    tracker.on_log(None, None, None, logs=logs)
    assert seen == [logs] and seen[0] is not logs


def test_a_resumed_run_keeps_its_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "get_reporting_integration_callbacks", lambda names: [TrainerCallback])
    monkeypatch.setattr(trackers.os, "environ", {})
    run = RunFolder(tmp_path)
    assert open_trackers([], run, 0) == [] and not (tmp_path / "tracker.json").exists()
    open_trackers(["wandb"], run, 0)
    first = dict(trackers.os.environ)
    open_trackers(["wandb"], run, 50)
    assert trackers.os.environ == first and first["WANDB_RESUME"] == "allow" and first["WANDB_DIR"] == str(tmp_path)
    assert json.loads((tmp_path / "tracker.json").read_text())["id"] == first["WANDB_RUN_ID"]


def test_what_cannot_be_tracked_is_said_before_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"logging\.report_to: .*nonsense"):
        check_trackers(["nonsense"])
    module: Any = types.ModuleType("wandb")
    module.api = types.SimpleNamespace(api_key=None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    wandb = type("WandbCallback", (TrainerCallback,), {})
    monkeypatch.setattr(trackers, "get_reporting_integration_callbacks", lambda names: [wandb])
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(UserError, match="wandb knows no API key"):
        check_trackers(["wandb"])
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(["wandb"])


def test_tensorboard_keeps_every_step(tmp_path: Path) -> None:
    """The real one, in a process of its own; a resumed run's steps take the place of those it repeats."""
    pytest.importorskip("tensorboard")
    code = f"""
from mmft.report.folder import RunFolder
from mmft.report.trackers import open_trackers
from tests.test_trackers import OUTPUT, ROWS
run = RunFolder({str(tmp_path)!r})
for step in (0, 2):
    (tracker,) = open_trackers(["tensorboard"], run, step)
    for s in range(step + 1, 4):
        tracker.log_samples(s, ["a bar", "hm"], ROWS, OUTPUT)
        tracker.writer.add_scalar("reward", s + step / 10, s)
    tracker.on_train_end(None, None, None)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
found = EventAccumulator({str(tmp_path / "tensorboard")!r}); found.Reload()
print([(e.step, round(e.value, 1)) for e in found.Scalars("reward")], [e.step for e in found.Images("samples")])
"""
    here = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True)
    assert done.stdout.split("\n")[0].startswith("[(1, 1.0), (2, 2.0), (3, 3.2)] [1, 2, 3"), done.stdout + done.stderr


def test_only_so_many_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged = fake("trackio", monkeypatch)
    many = RewardOutput([0.0] * 40, {"t": [0.0] * 40})
    Tracker(callback("TrackioCallback"), RunFolder(tmp_path)).log_samples(1, ["x"] * 40, [ROWS[1]] * 40, many)
    assert len(logged[0]["samples"]["data"]) == LIMIT
