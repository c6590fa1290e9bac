"""Peak memory of a PPO step at a vocabulary and at twice as many words: batch x tokens x vocabulary must not be in it.

    python scripts/bench/vocabulary_memory.py
    python scripts/bench/vocabulary_memory.py --vocabulary 4096 --batch 4 --new 16     # does it run?

A tiny Llama on text with LoRA, in a process for each size. The peak is set back when sampling begins and again when
the update does (on Linux and on a GPU; elsewhere it is the whole run's). Shown raw, so with the larger embedding, and
less the weights.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from dataclasses import asdict, dataclass
from typing import Any

import torch
from checkpoint import PROMPT, build_tokenizer
from measuring import command, documented, peak_memory, pick_device, reset_peak, run_child, say
from tables import markdown, memory, percent
from transformers import TrainerCallback

from mmft.types import RewardOutput, Row

# glibc keeps freed memory for later, by chance 10% of the peak: large blocks go back to the system at once.
TIDY = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}


@dataclass(frozen=True)
class Spec:
    """One size's run: two steps, of which the second counts. repeats: of the prompt's five tokens."""

    vocabulary: int = 32768
    batch: int = 16
    repeats: int = 6
    new: int = 128
    width: int = 32
    layers: int = 2
    r: int = 4
    device: str = "cpu"


class Peaks(TrainerCallback):
    """Peak memory of each step's rollout and of its update; `begin_update` is the trainer's `on_rollout`."""

    def __init__(self, device: str):
        self.device = device
        self.rollout: list[int] = []
        self.update: list[int] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        reset_peak(self.device)

    def begin_update(self, step: int, rollout: Any) -> None:
        self.rollout.append(peak_memory(self.device))
        reset_peak(self.device)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.update.append(peak_memory(self.device))
        gc.collect()
        reset_peak(self.device)


def rows_of(spec: Spec) -> list[Row]:
    """Prompts that no two rows share."""
    return [Row(str(i), None, f"{PROMPT * spec.repeats} {i}") for i in range(2 * spec.batch)]


def policy_of(spec: Spec, tokenizer: Any) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=spec.vocabulary, hidden_size=spec.width, intermediate_size=2 * spec.width,
        num_hidden_layers=spec.layers, num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).requires_grad_(False)
    return get_peft_model(model, LoraConfig(r=spec.r, target_modules=["q_proj", "v_proj"]))


def variety_reward(captions: list[str], rows: list[Row], finished: list[bool]) -> RewardOutput:
    return RewardOutput([len(set(text)) / (1 + len(text)) for text in captions])


def child(fields: dict[str, Any]) -> dict[str, Any]:
    """One size's run; `fields` are those of a `Spec`."""
    from mmft.train.ppo import VisionPPOTrainer
    from mmft.train.ppo_config import VisionPPOConfig

    spec = Spec(**fields | {"device": pick_device(fields.get("device", "cpu"))})
    tokenizer = build_tokenizer(spec.vocabulary)
    policy, peaks = policy_of(spec, tokenizer), Peaks(spec.device)
    with tempfile.TemporaryDirectory() as folder:
        args = VisionPPOConfig(
            output_dir=folder, per_device_train_batch_size=spec.batch, gradient_accumulation_steps=1,
            num_mini_batches=1, num_ppo_epochs=2, total_episodes=2 * spec.batch, response_length=spec.new,
            min_new_tokens=spec.new, use_cpu=spec.device == "cpu", report_to=[], disable_tqdm=True,
            logging_steps=1, save_strategy="no", local_rollout_forward_batch_size=spec.batch,
        )  # fmt: skip
        trainer = VisionPPOTrainer(
            args, tokenizer, policy, reward_model=variety_reward, train_dataset=rows_of(spec),
            callbacks=[peaks],
        )  # fmt: skip
        trainer.on_rollout = peaks.begin_update
        trainer.train()
    weights = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    return {
        "spec": asdict(spec), "rollout_bytes": peaks.rollout[-1], "update_bytes": peaks.update[-1],
        "weight_bytes": weights, "logit_bytes": 4 * spec.batch * spec.new * spec.vocabulary,
    }  # fmt: skip


def parser() -> argparse.ArgumentParser:
    options = documented(__doc__)
    options.add_argument("--vocabulary", type=int, default=Spec.vocabulary, help="the smaller one")
    options.add_argument("--batch", type=int, default=Spec.batch, help="episodes a step")
    options.add_argument("--new", type=int, default=Spec.new, help="tokens of a response")
    options.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run")
    return options


def collect(arguments: argparse.Namespace) -> dict[str, Any]:
    runs = []
    for vocabulary in (arguments.vocabulary, 2 * arguments.vocabulary):
        say(f"vocabulary {vocabulary}")
        fields = {"batch": arguments.batch, "new": arguments.new, "device": arguments.device}
        runs.append(run_child("vocabulary_memory.py", fields | {"vocabulary": vocabulary}, TIDY))
    return {"runs": runs, "growth": growth(*runs)}


def growth(small: dict[str, Any], large: dict[str, Any]) -> dict[str, dict[str, float]]:
    """What doubling the vocabulary adds to each peak, as a share of it: raw, and less the weights."""
    added = {}
    for part in ("rollout", "update"):
        before, after = small[f"{part}_bytes"], large[f"{part}_bytes"]
        less_before, less_after = before - small["weight_bytes"], after - large["weight_bytes"]
        added[part] = {"raw": after / before - 1, "less weights": less_after / less_before - 1}
    return added


def show(results: dict[str, Any]) -> str:
    rows = []
    for result in results["runs"]:
        cells = [memory(result[f"{name}_bytes"]) for name in ("rollout", "update", "weight", "logit")]
        rows.append([result["spec"]["vocabulary"], *cells])
    for kind in ("raw", "less weights"):
        cells = [percent(results["growth"][part][kind]) for part in ("rollout", "update")]
        rows.append([f"growth, {kind}", *cells, "", ""])
    return markdown(["vocabulary", "peak of rollout", "peak of update", "weights", "batch x tokens x vocabulary"], rows)


if __name__ == "__main__":
    sys.exit(command(parser, collect, show, child))
