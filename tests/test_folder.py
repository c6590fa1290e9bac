"""One run a folder, files that go back to where a checkpoint stood, and disks that are full."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmft.report import lock
from mmft.report.folder import RunFolder, read_lines
from mmft.types import UserError

HOLDER = """
import sys, time
from mmft.report.folder import RunFolder
with RunFolder(sys.argv[1]).lock():
    print("held", flush=True)
    time.sleep(600)
"""
STARTER = """
import sys
from mmft.report.folder import RunFolder
print("ready", flush=True)
sys.stdin.readline()
run = RunFolder.create(sys.argv[1], "a", "name: a\\n")
with run.lock():
    print(run.path.name, flush=True)
    sys.stdin.readline()
"""
# A disk of 4096 bytes a file.
SMALL = """
import resource, signal, sys
from mmft.report.folder import RunFolder
from mmft.types import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
run = RunFolder(sys.argv[1])
step = 0
try:
    while step < 10_000:
        step += 1
        run.log(step, {"objective/scores": 0.123456789})
except UserError as error:
    print(error)
try:
    run.write_eval({"x": "y" * 9000})
except UserError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
run.log(step, {"objective/scores": 1.0})
print(step)
"""


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path, "a")


@pytest.fixture
def python(repository: Path) -> Callable[..., subprocess.Popen[str]]:
    def start(code: str, *arguments: str | Path) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": str(repository)}
        return subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    return start


def bad(row: int) -> dict[str, Any]:
    return {"file": "metadata.jsonl", "row": row, "reason": "no picture"}


def test_a_second_run_is_refused_until_the_first_is_killed(
    run: RunFolder, python: Callable[..., subprocess.Popen[str]]
) -> None:
    with python(HOLDER, run.path) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(UserError) as refused, run.lock():
            pass
        said = f"{run.path}: another run is writing here (process {holder.pid} on "
        assert str(refused.value).startswith(said) and str(refused.value).endswith("wait for it, or set logging.name")
        holder.kill()
    with run.lock():  # though the killed one left its file
        assert f"process {os.getpid()} on" in (run / lock.LOCK).read_text()
    assert not (run / lock.LOCK).exists()


def test_an_error_within_lets_go(run: RunFolder) -> None:
    with pytest.raises(RuntimeError), run.lock():
        raise RuntimeError
    assert not (run / lock.LOCK).exists()
    with run.lock(), pytest.raises(UserError, match="another run"), run.lock():
        pass


def test_a_folder_that_is_gone_when_the_lock_ends(run: RunFolder) -> None:
    with run.lock():
        (run / lock.LOCK).unlink()
        run.path.rmdir()


@pytest.mark.skipif(lock.fcntl is None, reason="no flock here")
def test_the_lock_of_a_run_that_ends_meanwhile_is_not_taken_for_ours(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening and locking the file, its owner ends, deletes it, and another run makes it anew."""
    flock, path, tries = lock.fcntl.flock, run / lock.LOCK, []

    def late(handle: int, how: int) -> None:
        if not tries:
            path.unlink()
        tries.append(handle)
        flock(handle, how)

    monkeypatch.setattr(lock.fcntl, "flock", late)
    with run.lock():
        assert len(tries) == 2 and path.exists()


def test_without_flock_the_file_is_the_lock(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "fcntl", None)
    with run.lock(), pytest.raises(UserError, match=r"process \d+ on .*, or delete .*run\.lock"), run.lock():
        pass
    with run.lock():
        pass
    assert not (run / lock.LOCK).exists()


