"""Checkpoints on disk: whole or absent, and never trusted unseen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmft.train import checkpoint
from mmft.train.checkpoint import (
    MANIFEST,
    check_checkpoint,
    newest_checkpoint,
    remove_checkpoint,
    steps_of,
    thin_out,
    write_checkpoint,
)
from mmft.types import UserError

FULL = """
import resource, signal, sys
from pathlib import Path
from mmft.train.checkpoint import write_checkpoint
from mmft.types import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
def fill(folder):
    (folder / "small").write_bytes(b"x")
    (folder / "large").write_bytes(b"x" * 20_000)
try:
    write_checkpoint(Path(sys.argv[1]), fill)
except UserError as error:
    print(error)
"""


def fill(folder: Path, text: str = "one") -> None:
    (folder / "adapter").mkdir()
    (folder / "adapter" / "weights").write_bytes(text.encode() * 100)
    (folder / "state.json").write_text(json.dumps({"text": text}), encoding="utf-8")


def make(root: Path, *steps: int) -> list[Path]:
    return [write_checkpoint(root / f"step-{step}", lambda folder, s=step: fill(folder, f"of {s}")) for step in steps]


def test_what_was_written_is_whole(tmp_path: Path) -> None:
    (folder,) = make(tmp_path / "checkpoints", 3)
    check_checkpoint(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", MANIFEST, "state.json"]
    assert [path.name for path in folder.parent.iterdir()] == ["step-3"], "nothing is left beside it"
    listed = json.loads((folder / MANIFEST).read_text())["files"]
    assert listed.keys() == {"adapter/weights", "state.json"} and listed["adapter/weights"]["bytes"] == 400


def test_every_file_is_forced_to_disk_before_the_name_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noting(handle: int) -> None:
        seen.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noting)
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append("renamed"), replace(a, b)))
    make(tmp_path / "checkpoints", 3)
    *before, renamed, last = seen
    assert (renamed, last) == ("renamed", "checkpoints")
    assert set(before) == {"weights", "state.json", MANIFEST, "adapter", ".step-3.new"}


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda f: (f / "adapter" / "weights").unlink(), "adapter/weights: missing from the checkpoint"),
        (lambda f: os.truncate(f / "adapter" / "weights", 10), "adapter/weights: altered or damaged"),
        (lambda f: (f / "state.json").write_bytes((f / "state.json").read_bytes()[::-1]), "state.json: altered"),
        (lambda f: (f / MANIFEST).unlink(), "no manifest.json: not a checkpoint, or not a whole one"),
        (lambda f: (f / MANIFEST).write_text("{"), "manifest.json: cannot be read"),
        (lambda f: (f / MANIFEST).write_text("[]"), "manifest.json: cannot be read"),
        (lambda f: (f / MANIFEST).write_text('{"files": {"state.json": 3}}'), "manifest.json: cannot be read"),
        (lambda f: (f / MANIFEST).write_text('{"files": [1]}'), "manifest.json: cannot be read"),
    ],
)  # fmt: skip
def test_a_damaged_one_is_named_and_the_one_before_is_used(tmp_path: Path, damage: object, named: str) -> None:
    root = tmp_path / "checkpoints"
    *_, nine, ten = make(root, 2, 9, 10)
    damage(ten)  # type: ignore[operator]
    with pytest.raises(UserError, match=f"step-10.*{named}"):
        check_checkpoint(ten)
    found, problems = newest_checkpoint(root)
    assert found == nine and len(problems) == 1 and str(ten) in problems[0]


def test_none_is_whole(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "nowhere") == (None, [])
    (folder,) = make(tmp_path, 1)
    (folder / "state.json").unlink()
    found, problems = newest_checkpoint(tmp_path)
    assert found is None and len(problems) == 1


def test_steps_are_numbers(tmp_path: Path) -> None:
    make(tmp_path, 10, 9, 100)
    for other in ("step-x", "step-", "best", ".step-7.new", "step-8.old"):
        (tmp_path / other).mkdir()
    assert list(steps_of(tmp_path)) == [9, 10, 100]


def test_the_newest_are_kept_and_leftovers_go(tmp_path: Path) -> None:
    make(tmp_path, 1, 2, 3, 10)
    for leftover in (".step-4.new", ".step-1.old"):
        (tmp_path / leftover).mkdir()
    (tmp_path / "best").mkdir()
    thin_out(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "step-10", "step-3"]


def test_a_second_one_of_a_step_replaces_the_first(tmp_path: Path) -> None:
    make(tmp_path, 1)
    write_checkpoint(tmp_path / "step-1", lambda folder: fill(folder, "new"))
    check_checkpoint(tmp_path / "step-1")
    assert json.loads((tmp_path / "step-1" / "state.json").read_text()) == {"text": "new"}


@pytest.mark.parametrize("error", [KeyError("a bug"), OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_one(tmp_path: Path, error: BaseException) -> None:
    (folder,) = make(tmp_path, 1)

    def fails(aside: Path) -> None:
        fill(aside, "new")
        raise error

    said = r"step-1: cannot be written \(No space left on device\); earlier checkpoints are as they were"
    full = isinstance(error, OSError)
    with pytest.raises(UserError if full else type(error), match=said if full else None):
        write_checkpoint(folder, fails)
    check_checkpoint(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_a_full_disk_leaves_the_last_good_one(tmp_path: Path) -> None:
    make(tmp_path, 1)
    command = [sys.executable, "-c", FULL, str(tmp_path / "step-2")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    wanted = "cannot be written (File too large); earlier checkpoints are as they were"
    assert said.strip() == f"{tmp_path / 'step-2'}: {wanted}"
    assert newest_checkpoint(tmp_path) == (tmp_path / "step-1", [])
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_no_part_of_one_ever_bears_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever a removal ends early, what is left is not taken for a checkpoint."""
    (folder,) = make(tmp_path, 1)

    def killed(path: Path) -> None:
        if path.exists():
            (path / "state.json").unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_remove", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_checkpoint(folder)
    assert newest_checkpoint(tmp_path) == (None, [])
