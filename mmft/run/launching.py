"""`accelerate: NAME` in a recipe: the same command again, in the processes that an accelerate config describes.

accelerate reads the config and prepares the environment; torch's launcher starts the processes, on processors too,
where accelerate would ask for MPI.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmft.config.load import recipe_folders
from mmft.types import UserError

FOLDER = "accelerate"
ERRORS = "MMFT_ERRORS"  # a folder where launched processes leave what they would print N times


def configs() -> dict[str, Path]:
    """Name -> file of the accelerate configs at hand."""
    found: dict[str, Path] = {}
    for folder in recipe_folders():
        for path in sorted((folder / FOLDER).glob("*.yaml")):
            found.setdefault(path.stem, path)
    return found


def find_config(name: str) -> Path:
    """A config by name or path. Raises UserError with the nearest name where there is none."""
    known = configs()
    path = known.get(name, Path(name))
    if not path.is_file():
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise UserError(f"accelerate: no config {name!r}; {hint}")
    return path


def launch_arguments(path: Path, command: Sequence[str]) -> Any:
    """accelerate's own reading of a config, for `mmft COMMAND`. Raises UserError for one that it refuses."""
    import yaml
    from accelerate.commands import launch
    from accelerate.commands.config.config_args import load_config_from_file

    try:
        on_cpu = load_config_from_file(str(path)).use_cpu
        given = [*(["--cpu"] if on_cpu else []), "--config_file", str(path), "-m", "mmft", *command]
        checked, defaults, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(given))
    except (yaml.YAMLError, ValueError, TypeError, KeyError, ImportError, AttributeError) as error:
        raise UserError(f"accelerate: {path}: {str(error).splitlines()[0]}") from error
    if checked.use_deepspeed:  # accelerate looks for contradictions between these and a DeepSpeed config file
        checked.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    if not checked.cpu:
        checked.num_processes = _devices(path)
        checked.multi_gpu = checked.num_processes > 1 and not (checked.use_fsdp or checked.use_deepspeed)
    return checked


def _devices(path: Path) -> int:
    import torch

    if not torch.cuda.is_available():
        raise UserError(f"accelerate: {path.stem} needs a GPU, and there is none here; ddp_cpu needs none")
    return torch.cuda.device_count()


def launch(name: str, command: Sequence[str]) -> int:
    """Runs `mmft COMMAND` in several processes; returns its exit status: that of the process that failed first."""
    arguments = launch_arguments(find_config(name), command)
    if arguments.use_deepspeed and importlib.util.find_spec("deepspeed") is None:
        raise UserError(f"accelerate: {name}: DeepSpeed is not installed: pip install deepspeed, or use fsdp2")
    for noisy in ("torch.distributed.elastic", "torch.distributed.run", "torch.distributed.launcher"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as errors:
        cores = (os.cpu_count() or 1) // max(1, arguments.num_processes)
        os.environ |= {ERRORS: errors, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores)))}
        if arguments.cpu:
            os.environ |= {"ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu"}
        status = _run(arguments)
        said = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(Path(errors).glob("*.json"))]
    for line in dict.fromkeys(said):
        print(line, flush=True, file=sys.stderr)
    return status


def _run(arguments: Any) -> int:
    from accelerate.commands import launch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        (launch.deepspeed_launcher if arguments.use_deepspeed else launch.multi_gpu_launcher)(arguments)
    except ChildFailedError as error:
        first = min(error.failures.values(), key=lambda failure: failure.timestamp)
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    except SignalException as error:
        return 128 + int(error.sigval)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def leave_error(line: str) -> bool:
    """Leaves an error for the launcher to print once; False where no launcher of ours waits for it."""
    folder = os.environ.get(ERRORS)
    if folder is None:
        return False
    rank = os.environ.get("RANK", "0")
    (Path(folder) / f"{int(rank):06}.json").write_text(json.dumps(line), encoding="utf-8")
    return True
