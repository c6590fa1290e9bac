"""What all benchmarks measure with: phase times, times of rollouts, peak memory, and a process for each run."""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}


def now(device: str) -> float:
    """Seconds, with nothing left running on the device."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class PhaseClock:
    """Seconds by phase. A phase inside another pauses it, so that phases add up to the time in any of them."""

    def __init__(self, device: str = "cpu"):
        self.device = device
        self.seconds: Counter[str] = Counter()
        self._open: list[str] = []
        self._since = 0.0

    def begin(self, name: str) -> None:
        self._charge()
        self._open.append(name)

    def end(self) -> None:
        self._charge()
        self._open.pop()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.begin(name)
        try:
            yield
        finally:
            self.end()

    def take(self) -> dict[str, float]:
        """What has been counted since the last call."""
        self._charge()
        taken, self.seconds = dict(self.seconds), Counter()
        return taken

    def _charge(self) -> None:
        moment = now(self.device)
        if self._open:
            self.seconds[self._open[-1]] += moment - self._since
        self._since = moment


class RolloutClock(TrainerCallback):
    """Seconds of each rollout with its updates, whichever trainer runs: one ends every `updates` of its steps.

    on_rollout, if given, is called at each end: what else is counted by rollout is taken there.
    """

    def __init__(self, updates: int, device: str = "cpu", on_rollout: Callable[[], None] | None = None):
        self.updates, self.device, self.on_rollout = updates, device, on_rollout
        self.seconds: list[float] = []
        self.loaded_bytes = 0
        self._steps = 0
        self._since = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.loaded_bytes = memory_in_use(self.device)
        self._since = now(self.device)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._steps += 1
        if self._steps % self.updates:
            return
        moment = now(self.device)
        self.seconds.append(moment - self._since)
        self._since = moment
        if self.on_rollout is not None:
            self.on_rollout()


def _status(key: str) -> int:
    """A line of the kernel's account of this process, in bytes; 0 where there is none."""
    file = Path("/proc/self/status")
    lines = file.read_text(encoding="ascii").splitlines() if file.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)


def memory_in_use(device: str = "cpu") -> int:
    """Bytes: allocated on the GPU, else resident in memory."""
    return torch.cuda.memory_allocated() if device == "cuda" else _status("VmRSS")


def peak_memory(device: str = "cpu") -> int:
    """Most bytes at once since the process began or since `reset_peak`."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    scale = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def reset_peak(device: str = "cpu") -> bool:
    """Lets `peak_memory` start anew from what is in use. False where the system cannot: the peak stays the whole
    run's.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def pick_device(wanted: str) -> str:
    """`auto`: the GPU where there is one."""
    if wanted != "auto":
        return wanted
    return "cuda" if torch.cuda.is_available() else "cpu"


def run_child(script: str, spec: dict[str, Any], environment: dict[str, str] | None = None) -> dict[str, Any]:
    """What `child(spec)` of a script beside this one returns, run in a process of its own: a contender's memory and
    caches are its own. Raises RuntimeError with the last lines of its output where it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, str(Path(__file__).with_name(script)), "--child", json.dumps(spec), str(result)]
        done = subprocess.run(
            command, env=os.environ | OFFLINE | (environment or {}), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, check=False,
        )  # fmt: skip
        if done.returncode or not result.is_file():
            last = "\n".join(done.stdout.splitlines()[-25:])
            raise RuntimeError(f"{script} {json.dumps(spec)} ended with status {done.returncode}:\n{last}")
        return json.loads(result.read_text(encoding="utf-8"))


def command(
    parser: Callable[[], argparse.ArgumentParser],
    collect: Callable[[argparse.Namespace], dict[str, Any]],
    show: Callable[[dict[str, Any]], str],
    child: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> int:
    """`main` of every benchmark: answers `run_child`, or collects results, shows them as Markdown, and writes them as
    JSON.
    """
    if child is not None and answered(child):
        return 0
    arguments = with_json(parser()).parse_args()
    results = collect(arguments)
    print(show(results))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    return 0


def answered(child: Callable[[dict[str, Any]], dict[str, Any]]) -> bool:
    """The other end of `run_child`: runs the child where this process is one."""
    if len(sys.argv) != 4 or sys.argv[1] != "--child":
        return False
    result = child(json.loads(sys.argv[2]))
    Path(sys.argv[3]).write_text(json.dumps(result), encoding="utf-8")
    return True


def with_json(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured here")
    return parser


def documented(text: str | None) -> argparse.ArgumentParser:
    """A parser whose help opens with a module's docstring and ends each option with its default."""

    class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        pass

    return argparse.ArgumentParser(description=text, formatter_class=Formatter)


def say(text: str) -> None:
    """Progress, apart from the report."""
    print(text, file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    """Where numbers were measured, in words that two reports can be compared by."""
    cpu = next(
        (line.split(":", 1)[1].strip() for line in _cpu_lines() if line.startswith("model name")), "unknown processor"
    )
    found = {"processor": cpu, "threads": torch.get_num_threads(), "torch": torch.__version__}
    return found | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def _cpu_lines() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
