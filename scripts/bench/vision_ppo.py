"""mmft's PPO beside TRL's GRPO on one vision-language model: samples a second, peak memory, time by phase.

    python scripts/bench/vision_ppo.py                            # SmolVLM-256M's shape; leave the machine idle
    python scripts/bench/vision_ppo.py --preset tiny --steps 1    # a minute: does it run?
    python scripts/bench/vision_ppo.py --sweep                    # how mmft's cost grows

A rollout is 2 pictures x 4 samples of 32 tokens; LoRA r = 16 on q and v of the language model; the KL to the
reference is in both. Every contender runs in a process of its own, one after another, a rollout to warm up first.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median
from typing import Any

from checkpoint import PRESETS, Shape, build, prompt_tokens
from measuring import command, documented, pick_device, run_child, say
from roofline import NEEDED, Way, Work, by_timed_phase, describe, measure, step_flops, vision
from tables import markdown, memory, percent, seconds, times

CONTENDERS = ("mmft", "mmft-no-share-prompts", "trl")
PHASES = ("encode", "sample", "score", "reference", "reward", "update", "other")
SWEEP = {"pictures": (1, 2, 4), "new": (16, 32, 64), "group": (2, 4, 8), "updates": (1, 2, 4, 8)}


def parser() -> argparse.ArgumentParser:
    options = documented(__doc__)
    options.add_argument("--preset", choices=PRESETS, default="256m", help="shape of the model")
    options.add_argument("--folder", type=Path, default=Path("runs/bench"), help="where checkpoints are kept")
    options.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="who runs")
    options.add_argument("--updates", nargs="+", type=int, default=[1, 4], help="updates a rollout")
    options.add_argument("--pictures", type=int, default=2, help="pictures a rollout")
    options.add_argument("--group", type=int, default=4, help="samples of each picture")
    options.add_argument("--new", type=int, default=32, help="tokens of each sample")
    options.add_argument("--rank", type=int, default=16, help="of the adapters")
    options.add_argument("--beta", type=float, default=0.05, help="weight of the KL term")
    options.add_argument("--steps", type=int, default=3, help="rollouts that count, after one that warms up")
    options.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run")
    options.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the frozen weights")
    options.add_argument("--same-pictures", action="store_true", help="every rollout has the first one's pictures")
    options.add_argument("--sweep", action="store_true", help="mmft alone, at more pictures, tokens, samples, updates")
    return options


def collect(arguments: argparse.Namespace) -> dict[str, Any]:
    shape, device = PRESETS[arguments.preset], pick_device(arguments.device)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    path = build(shape, arguments.folder)
    base = {
        "path": str(path), "side": shape.picture_side, "pictures": arguments.pictures, "group": arguments.group,
        "new": arguments.new, "r": arguments.rank, "beta": arguments.beta, "steps": arguments.steps,
        "same_pictures": arguments.same_pictures, "device": device, "dtype": arguments.dtype,
    }  # fmt: skip
    say("measuring the machine")
    found = {"preset": arguments.preset, "shape": asdict(shape), "machine": measure(device)}
    found["prompt"] = _prompt_tokens(path, shape)
    if arguments.sweep:
        standard = base | {"contender": "mmft", "updates": arguments.updates[0]}
        return found | {"standard": standard, "sweep": sweep(standard)}
    specs = [base | {"contender": c, "updates": u} for u in arguments.updates for c in arguments.contenders]
    return found | {"runs": [run(spec) for spec in specs]}


def _prompt_tokens(path: Path, shape: Shape) -> int:
    from transformers import AutoProcessor

    return prompt_tokens(AutoProcessor.from_pretrained(path), shape.picture_side)


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """One contender in a process of its own."""
    say(", ".join(f"{name} {spec[name]}" for name in ("contender", "updates", "pictures", "group", "new")))
    return run_child("vision_contenders.py", spec)


def sweep(standard: dict[str, Any]) -> list[dict[str, Any]]:
    """The standard work with one thing changed at a time; equal work runs once."""
    done: dict[tuple[int, ...], dict[str, Any]] = {}
    for name, values in SWEEP.items():
        for value in values:
            spec = standard | {name: value}
            key = tuple(spec[n] for n in SWEEP)
            if key not in done:
                done[key] = run(spec)
    return list(done.values())


def work_of(result: dict[str, Any], prompt: int) -> Work:
    spec = result["spec"]
    return Work(spec["pictures"], spec["group"], prompt, spec["new"], spec["updates"], spec["r"])


def rate(result: dict[str, Any]) -> float:
    """Samples a second, by the median rollout."""
    return result["spec"]["pictures"] * result["spec"]["group"] / median(result["seconds"])


def phase_seconds(result: dict[str, Any]) -> dict[str, float]:
    """Mean seconds by phase; `other` is what no phase accounts for."""
    names = {name for phases in result["phases"] for name in phases}
    means = {name: fmean(phases.get(name, 0.0) for phases in result["phases"]) for name in names}
    known = {name: value for name, value in means.items() if name in PHASES}
    return known | {"other": max(0.0, fmean(result["seconds"]) - sum(known.values()))}


def performed_flops(shape: Shape, result: dict[str, Any], prompt: int) -> dict[str, int]:
    """What the contender computed, by timed phase; pictures encoded and a pass for old log-probabilities as seen."""
    ours = result["spec"]["contender"] != "trl"
    scored = any(phases.get("score", 0.0) > 0 for phases in result["phases"])
    way = Way(True, share_prefill=ours, share_prompts=result["share_prompts"], score=scored, keep_graph=ours)
    flops = by_timed_phase(step_flops(shape, work_of(result, prompt), way))
    return flops | {"encode": vision(shape, round(median(result["pictures_encoded"])))}


def shares_of_peak(shape: Shape, result: dict[str, Any], prompt: int, peak: float) -> dict[str, float]:
    """Operations a second of each timed phase over the machine's matrix peak."""
    took, flops = phase_seconds(result), performed_flops(shape, result, prompt)
    return {name: flops[name] / took[name] / peak for name in flops if took.get(name, 0.0) > 0 and flops[name]}