def test_a_disk_without_locks_is_one_line(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with pytest.raises(UserError, match=r"run\.lock: cannot lock \(No locks available\)"), run.lock():
        pass


def test_runs_started_at_once_have_folders_of_their_own(
    tmp_path: Path, python: Callable[..., subprocess.Popen[str]]
) -> None:
    runs = [python(STARTER, tmp_path) for _ in range(3)]
    assert [one.stdout.readline() for one in runs if one.stdout] == ["ready\n"] * 3
    for one in runs:
        assert one.stdin is not None
        one.stdin.write("go\n")
        one.stdin.flush()
    names = sorted(one.stdout.readline().strip() for one in runs if one.stdout)
    for one in runs:
        one.communicate("end\n")
    assert names == ["a", "a-2", "a-3"]
    assert all((tmp_path / name / "recipe.yaml").read_text() == "name: a\n" for name in names)


def test_another_run_comes_between_looking_and_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmft.report.folder._MARKS", ())  # as if the other's recipe were not yet there when we looked
    assert [RunFolder.create(tmp_path, "a", "x").path.name for _ in range(3)] == ["a", "a-2", "a-3"]


def test_the_newest_run_of_a_name(tmp_path: Path) -> None:
    assert RunFolder.last_run(tmp_path, "a") is None
    for _ in range(2):
        RunFolder.create(tmp_path, "a", "name: a\n")
    (tmp_path / "a-3").mkdir()  # holds no run
    RunFolder.create(tmp_path, "a-b", "name: other\n")
    found = RunFolder.last_run(tmp_path, "a")
    assert found is not None and found.path.name == "a-2"


def test_appended_files_go_back_to_a_checkpoint(run: RunFolder) -> None:
    run.log(1, {"x": 1.0})
    positions = run.positions()
    assert positions == {"metrics.jsonl": (run / "metrics.jsonl").stat().st_size}
    run.append_bad_row(bad(1))
    run.log(2, {"x": 2.0, "time/step": 1.0})
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "x"')
    run.rewind(positions)
    assert run.metrics() == [{"step": 1, "x": 1.0}] and not (run / "timing.jsonl").exists()
    assert list(read_lines(run / "bad_rows.jsonl")) == [bad(1)], "what is known of the data stays known"
    run.log(2, {"x": 4.0})
    assert [line["x"] for line in run.metrics()] == [1.0, 4.0]
    run.rewind({})
    assert run.metrics() == []


def test_a_file_shorter_than_at_the_checkpoint_stops_before_any_is_cut(run: RunFolder) -> None:
    run.log(1, {"x": 1.0, "time/step": 1.0})
    positions = run.positions()
    run.log(2, {"x": 1.0})
    os.truncate(run / "timing.jsonl", 3)
    with pytest.raises(UserError, match=r"timing\.jsonl: shorter than at the checkpoint \(3 of \d+ bytes\)"):
        run.rewind(positions)
    assert len(run.metrics()) == 2
    (run / "timing.jsonl").unlink()
    with pytest.raises(UserError, match=r"\(0 of"):
        run.rewind(positions)


def test_positions_are_on_disk(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    run.log(1, {"x": 1.0, "time/step": 1.0})
    synced: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(os.fstat(handle).st_ino), fsync(handle)))
    assert len(run.positions()) == len(synced) == 2
    assert set(synced) == {(run / name).stat().st_ino for name in ("metrics.jsonl", "timing.jsonl")}


def test_each_bad_row_is_listed_once_whoever_finds_it(run: RunFolder) -> None:
    def find() -> None:
        for row in range(20):
            run.append_bad_row(bad(row))

    threads = [threading.Thread(target=find) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    RunFolder(run.path).append_bad_row(bad(3))  # another process, or the same run resumed
    RunFolder(run.path).append_bad_row(bad(20))
    run.append_bad_row(bad(20))
    assert sorted(line["row"] for line in read_lines(run / "bad_rows.jsonl")) == list(range(21))


@pytest.mark.parametrize("torn", ['{"file": "metadata.jsonl", "ro', '{"reason": "' + "é" * 9000, ""])
@pytest.mark.parametrize("before", [0, 2])
def test_a_line_that_a_killed_run_left_half_written_is_cut(run: RunFolder, before: int, torn: str) -> None:
    for row in range(before):
        run.append_bad_row(bad(row))
    with open(run / "bad_rows.jsonl", "a", encoding="utf-8") as file:
        file.write(torn)
    resumed = RunFolder(run.path)
    with resumed.lock():
        resumed.append_bad_row(bad(7))
    assert [line["row"] for line in read_lines(run / "bad_rows.jsonl")] == [*range(before), 7]


def test_a_full_disk_leaves_whole_lines_and_one_line_of_words(
    run: RunFolder, python: Callable[..., subprocess.Popen[str]]
) -> None:
    with python(SMALL, run.path) as process:
        appended, replaced, step = process.communicate()[0].splitlines()
    assert appended == f"{run / 'metrics.jsonl'}: cannot write (No space left on device)"  # part of a line fitted
    assert replaced == f"{run / 'eval.json'}: cannot write (File too large)"
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, int(step) + 1)), "it went on with room again"
    assert len(lines) > 50 and {path.name for path in run.path.iterdir()} == {"metrics.jsonl"}


def test_bytes_are_replaced_in_one_step(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run.write_bytes("batch", b"old").read_bytes() == b"old"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"batch: cannot write \(No space left on device\)"):
        run.write_bytes("batch", b"new")
    assert (run / "batch").read_bytes() == b"old" and len(list(run.path.iterdir())) == 1
