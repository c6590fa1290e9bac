"""The benchmarks' own arithmetic, and tiny runs of each contender."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

BENCH = Path(__file__).resolve().parent.parent / "scripts" / "bench"
sys.path.append(str(BENCH))

import checkpoint  # noqa: E402
import measuring  # noqa: E402
import roofline  # noqa: E402
import text_ppo  # noqa: E402
import vision_contenders  # noqa: E402
import vision_ppo  # noqa: E402
import vocabulary_memory  # noqa: E402
from checkpoint import PRESETS, Shape  # noqa: E402
from roofline import NEEDED, Way, Work  # noqa: E402

TINY = PRESETS["tiny"]
# 4 patches of 12 numbers, a tower of 1 x 2, a decoder of 1 x 4 with 2 heads of 2 and one key-value head, 7 words.
HAND = Shape(4, 2, 1, 1, 2, 1, 3, 1, 4, 2, 1, 5, 7)


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint.build(TINY, tmp_path_factory.mktemp("bench"))


# Counted operations.


def test_step_flops_by_hand_with_shared_prompts() -> None:
    # Vision: embedding 2*4*12*2 = 192; layer 2*4*(4*2*2 + 2*2*3) = 224 and attention 4*4*4*2 = 128; connector
    # 2*4*2*4 = 64. Decoder weights 2*4*4 + 2*4*2 + 3*4*5 = 108; adapters of rank 1: (4+4) + (4+2) = 14.
    # One pass: 3 + 2*2 = 7 positions; the prompt's attend to 1+2+3 = 6, each answer's to 4+5 = 9, in all 24.
    work = Work(pictures=1, group=2, prompt=3, new=2, updates=1, r=1)
    head = 2 * 4 * 4 * 7  # 4 answer positions
    forward = 2 * 7 * (108 + 14) + 4 * 4 * 24 + head
    backward = 2 * 7 * (108 + 2 * 14) + 8 * 4 * 24 + head
    assert roofline.step_flops(HAND, work, NEEDED) == {
        "encode": 192 + 224 + 128 + 64,
        "prefill": 2 * 3 * 122 + 16 * 6 + 2 * 4 * 7,
        "decode": 2 * 2 * 122 + 16 * (2 * 4) + 2 * 2 * 4 * 7,  # one more token each, after 3, attends to 4
        "score": 0,
        "reference": 2 * 7 * 108 + 16 * 24 + head,
        "update": forward + backward,
    }
    assert (forward, backward) == (2316, 2896)


def test_step_flops_by_hand_with_rows_apart() -> None:
    # 2 rows of 5 positions that attend to 1+2+3+4+5 = 15; pictures in sampling, old, reference and 2 updates.
    work = Work(pictures=1, group=2, prompt=3, new=2, updates=2, r=1)
    way = Way(encode_once=False, share_prefill=False, share_prompts=False, score=True)
    forward, backward = 2 * 10 * 122 + 16 * 30 + 224, 2 * 10 * 136 + 32 * 30 + 224
    flops = roofline.step_flops(HAND, work, way)
    assert flops["encode"] == 5 * 2 * 608
    assert flops["prefill"] == 2 * (2 * 3 * 122 + 16 * 6 + 56)
    assert flops["score"] == forward
    assert flops["update"] == 2 * (forward + backward)
    kept = roofline.step_flops(HAND, work, Way(True, False, False, score=True, keep_graph=True))
    assert kept["update"] == forward + 2 * backward
    merged = roofline.by_timed_phase(flops)
    assert merged["sample"] == flops["prefill"] + flops["decode"]
    assert sum(merged.values()) == sum(flops.values())


def test_least_seconds_take_the_larger_of_arithmetic_and_memory() -> None:
    work = Work(pictures=1, group=2, prompt=3, new=2, updates=1, r=1)
    # 108 weights of the layer and 4*7 of the output, then 2*2 numbers for each of 8 attended positions; 2 bytes each.
    assert roofline.decode_bytes(HAND, work) == 2 * (108 + 28 + 4 * 8)
    least = roofline.least_seconds(HAND, work, NEEDED, peak=100.0, bandwidth=10.0)
    assert least["decode"] == pytest.approx(33.6)
    assert least["encode"] == pytest.approx(6.08)
    assert roofline.least_seconds(HAND, work, NEEDED, 100.0, 1000.0)["decode"] == pytest.approx(7.28)


def test_formulas_count_what_torch_counts(tiny_checkpoint: Path) -> None:
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint, attn_implementation="eager")
    pixels = torch.randn(1, 1, 3, TINY.picture_side, TINY.picture_side)
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        model.model.get_image_features(pixels)
    assert counted.get_total_flops() == roofline.vision(TINY, 1)
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        model(input_ids=torch.full((1, 9), 20), use_cache=False)
    # Without a kernel that skips masked positions, all 9 x 9 are multiplied.
    assert counted.get_total_flops() == roofline.decoder(TINY, 9, 81) + roofline.head(TINY, 9)


# The checkpoint.


def test_checkpoint_is_what_its_shape_says(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(tiny_checkpoint)
    assert len(processor.tokenizer) == TINY.vocabulary
    assert processor.tokenizer.eos_token == checkpoint.EOS
    length = checkpoint.prompt_tokens(processor, TINY.picture_side)
    assert length == TINY.picture_tokens + roofline.TEXT_TOKENS
    monkeypatch.delattr(checkpoint, "build_processor")  # a second call builds nothing
    assert checkpoint.build(TINY, tiny_checkpoint.parent) == tiny_checkpoint


def test_presets_have_the_shapes_they_are_named_for() -> None:
    small, large = PRESETS["256m"], PRESETS["2b"]
    assert (small.patches, small.picture_tokens, small.kv_width) == (1024, 64, 192)
    assert large.picture_tokens == 81
    weights = large.layers * roofline.linear_weights(large) + large.width * large.vocabulary
    assert 1.6e9 < weights < 1.8e9
    with pytest.raises(ValueError, match="at least"):
        checkpoint.build_tokenizer(100)


# Clocks, children, tables.


def test_an_inner_phase_pauses_the_outer(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([0.0, 1.0, 3.0, 7.0, 7.0, 20.0, 20.5, 20.5])
    monkeypatch.setattr(measuring, "now", lambda device: next(moments))
    clock = measuring.PhaseClock()
    with clock.phase("sample"), clock.phase("encode"):  # 0 to 1 in sample, 1 to 3 in encode, 3 to 7 in sample
        pass
    assert clock.take() == {"sample": 5.0, "encode": 2.0}
    with clock.phase("update"):
        pass
    assert clock.take() == {"update": 0.5}


def test_rollout_clock_counts_optimizer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([10.0, 13.0, 14.0])
    monkeypatch.setattr(measuring, "now", lambda device: next(moments))
    clock = measuring.RolloutClock(updates=2)
    clock.on_train_begin(None, None, None)
    for _ in range(5):
        clock.on_step_end(None, None, None)
    assert clock.seconds == [3.0, 1.0]
    assert clock.loaded_bytes > 0


def test_a_child_measures_the_machine_in_its_own_process() -> None:
    found = roofline.measure("cpu", sizes=[64], budget=0.01, mebi=1)
    assert found["peak"].keys() == {"bf16", "fp32"}
    assert min(*found["peak"].values(), found["bandwidth"]) > 0
    assert "GFLOP/s" in roofline.describe(found)
    with pytest.raises(RuntimeError, match=r"tables\.py {} ended with status 0"):
        measuring.run_child("tables.py", {})  # which answers nobody


def machine() -> dict[str, Any]:
    return {"processor": "p", "threads": 1, "torch": "2", "peak": {"bf16": 1e9, "fp32": 1e8}, "bandwidth": 1e9}


# Contenders.


def contender(name: str, path: Path, **changes: Any) -> dict[str, Any]:
    fields = {"path": str(path), "side": TINY.picture_side, "steps": 1, "new": 4, "updates": 2}
    return vision_contenders.child(fields | {"contender": name} | changes)


def test_vision_contenders_do_the_same_work(tiny_checkpoint: Path) -> None:
    runs = [contender(name, tiny_checkpoint) for name in vision_ppo.CONTENDERS]
    ours, apart, theirs = runs
    assert [run["pictures_encoded"] for run in runs] == [[2], [2], [8 * 5]]  # sampling, old, reference, 2 updates
    assert [run["share_prompts"] for run in runs] == [True, False, False]
    assert all(len(run["seconds"]) == 1 and run["peak_bytes"] > run["loaded_bytes"] / 2 for run in runs)
    for run in runs:
        took = vision_ppo.phase_seconds(run)
        assert {"encode", "sample", "score", "reference", "reward", "update", "other"} == took.keys()
        assert sum(took.values()) == pytest.approx(run["seconds"][0], rel=1e-6)
    results = {"preset": "tiny", "shape": asdict(TINY), "machine": machine(), "prompt": 18, "runs": runs}
    shown = vision_ppo.show(results)
    assert shown.count("| 2 | mmft-no-share-prompts |") == 3
    assert next(line for line in shown.splitlines() if line.startswith("| 2 | trl |")).endswith("| 1.00x |")
    flops = vision_ppo.performed_flops(TINY, theirs, 18)
    assert flops["encode"] == roofline.vision(TINY, 40)
    assert flops["update"] > vision_ppo.performed_flops(TINY, apart, 18)["update"]
    assert vision_ppo.performed_flops(TINY, ours, 18)["update"] < flops["update"]


def test_pictures_that_return_are_not_encoded_again(tiny_checkpoint: Path) -> None:
    run = contender("mmft", tiny_checkpoint, same_pictures=True)
    assert run["pictures_encoded"] == [0]


def test_sweep_changes_one_thing_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision_ppo, "run", lambda spec: {"spec": spec, "seconds": [2.0, 4.0, 9.0], "peak_bytes": 2**30})
    standard = {"pictures": 2, "new": 32, "group": 4, "updates": 1}
    runs = vision_ppo.sweep(standard)
    assert len(runs) == 10  # 13 lines, of which 4 are the standard work
    assert all(sum(run["spec"][name] != value for name, value in standard.items()) <= 1 for run in runs)
    table = vision_ppo.show({"preset": "tiny", "machine": machine(), "standard": standard, "sweep": runs})
    assert "| pictures 4 | 4 s | 4 | 1.00 GB |" in table
    assert table.count("\n") == 16


TEXT = {"layers": 2, "width": 64, "vocabulary": 512, "steps": 1, "new": 6, "shortest": 2, "longest": 5, "epochs": 2}


@pytest.mark.parametrize("ours", text_ppo.PAIRS)
def test_text_contenders_log_equal_losses(ours: str) -> None:
    options = TEXT | {"learning_rate": 1e-3}
    runs = [text_ppo.child(options | {"contender": name}) for name in (ours, text_ppo.PAIRS[ours])]
    differences = text_ppo.largest_differences(runs[0]["losses"], runs[1]["losses"])
    assert all(gap < 1e-5 + 1e-5 * value for gap, value in differences.values()), differences
    assert differences["objective/kl"][1] > 1e-3, "nothing was learned, so nothing was compared"
    shown = text_ppo.show({"machine": machine(), "runs": runs})
    assert f"| {ours} | loss/policy_avg |" in shown


def test_vocabulary_memory_reports_growth() -> None:
    runs = [vocabulary_memory.child({"vocabulary": v, "batch": 2, "new": 4, "repeats": 1}) for v in (512, 1024)]
    assert runs[1]["weight_bytes"] - runs[0]["weight_bytes"] == 512 * 32 * 4  # tied: one more row a word
    assert runs[1]["logit_bytes"] == 2 * 4 * 1024 * 4
    assert all(run["update_bytes"] > run["weight_bytes"] for run in runs)
    small = {"rollout_bytes": 100, "update_bytes": 200, "weight_bytes": 50}
    large = {"rollout_bytes": 150, "update_bytes": 210, "weight_bytes": 60}
    added = vocabulary_memory.growth(small, large)
    assert added["rollout"] == pytest.approx({"raw": 0.5, "less weights": 0.8})
    assert added["update"] == pytest.approx({"raw": 0.05, "less weights": 0.0})
    assert "growth, raw" in vocabulary_memory.show({"runs": runs, "growth": vocabulary_memory.growth(*runs)})


def test_all_benchmarks_are_called_with_arguments_they_have() -> None:
    spec = importlib.util.spec_from_file_location("bench_main", BENCH / "__main__.py")
    assert spec is not None and spec.loader is not None
    main = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(main)
    arguments = main.parser().parse_args(["--preset", "tiny", "--device", "cpu"])
    lines = main.command_lines(arguments)
    assert tuple(lines) == main.PARTS
    parsed = {name: module.parser().parse_args(line) for name, (module, line) in lines.items()}
    assert parsed["vision_ppo"].preset == "tiny"
    assert parsed["same_pictures"].same_pictures
    assert parsed["sweep"].sweep
