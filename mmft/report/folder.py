"""The run folder: everything a run leaves behind, in files that survive a kill at any moment.

`metrics.jsonl` holds no wall-clock number, so that two runs with one seed leave equal bytes; times go to
`timing.jsonl`.
Appended files may end in a torn line after a kill, which the readers leave out; the others are replaced in one step.
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import re
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmft.report.lock import folder_lock
from mmft.types import RewardOutput, Row, UserError

RECIPE, METRICS, TIMING = "recipe.yaml", "metrics.jsonl", "timing.jsonl"
SAMPLES, EVAL, EVAL_SAMPLES = "samples.jsonl", "eval.json", "eval_samples.jsonl"
BEFORE, BAD_ROWS, DROPPED, WARM_UP = "before.json", "bad_rows.jsonl", "dropped.jsonl", "warm_up.jsonl"
DATA_CARD = "data_card.json"
CHECKPOINTS, ADAPTER, REWARD, PICTURES, REPORT = "checkpoints", "adapter", "reward", "pictures", "report.html"
# Any of these makes a folder a run that a new one must not mix with.
_MARKS = (RECIPE, METRICS, SAMPLES, EVAL, CHECKPOINTS, ADAPTER)
_APPENDED = (METRICS, TIMING, SAMPLES, DROPPED)
_APPENDING = threading.RLock()
# What trainers log of the clock, beside our own `time/...`.
_CLOCK = re.compile(r"time/|(train|eval)_runtime$|\w+_per_second$|eps$")


def read_json(path: Path) -> Any:
    """A JSON file, or None where there is none. Raises UserError for one that cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read ({error})") from error


