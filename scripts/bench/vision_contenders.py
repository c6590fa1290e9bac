"""The contenders of vision_ppo.py: the same work done by mmft's PPO and by TRL's GRPO, one in a process.

Same checkpoint, pictures, prompts, group, tokens, adapters, type, reward and optimizer; both forbid the end of a
response, so that every sample has its full length, and picture tokens, which would break TRL's forward pass.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from checkpoint import PROMPT
from measuring import PhaseClock, RolloutClock, answered, peak_memory, pick_device
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmft.config import ModelConfig
from mmft.data.scenes import EmojiScenes
from mmft.models.policy import load_policy, lora_targets, picture_token_ids
from mmft.train.metrics import PhaseTimer
from mmft.train.ppo import VisionPPOTrainer
from mmft.train.ppo_config import VisionPPOConfig
from mmft.types import RewardOutput, Row

from trl import GRPOConfig, GRPOTrainer  # isort: skip  # after mmft.train, which silences it

TARGETS = ("q_proj", "v_proj")
ALPHA = 32
LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class Spec:
    """One contender's run. steps: counted rollouts, after one that warms up."""

    contender: str
    path: str
    side: int
    pictures: int = 2
    group: int = 4
    new: int = 32
    updates: int = 1
    r: int = 16
    beta: float = 0.05
    steps: int = 3
    same_pictures: bool = False
    device: str = "cpu"
    dtype: str = "bfloat16"
    seed: int = 0

    @property
    def samples(self) -> int:
        return self.pictures * self.group

    @property
    def rollouts(self) -> int:
        return self.steps + 1


def rows_of(spec: Spec) -> list[Row]:
    """Scenes at the tower's size, new ones for each rollout unless `same_pictures`."""
    count = spec.pictures * (1 if spec.same_pictures else spec.rollouts)
    scenes = EmojiScenes(count, seed=spec.seed, prompt=PROMPT)
    size = (spec.side, spec.side)
    return [dataclasses.replace(row, image=row.image.resize(size)) for row in (scenes[i] for i in range(count))]


def variety(text: str) -> float:
    """The reward in both: different characters of a text as a share of all."""
    return len(set(text)) / (1 + len(text))


def ppo_reward(captions: list[str], rows: list[Row], finished: list[bool]) -> RewardOutput:
    return RewardOutput([variety(text) for text in captions])


def grpo_reward(completions: list[Any], **columns: Any) -> list[float]:
    return [variety("".join(message["content"] for message in completion)) for completion in completions]


class Tower:
    """Watches the vision tower: seconds in it and pictures through it, in each rollout."""

    def __init__(self, model: nn.Module, clock: PhaseClock):
        self.clock = clock
        self.pictures = 0
        tower = next(module for name, module in model.named_modules() if name.endswith("vision_model"))
        tower.register_forward_pre_hook(self._begin, with_kwargs=True)
        tower.register_forward_hook(lambda *_: self.clock.end(), always_call=True)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pixels = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]
        self.pictures += len(pixels)
        self.clock.begin("encode")

    def take(self) -> int:
        taken, self.pictures = self.pictures, 0
        return taken


class Measured:
    """What every contender reports: rollouts' seconds, phases, pictures encoded, memory."""

    def __init__(self, spec: Spec, optimizer_steps: int):
        self.spec = spec
        self.phases = PhaseClock(spec.device)
        self.tower: Tower | None = None
        self.taken: list[dict[str, float]] = []
        self.encoded: list[int] = []
        self.clock = RolloutClock(optimizer_steps, spec.device, self._on_rollout)

    def watch(self, model: nn.Module) -> None:
        self.tower = Tower(model, self.phases)

    def _on_rollout(self) -> None:
        self.taken.append(self.phases.take())
        self.encoded.append(self.tower.take() if self.tower else 0)

    def report(self) -> dict[str, Any]:
        """Without the first rollout, which warmed up."""
        return {
            "spec": asdict(self.spec),
            "seconds": self.clock.seconds[1:],
            "warm_up_seconds": self.clock.seconds[0],
            "phases": self.taken[1:],
            "pictures_encoded": self.encoded[1:],
            "peak_bytes": peak_memory(self.spec.device),
            "loaded_bytes": self.clock.loaded_bytes,
        }


def shared_settings(spec: Spec, folder: str) -> dict[str, Any]:
    """Arguments that both trainers take from transformers, alike."""
    return {
        "output_dir": folder, "per_device_train_batch_size": spec.samples, "gradient_accumulation_steps": 1,
        "learning_rate": LEARNING_RATE, "seed": spec.seed, "use_cpu": spec.device == "cpu", "report_to": [],
        "disable_tqdm": True, "save_strategy": "no", "gradient_checkpointing": False,
    }  # fmt: skip


