"""What a step needs and what the machine can do: floating-point operations by phase, and the measured matrix peak.

    python scripts/bench/roofline.py                      # measure this machine, count the standard work

Counted are multiplications and additions of matrix products, two operations each: linear layers, attention (causal:
only the positions that are attended), output embedding, adapters. Softmax, norms and sampling are left out, as usual
(Chowdhery et al. 2022, arXiv:2204.02311, appendix B). The base is frozen, so its backward pass is one product a
layer, that of the activations' gradients; the first layer's share of it, which nothing needs, is counted too.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch
from checkpoint import PRESETS, Shape
from measuring import command, documented, machine, now, pick_device, run_child
from tables import markdown, seconds

SIZES = {"cpu": (512, 1024, 2048, 4096), "cuda": (2048, 4096, 8192, 16384)}
TEXT_TOKENS = 14  # of the benchmark's prompt, around its picture
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Work:
    """One rollout and its updates: `pictures` prompts of `prompt` tokens, `group` samples of each, `new` tokens a
    sample, `updates` passes over the batch; adapters of rank `r` on q and v.
    """

    pictures: int
    group: int
    prompt: int
    new: int
    updates: int
    r: int = 16

    @property
    def samples(self) -> int:
        return self.pictures * self.group


@dataclass(frozen=True)
class Way:
    """How a contender works.

    encode_once: each picture goes through the tower once, else in each pass of each sample.
    share_prefill: sampling reads a prompt once for all its samples.
    share_prompts: so do scoring and update.
    score: there is a pass for old log-probabilities (and values).
    keep_graph: that pass is the first update's forward pass too.
    """

    encode_once: bool
    share_prefill: bool
    share_prompts: bool
    score: bool
    keep_graph: bool = False


# The leanest way there is: old log-probabilities and values are known from the first update's forward pass.
NEEDED = Way(encode_once=True, share_prefill=True, share_prompts=True, score=False)


def vision(shape: Shape, pictures: int) -> int:
    """The tower and the connector's projection."""
    n, d = shape.patches, shape.vision_width
    embedding = 2 * n * 3 * shape.patch**2 * d
    layer = 2 * n * (4 * d * d + 2 * d * shape.vision_mlp) + 4 * n * n * d
    connector = 2 * n * d * shape.width  # scale**2 patches side by side, so that the scales cancel
    return pictures * (embedding + shape.vision_layers * layer + connector)


def linear_weights(shape: Shape) -> int:
    """Weights of a decoder layer's linear maps: q and o, k and v, a gated MLP."""
    d = shape.width
    return 2 * d * d + 2 * d * shape.kv_width + 3 * d * shape.mlp


def adapter_weights(shape: Shape, r: int) -> int:
    """Weights of a layer's adapters on q and v."""
    return r * (shape.width + shape.width) + r * (shape.width + shape.kv_width)


def decoder(shape: Shape, tokens: int, attended: int, r: int = 0) -> int:
    """The decoder's layers forward on `tokens` positions that attend to `attended` positions, all together."""
    layer = 2 * tokens * (linear_weights(shape) + adapter_weights(shape, r)) + 4 * shape.width * attended
    return shape.layers * layer


def decoder_backward(shape: Shape, tokens: int, attended: int, r: int) -> int:
    """Gradients of activations (linear maps once, attention twice its forward) and of adapters (twice theirs)."""
    layer = 2 * tokens * (linear_weights(shape) + 2 * adapter_weights(shape, r)) + 8 * shape.width * attended
    return shape.layers * layer


def head(shape: Shape, positions: int) -> int:
    return 2 * positions * shape.width * shape.vocabulary


def extent(work: Work, share_prompts: bool) -> tuple[int, int]:
    """(positions, attended positions) of one pass over all samples with their prompts."""
    p, t = work.prompt, work.new
    if not share_prompts:
        n = p + t
        return work.samples * n, work.samples * n * (n + 1) // 2
    answers = t * p + t * (t + 1) // 2
    return (
        work.pictures * p + work.samples * t,
        work.pictures * p * (p + 1) // 2 + work.samples * answers,
    )