class RunFolder:
    """One run's folder. `RunFolder.create` makes a new one, `RunFolder(path)` opens what is there."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._bad: set[str] = set()
        self._bad_size = 0
        if not self.path.is_dir():
            raise UserError(f"{self.path}: no such run folder")

    @classmethod
    def create(cls, root: str | Path, name: str, recipe: str | None = None) -> RunFolder:
        """Makes `root/name`, or `root/name-2`, `-3`, ... where a run is already there.

        recipe: its text, written in the same step, so that of two runs started at once each has a folder of its own.
        Writes and removes a probe, so that a full disk or a missing permission shows before a model loads.
        Raises UserError where the name is no folder name or nothing can be written.
        """
        if not name or name in (".", "..") or re.search(r"[/\\\0]", name):
            raise UserError(f"logging.name: {name!r} cannot be the name of a folder")
        for number in itertools.count(1):
            path = Path(root) / (name if number == 1 else f"{name}-{number}")
            with _writing(path):
                if not _claim(path):
                    continue
                with tempfile.TemporaryFile(dir=path) as probe:
                    probe.write(b"probe")
                    probe.flush()
                if recipe is not None:
                    try:
                        with open(path / RECIPE, "x", encoding="utf-8") as file:  # one of two creates it
                            file.write(recipe)
                    except FileExistsError:
                        continue
            return cls(path)
        raise AssertionError("unreachable: numbers do not run out")

    def __fspath__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    # -- writing -------------------------------------------------------------------------------------------------

    def write_recipe(self, text: str) -> None:
        """The resolved recipe, as YAML text."""
        self._replace(RECIPE, text)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends one step's metrics; those of the clock to `timing.jsonl`. Values are numbers or 0-d arrays."""
        numbers = {key: _finite(value) for key, value in metrics.items()}
        clock = {key: value for key, value in numbers.items() if _CLOCK.match(key)}
        rest = {key: value for key, value in numbers.items() if key not in clock}
        self._append(METRICS, [_in_order(step, rest)])
        if clock:
            self._append(TIMING, [_in_order(step, clock)])

    def write_samples(
        self,
        step: int,
        captions: Sequence[str],
        rows: Sequence[Row],
        output: RewardOutput,
        finished: Sequence[bool] | None = None,
    ) -> None:
        """Appends one line a sample with every reward term as measured, normalised and weighted."""
        ended: Sequence[bool | None] = [None] * len(captions) if finished is None else [bool(f) for f in finished]
        lines = []
        for i, (caption, row, end) in enumerate(zip(captions, rows, ended, strict=True)):
            lines.append(
                {
                    "step": int(step),
                    "id": row.id,
                    "prompt": row.prompt,
                    "caption": caption,
                    "references": list(row.references),
                    "finished": end,
                    "reward": _finite(output.total[i]),
                    "terms": _terms(output, i),
                }
            )
        self._append(SAMPLES, lines)

    def append_bad_row(self, row: Mapping[str, Any]) -> None:
        """A row that was left out: {"file", "row", "reason"}. Each is listed once, whoever found it."""
        path, key = self.path / BAD_ROWS, json.dumps(row, sort_keys=True)
        with _APPENDING:
            size = path.stat().st_size if path.is_file() else 0
            if size != self._bad_size:  # another process, or an earlier one of this run, has written
                self._bad = {json.dumps(known, sort_keys=True) for known in read_lines(path)}
            if key not in self._bad:
                self._append(BAD_ROWS, [row])
                self._bad.add(key)
            self._bad_size = path.stat().st_size

    def append_dropped(self, reason: str, row: Row, caption: str) -> None:
        """A caption that got no reward, and why."""
        self._append(DROPPED, [{"id": row.id, "reason": reason, "caption": caption}])

    def write_eval(self, record: Mapping[str, Any]) -> None:
        """Replaces `eval.json` in one step: a reader sees the old or the new one, never half."""
        self._replace(EVAL, json.dumps(clean(record), indent=2, allow_nan=False) + "\n")

    def write_lines(self, name: str, lines: Iterable[Mapping[str, Any]]) -> None:
        """Replaces a JSON-lines file in one step."""
        self._replace(name, "".join(_line(clean(line)) for line in lines))

    def write_text(self, name: str, text: str) -> Path:
        """Replaces a text file in one step."""
        return self._replace(name, text)

    def write_bytes(self, name: str, data: bytes) -> Path:
        """Replaces a file in one step."""
        path = self.path / name
        with _writing(path):
            write_atomic(path, data)
        return path

    # -- stopping and going on -----------------------------------------------------------------------------------

    def positions(self) -> dict[str, int]:
        """Sizes of the appended files, which are forced to disk: where a checkpoint stands in them."""
        found = {}
        for name in _APPENDED:
            path = self.path / name
            if path.is_file():
                with _writing(path), open(path, "rb") as file:
                    os.fsync(file.fileno())
                    found[name] = os.fstat(file.fileno()).st_size
        return found

    def rewind(self, positions: Mapping[str, int]) -> None:
        """Cuts the appended files back to where a checkpoint stood in them; removes those that it did not know.

        Raises UserError for a file that is shorter than it was then.
        """
        for name, size in positions.items():  # all of them, before the first is cut
            path = self.path / name
            there = path.stat().st_size if path.is_file() else 0
            if there < size:
                raise UserError(f"{path}: shorter than at the checkpoint ({there} of {size} bytes)")
        for name in _APPENDED:
            path, size = self.path / name, positions.get(name)
            with _writing(path):
                if size is None:
                    path.unlink(missing_ok=True)
                else:
                    os.truncate(path, size)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held while a run writes here: a second one is refused, as UserError. Cuts the lines that a killed run left
        half-written, or the next ones would be glued to them.
        """
        with folder_lock(self.path):
            for name in (*_APPENDED, BAD_ROWS):
                _cut_torn_line(self.path / name)
            yield

    @classmethod
    def last_run(cls, root: str | Path, name: str) -> RunFolder | None:
        """The newest of `root/name`, `root/name-2`, `-3`, ... that holds a run."""
        found = None
        for number in itertools.count(1):
            path = Path(root) / (name if number == 1 else f"{name}-{number}")
            if not path.is_dir():
                return found
            if (path / RECIPE).is_file():
                found = cls(path)
        raise AssertionError("unreachable: numbers do not run out")

    # -- reading -------------------------------------------------------------------------------------------------

    def metrics(self) -> list[dict[str, Any]]:
        return list(read_lines(self.path / METRICS))

    def last_step(self) -> dict[str, Any]:
        """The last line of metrics that a training step wrote; periodic evaluations write lines between."""
        return next((line for line in reversed(self.metrics()) if "objective/scores" in line), {})

    def timing(self) -> list[dict[str, Any]]:
        return list(read_lines(self.path / TIMING))

    def samples(self) -> Iterator[dict[str, Any]]:
        return read_lines(self.path / SAMPLES)

    def eval_samples(self) -> list[dict[str, Any]]:
        return list(read_lines(self.path / EVAL_SAMPLES))

    def evaluation(self) -> dict[str, Any] | None:
        """`eval.json`, or None before there is one."""
        return read_json(self.path / EVAL)

    def recipe_text(self) -> str | None:
        path = self.path / RECIPE
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None

    def _append(self, name: str, lines: Iterable[Mapping[str, Any]]) -> None:
        path, data = self.path / name, "".join(_line(line) for line in lines).encode()
        with _APPENDING, _writing(path), open(path, "ab", buffering=0) as file:
            start = file.tell()
            try:
                written = file.write(data)
                if written != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                os.truncate(path, start)  # no half a line in front of what is written when there is room again
                raise

    def _replace(self, name: str, text: str) -> Path:
        return self.write_bytes(name, text.encode("utf-8", "replace"))


def is_reward_folder(path: str | Path) -> bool:
    """Whether a folder is a reward model's: its config.json says so."""
    config = Path(path) / "config.json"
    try:
        return json.loads(config.read_text(encoding="utf-8")).get("model_type") == "caption_reward"
    except (OSError, ValueError, AttributeError):
        return False