class PausingTimer(PhaseTimer):
    """mmft's timer of phases on the benchmark's clock, where the tower pauses the phase it runs in."""

    def __init__(self, device: torch.device, phases: PhaseClock):
        super().__init__(device)
        self.phases = phases

    def __call__(self, phase: str) -> AbstractContextManager[None]:
        return self.phases.phase(phase)


def run_mmft(spec: Spec) -> dict[str, Any]:
    lora = {"r": spec.r, "alpha": ALPHA, "target_modules": TARGETS}
    policy = load_policy(ModelConfig(path=spec.path, dtype=spec.dtype, lora=lora), spec.device)
    measured = Measured(spec, optimizer_steps=1)
    measured.watch(policy.model)
    with tempfile.TemporaryDirectory() as folder:
        args = VisionPPOConfig(
            **shared_settings(spec, folder), num_ppo_epochs=spec.updates, num_mini_batches=1, kl_coef=spec.beta,
            total_episodes=spec.rollouts * spec.samples, response_length=spec.new, min_new_tokens=spec.new,
            samples_per_prompt=spec.group, local_rollout_forward_batch_size=spec.samples, logging_steps=1,
            share_prompts=spec.contender == "mmft",
        )  # fmt: skip
        trainer = VisionPPOTrainer(
            args, policy.processor, policy.model, reward_model=ppo_reward, train_dataset=rows_of(spec),
            callbacks=[measured.clock],
        )  # fmt: skip
        trainer.timer = PausingTimer(trainer.accelerator.device, measured.phases)
        trainer.train()
    return measured.report() | {"share_prompts": trainer.interface.share_prompts}


class TimedGRPOTrainer(GRPOTrainer):
    """TRL's trainer with a clock on its phases; nothing it computes is changed."""

    phases: PhaseClock

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.phases.phase("update"):
            return super().training_step(*args, **kwargs)

    def _prepare_inputs(self, *args: Any, **kwargs: Any) -> Any:
        with self.phases.phase("prepare"):
            return super()._prepare_inputs(*args, **kwargs)

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        with self.phases.phase("sample"):
            return super()._generate(*args, **kwargs)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        with self.phases.phase("reward"):
            return super()._calculate_rewards(*args, **kwargs)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        with self.phases.phase(self._pass_name()):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _pass_name(self) -> str:
        if torch.is_grad_enabled():
            return "update"
        adapter = next(module for module in self.model.modules() if isinstance(module, BaseTunerLayer))
        return "reference" if adapter.disable_adapters else "score"


def run_trl(spec: Spec) -> dict[str, Any]:
    from datasets import Dataset

    model = AutoModelForImageTextToText.from_pretrained(spec.path, dtype=getattr(torch, spec.dtype)).to(spec.device)
    processor = AutoProcessor.from_pretrained(spec.path)
    measured = Measured(spec, optimizer_steps=spec.updates)
    measured.watch(model)
    banned = picture_token_ids(model, processor)
    lora = LoraConfig(r=spec.r, lora_alpha=ALPHA, target_modules=lora_targets(model, TARGETS))
    pictures = [row.image for row in rows_of(spec)]
    prompts = [[{"role": "user", "content": PROMPT}] for _ in pictures]
    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            **shared_settings(spec, folder), num_generations=spec.group, steps_per_generation=1,
            num_iterations=spec.updates, max_steps=spec.rollouts * spec.updates, beta=spec.beta,
            max_completion_length=spec.new, temperature=1.0, top_p=1.0, top_k=0, bf16=spec.dtype == "bfloat16",
            remove_unused_columns=False, logging_strategy="no",
            generation_kwargs={"min_new_tokens": spec.new, "suppress_tokens": banned},
        )  # fmt: skip
        trainer = TimedGRPOTrainer(
            model, grpo_reward, args, Dataset.from_dict({"prompt": prompts, "image": pictures}),
            processing_class=processor, callbacks=[measured.clock], peft_config=lora,
        )  # fmt: skip
        trainer.phases = measured.phases
        trainer.train()
    return measured.report() | {"share_prompts": False}


def child(fields: dict[str, Any]) -> dict[str, Any]:
    """One contender's run; `fields` are those of a `Spec`."""
    spec = Spec(**fields | {"device": pick_device(fields.get("device", "cpu"))})
    return (run_trl if spec.contender == "trl" else run_mmft)(spec)


if __name__ == "__main__":
    sys.exit(0 if answered(child) else "run vision_ppo.py, which runs this")