def show(results: dict[str, Any]) -> str:
    head = f"{results['preset']}, {describe(results['machine'])}"
    if "sweep" in results:
        return f"{head}\n\n{sweep_table(results['standard'], results['sweep'])}"
    shape, peak = Shape(**results["shape"]), results["machine"]["peak"]["bf16"]
    tables = (
        comparison_table(results["runs"]),
        phase_table(results["runs"]),
        peak_table(shape, results["runs"], results["prompt"], peak),
    )
    return "\n\n".join((head, *tables))


def _against(runs: list[dict[str, Any]], result: dict[str, Any]) -> dict[str, Any] | None:
    """TRL's run of the same work."""
    updates = result["spec"]["updates"]
    return next((r for r in runs if r["spec"]["contender"] == "trl" and r["spec"]["updates"] == updates), None)


def comparison_table(runs: list[dict[str, Any]]) -> str:
    rows = []
    for result in runs:
        spec, other = result["spec"], _against(runs, result)
        faster = times(rate(result) / rate(other)) if other else "-"
        less = times(result["peak_bytes"] / other["peak_bytes"]) if other else "-"
        took = median(result["seconds"])
        rows.append(
            [spec["updates"], spec["contender"], seconds(took), f"{rate(result):.3g}", faster,
             memory(result["peak_bytes"]), less]
        )  # fmt: skip
    return markdown(
        ["updates", "contender", "a rollout", "samples a second", "of TRL's", "peak memory", "of TRL's"], rows
    )


def phase_table(runs: list[dict[str, Any]]) -> str:
    rows = []
    for result in runs:
        took = phase_seconds(result)
        encoded = round(median(result["pictures_encoded"]))
        cells = (seconds(took.get(name)) for name in PHASES)
        rows.append([result["spec"]["updates"], result["spec"]["contender"], encoded, *cells])
    return markdown(["updates", "contender", "pictures encoded", *PHASES], rows)


def peak_table(shape: Shape, runs: Iterable[dict[str, Any]], prompt: int, peak: float) -> str:
    """Shares of the matrix peak: each phase's own arithmetic, then what the step needs at the least over the time of
    all of it.
    """
    timed = [name for name in PHASES if name not in ("reward", "other")]
    rows = []
    for result in runs:
        shares = shares_of_peak(shape, result, prompt, peak)
        least = step_flops(shape, work_of(result, prompt), NEEDED)
        if result["spec"]["same_pictures"]:  # known from the first rollout
            least["encode"] = 0
        needed = sum(least.values())
        whole = needed / median(result["seconds"]) / peak
        cells = (percent(shares.get(name)) for name in timed)
        spec = result["spec"]
        rows.append([spec["updates"], spec["contender"], *cells, f"{needed / 1e9:.0f} GFLOP", percent(whole)])
    return markdown(["updates", "contender", *timed, "a step needs", "of peak"], rows)


def sweep_table(standard: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    """Each thing alone, beside the standard work."""
    rows = []
    for name, values in SWEEP.items():
        for value in values:
            wanted = {n: standard[n] for n in SWEEP} | {name: value}
            result = next(r for r in runs if all(r["spec"][n] == v for n, v in wanted.items()))
            took = median(result["seconds"])
            rows.append([f"{name} {value}", seconds(took), f"{rate(result):.3g}", memory(result["peak_bytes"])])
    return markdown(["one thing changed", "a rollout", "samples a second", "peak memory"], rows)


if __name__ == "__main__":
    sys.exit(command(parser, collect, show))