def write_atomic(path: Path, data: bytes) -> None:
    """Writes beside the target, forces it to disk, then renames: a crash leaves the old file or the new one."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())  # mkstemp makes files that only their owner reads
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file; none where there is no file. A last line torn by a kill is left out."""
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                if not line.endswith("\n"):
                    return
                raise UserError(f"{path}: row {number}: not JSON ({error})") from error
            if isinstance(record, dict):
                yield record


def clean(value: Any) -> Any:
    """The value as strict JSON takes it: NaN and infinity become null, arrays' numbers become Python's."""
    if isinstance(value, Mapping):
        return {str(key): clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(item) for item in value]
    if value is None or isinstance(value, str):
        return value
    return _finite(value)


def _finite(value: Any) -> float | int | bool | None:
    """A number, or None where there is none: JSON has no NaN, and readers of it stop at one."""
    number = value.item() if hasattr(value, "item") else value
    if number is None or isinstance(number, (bool, int)):
        return number
    return float(number) if math.isfinite(number) else None


def _in_order(step: int, numbers: Mapping[str, Any]) -> dict[str, Any]:
    return {"step": int(step)} | {key: numbers[key] for key in sorted(numbers) if key != "step"}


def _terms(output: RewardOutput, i: int) -> dict[str, dict[str, Any]]:
    stages = {"raw": output.raw, "normalized": output.normalized, "weighted": output.weighted}
    return {
        name: {stage: _finite(values[name][i]) if name in values else None for stage, values in stages.items()}
        for name in output.raw
    }


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace").decode() + "\n"


def _claim(path: Path) -> bool:
    """Takes a folder that is new, or is there without a run in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.mkdir()
    except FileExistsError:
        return path.is_dir() and not any((path / mark).exists() for mark in _MARKS)
    return True


def _cut_torn_line(path: Path) -> None:
    if path.is_file():
        with _writing(path), open(path, "rb+") as file:
            size = end = file.seek(0, os.SEEK_END)
            while end:  # backwards in blocks: the file may be large
                start = max(0, end - 4096)
                file.seek(start)
                end = start + file.read(end - start).rfind(b"\n") + 1
                if end > start:
                    break
            if end < size:
                file.truncate(end)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot write ({error.strerror or error})") from error
