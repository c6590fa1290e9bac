"""All benchmarks, one after another, as the Markdown of docs/performance.md.

python scripts/bench                                                  # an idle machine; most of an hour
python scripts/bench --json runs/bench/all.json
python scripts/bench --only vision_ppo vocabulary_memory --steps 1
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import roofline
import text_ppo
import vision_ppo
import vocabulary_memory
from checkpoint import PRESETS
from measuring import command, documented, say

PARTS = ("roofline", "vision_ppo", "same_pictures", "sweep", "text_ppo", "vocabulary_memory")


def parser() -> argparse.ArgumentParser:
    options = documented(__doc__)
    options.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="which of them")
    options.add_argument("--preset", choices=PRESETS, default="256m", help="shape of the vision-language model")
    options.add_argument("--folder", type=Path, default=Path("runs/bench"), help="where checkpoints are kept")
    options.add_argument("--steps", type=int, default=3, help="rollouts that count in each run")
    options.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run")
    return options


def command_lines(arguments: argparse.Namespace) -> dict[str, tuple[Any, list[str]]]:
    """(module, its arguments) of each part."""
    device = ["--device", arguments.device]
    steps = [*device, "--steps", str(arguments.steps)]
    vision = [*steps, "--preset", arguments.preset, "--folder", str(arguments.folder)]
    return {
        "roofline": (roofline, [*device, "--preset", arguments.preset]),
        "vision_ppo": (vision_ppo, vision),
        "same_pictures": (vision_ppo, [*vision, "--contenders", "mmft", "--same-pictures"]),
        "sweep": (vision_ppo, [*vision, "--sweep"]),
        "text_ppo": (text_ppo, steps),
        "vocabulary_memory": (vocabulary_memory, device),
    }


def collect(arguments: argparse.Namespace) -> dict[str, Any]:
    results = {}
    for name, (module, line) in command_lines(arguments).items():
        if name in arguments.only:
            say(f"{name}: {' '.join(line)}")
            results[name] = module.collect(module.parser().parse_args(line))
    return results


def show(results: dict[str, Any]) -> str:
    modules = {"same_pictures": vision_ppo, "sweep": vision_ppo}
    shown = [(name, modules.get(name) or sys.modules[name]) for name in results]
    return "\n\n".join(f"## {name}\n\n{module.show(results[name])}" for name, module in shown)


if __name__ == "__main__":
    sys.exit(command(parser, collect, show))