def step_flops(shape: Shape, work: Work, way: Way) -> dict[str, int]:
    """Operations by phase. Sampling is `prefill` and `decode`; the first new token comes from the prefill."""
    tokens, attended = extent(work, way.share_prompts)
    forward = decoder(shape, tokens, attended, work.r) + head(shape, work.samples * work.new)
    backward = decoder_backward(shape, tokens, attended, work.r) + head(shape, work.samples * work.new)
    prompts = work.pictures if way.share_prefill else work.samples
    steps = work.new - 1
    decoded = decoder(
        shape, work.samples * steps, work.samples * (steps * work.prompt + steps * (steps + 1) // 2), work.r
    )
    forwards = work.updates - (1 if way.keep_graph else 0)
    passes = 2 + way.score + forwards  # sampling, reference, old log-probabilities, updates
    return {
        "encode": vision(shape, work.pictures if way.encode_once else work.samples * passes),
        "prefill": decoder(shape, prompts * work.prompt, prompts * work.prompt * (work.prompt + 1) // 2, work.r)
        + head(shape, prompts),
        "decode": decoded + head(shape, work.samples * steps),
        "score": forward if way.score else 0,
        "reference": decoder(shape, tokens, attended) + head(shape, work.samples * work.new),
        "update": forwards * forward + work.updates * backward,
    }


def decode_bytes(shape: Shape, work: Work, width: int = 2) -> int:
    """Bytes that decoding must read: all weights of the decoder for each token of the batch, and the keys and values
    so far. width: bytes a number.
    """
    steps = work.new - 1
    weights = shape.layers * linear_weights(shape) + shape.width * shape.vocabulary
    attended = work.samples * (steps * work.prompt + steps * (steps + 1) // 2)
    return width * (steps * weights + shape.layers * 2 * shape.kv_width * attended)


def least_seconds(shape: Shape, work: Work, way: Way, peak: float, bandwidth: float) -> dict[str, float]:
    """The roofline: seconds by phase below which this machine cannot do the work in this way, in bf16."""
    least = {name: count / peak for name, count in step_flops(shape, work, way).items()}
    return least | {"decode": max(least["decode"], decode_bytes(shape, work) / bandwidth)}


def by_timed_phase(flops: dict[str, int]) -> dict[str, int]:
    """The same under the names of timed phases, where sampling is one."""
    merged = {name: count for name, count in flops.items() if name not in ("prefill", "decode")}
    return merged | {"sample": flops["prefill"] + flops["decode"]}


def matrix_peak(dtype: torch.dtype, device: str, sizes: tuple[int, ...], budget: float = 1.0) -> float:
    """Operations a second of a square product, the best of the sizes; about `budget` seconds each."""
    best = 0.0
    for size in sizes:
        a = torch.randn(size, size, device=device).to(dtype)
        b = torch.randn(size, size, device=device).to(dtype)
        out = a @ b
        started = now(device)
        while (began := now(device)) - started < budget:
            torch.mm(a, b, out=out)
            best = max(best, 2 * size**3 / (now(device) - began))
    return best


def memory_bandwidth(device: str, mebi: int = 512, budget: float = 1.0) -> float:
    """Bytes a second read by a sum over more memory than any cache holds: what bounds decoding."""
    data = torch.ones(mebi * 2**20 // 4, device=device)
    data.sum()
    best, started = 0.0, now(device)
    while (began := now(device)) - started < budget:
        data.sum()
        best = max(best, data.nbytes / (now(device) - began))
    return best


def child(spec: dict[str, Any]) -> dict[str, Any]:
    device = pick_device(spec["device"])
    sizes = tuple(spec.get("sizes") or SIZES[device])
    budget = spec.get("budget", 1.0)
    with torch.no_grad():
        peaks = {name: matrix_peak(dtype, device, sizes, budget) for name, dtype in DTYPES.items()}
        bandwidth = memory_bandwidth(device, spec.get("mebi", 512), budget)
    return machine() | {"device": device, "peak": peaks, "bandwidth": bandwidth}


def measure(device: str = "auto", **options: Any) -> dict[str, Any]:
    """The machine and its peaks, measured in a process of their own."""
    return run_child("roofline.py", {"device": device, **options})


def describe(found: dict[str, Any]) -> str:
    peaks = ", ".join(f"{name} {value / 1e9:.0f} GFLOP/s" for name, value in found["peak"].items())
    where = found.get("gpu") or f"{found['processor']}, {found['threads']} threads"
    return f"{where}, torch {found['torch']}: {peaks}, memory {found['bandwidth'] / 1e9:.0f} GB/s"


def parser() -> argparse.ArgumentParser:
    options = documented(__doc__)
    options.add_argument("--preset", choices=PRESETS, default="256m", help="shape of the model whose work is counted")
    options.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="what is measured")
    return options


def collect(arguments: argparse.Namespace) -> dict[str, Any]:
    shape, found = PRESETS[arguments.preset], measure(arguments.device)
    steps = []
    for updates in (1, 4):
        work = Work(2, 4, shape.picture_tokens + TEXT_TOKENS, 32, updates)
        least = least_seconds(shape, work, NEEDED, found["peak"]["bf16"], found["bandwidth"])
        steps.append({"work": asdict(work), "flops": step_flops(shape, work, NEEDED), "least_seconds": least})
    return {"preset": arguments.preset, "machine": found, "steps": steps}


def show(results: dict[str, Any]) -> str:
    rows = []
    for step in results["steps"]:
        flops, least = step["flops"], step["least_seconds"]
        cells = [f"{flops[name] / 1e9:.0f} GFLOP, {seconds(least[name])}" for name in flops]
        rows.append([step["work"]["updates"], *cells, seconds(sum(least.values()))])
    table = markdown(["updates", *results["steps"][0]["flops"], "at least"], rows)
    return f"{describe(results['machine'])}\n\n{table}"


if __name__ == "__main__":
    sys.exit(command(parser, collect, show, child))
