"""On text alone, `VisionPPOTrainer` given TRL's own config and models gives the numbers of TRL's `PPOTrainer`."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from torch import nn

import mmft.train.experience as experience
from mmft.models.critic import ValueHead
from mmft.train.ppo import VisionPPOTrainer

from trl.experimental.ppo import PPOConfig, PPOTrainer  # isort: skip  # after mmft.train, which silences it
from trl.experimental.ppo import ppo_trainer as trl_ppo  # isort: skip

STEPS = 3
SAME = (
    "objective/kl", "objective/scores", "objective/rlhf_reward", "objective/non_score_reward", "objective/entropy",
    "loss/policy_avg", "loss/value_avg", "val/clipfrac_avg", "val/num_eos_tokens", "lr", "episode",
)  # fmt: skip


class TrunkCritic(nn.Module):
    """A critic as TRL takes it whose backbone is the policy's own: what `ValueHead` is to us."""

    base_model_prefix = "trunk"

    def __init__(self, trunk: nn.Module, score: nn.Module):
        super().__init__()
        self.trunk = trunk
        self.score = score


@dataclass
class Run:
    """What one trainer did: a log a step, the rollouts' values, the whitened advantages, the final weights."""

    logs: list[dict[str, float]] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)
    whitened: list[torch.Tensor] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


def prompts() -> Dataset:
    """32 prompts of one to seven letters."""
    choose = random.Random(5)
    lengths = [1 + i % 7 for i in range(32)]
    return Dataset.from_dict({"input_ids": [[choose.randrange(2, len(tiny.WORDS)) for _ in range(n)] for n in lengths]})


def arguments(folder: Path, **changes: Any) -> PPOConfig:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "num_mini_batches": 2, "num_ppo_epochs": 2,
        "total_episodes": STEPS * 16, "response_length": 8, "learning_rate": 3e-3, "stop_token": "eos", "seed": 3,
        "missing_eos_penalty": 0.7, "kl_coef": 0.1, "temperature": 0.9, "local_rollout_forward_batch_size": 16,
        "bf16": False, "use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_steps": 1,
        "save_strategy": "no", "num_sample_generations": 0,
    }  # fmt: skip
    return PPOConfig(output_dir=str(folder), **settings | changes)


def seed_all() -> None:
    random.seed(11)
    np.random.seed(11)
    torch.manual_seed(11)


def run_one(
    kind: type, monkeypatch: pytest.MonkeyPatch, args: PPOConfig, lora: bool, value_model: Any, **models: Any
) -> Run:
    """Trains one trainer on fresh copies of everything, recording what it computes on the way."""
    seed_all()
    policy = tiny.text_policy(eos_bias=1.0)
    if lora:
        policy = tiny.with_lora(policy)
    critic = value_model(policy)
    seed_all()
    stops = args.stop_token is not None
    trainer = kind(args, tiny.tokenizer(), policy, train_dataset=prompts(), value_model=critic, **models)
    seen = Run()
    with monkeypatch.context() as patch:
        record(patch, seen, trainer.value_model, stops)
        seed_all()
        trainer.train()
    seen.logs = tiny.logs_of(trainer)
    seen.weights = {name: p.detach().clone() for name, p in policy.named_parameters()}
    return seen


def record(patch: pytest.MonkeyPatch, seen: Run, critic: nn.Module, stops: bool) -> None:
    """Values: in TRL what `get_reward` gives of the critic, masked by hand; in ours what the rollout holds."""
    original_reward, original_make = trl_ppo.get_reward, experience.make_experience
    whiten_theirs, whiten_ours = trl_ppo.masked_whiten, experience.masked_whiten

    def get_reward(model: nn.Module, tokens: torch.Tensor, pad_id: int, width: int) -> Any:
        result = original_reward(model, tokens, pad_id, width)
        if model is critic:
            values, answer = result[0][:, width - 1 : -1].squeeze(-1), tokens[:, width:]
            ends = (answer == tiny.EOS) & stops
            kept = ends.cumsum(1) - ends.long() == 0
            seen.values.append(values * experience.one_longer(kept))
        return result

    def make(rollout: Any, settings: Any) -> Any:
        made = original_make(rollout, settings)
        seen.values.append(made.value_BT)
        return made

    def whiten(original: Any) -> Any:
        def recorded(values: torch.Tensor, mask: torch.Tensor, **options: Any) -> torch.Tensor:
            result = original(values, mask, **options)
            seen.whitened.append(result * mask)
            return result

        return recorded

    patch.setattr(trl_ppo, "get_reward", get_reward)
    patch.setattr("mmft.train.ppo.make_experience", make)
    patch.setattr(trl_ppo, "masked_whiten", whiten(whiten_theirs))
    patch.setattr(experience, "masked_whiten", whiten(whiten_ours))


def assert_same(ours: Run, theirs: Run, weights: bool = True) -> None:
    assert len(ours.logs) == len(theirs.logs) == STEPS
    for mine, reference in zip(ours.logs, theirs.logs, strict=True):
        for name in SAME:
            assert mine[name] == pytest.approx(reference[name], abs=1e-5, rel=1e-6), name
    for name in ("values", "whitened"):
        mine, reference = getattr(ours, name), getattr(theirs, name)
        assert len(mine) == len(reference) >= STEPS, name
        for a, b in zip(mine, reference, strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    if weights:
        for name, weight in ours.weights.items():
            torch.testing.assert_close(
                weight, theirs.weights[name], atol=1e-5, rtol=1e-4, msg=lambda t, n=name: f"{n}: {t}"
            )


CASES = {
    "lora k1": {"lora": True},
    "lora k3 whitened": {"lora": True, "kl_estimator": "k3", "whiten_rewards": True},
    "full k1 discounted": {"lora": False, "gamma": 0.9, "lam": 0.8},
    "full k3 no stop": {
        "lora": False, "learning_rate": 1e-3, "kl_estimator": "k3", "stop_token": None, "missing_eos_penalty": None,
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_numbers_are_trls(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = dict(CASES[case])
    lora = changes.pop("lora")
    runs = []
    for kind in (VisionPPOTrainer, PPOTrainer):
        models = {"reward_model": tiny.classifier(1), "ref_model": None}
        args = arguments(tmp_path, **changes)
        runs.append(run_one(kind, monkeypatch, args, lora, lambda policy: tiny.classifier(2), **models))
    assert_same(*runs)
    first, last = runs[0].logs[0], runs[0].logs[-1]
    assert first["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert abs(last["objective/kl"]) > 1e-3, "nothing was learned, so nothing was compared"
    if changes.get("stop_token", "eos"):
        assert all(log["val/num_eos_tokens"] > 0 for log in runs[0].logs), "responses should end early"
        assert any(log["val/num_eos_tokens"] < 16 for log in runs[0].logs), "some should be cut off"


@pytest.mark.parametrize("lora", [True, False])
def test_shared_trunk_is_trl_with_the_policys_own_backbone(
    lora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The value loss reaches the trunk in both; its weight is raised so that a missing gradient would show."""

    def head() -> ValueHead:
        torch.manual_seed(7)
        return ValueHead(32)

    def own_trunk(policy: Any) -> TrunkCritic:
        base = policy.base_model.model if lora else policy
        return TrunkCritic(base.model, head().score)

    args = {"vf_coef": 2.0, "stop_token": "eos"}
    models = {"reward_model": tiny.classifier(1), "ref_model": None}
    ours = run_one(VisionPPOTrainer, monkeypatch, arguments(tmp_path, **args), lora, lambda policy: head(), **models)
    models = {"reward_model": tiny.classifier(1), "ref_model": None}
    theirs = run_one(PPOTrainer, monkeypatch, arguments(tmp_path, **args), lora, own_trunk, **models)
    assert_same(ours, theirs)
    assert ours.values[0].abs().max() == 0
    assert ours.values[-1].abs().max() > 1e-3


def test_a_second_reference_model_is_used_as_trl_uses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tiny.text_policy(eos_bias=0.5, seed=9)
    runs = []
    for kind in (VisionPPOTrainer, PPOTrainer):
        models = {"reward_model": tiny.classifier(1), "ref_model": copy.deepcopy(other)}
        args = arguments(tmp_path, total_episodes=STEPS * 16)
        runs.append(run_one(kind, monkeypatch, args, False, lambda policy: tiny.classifier(2), **models))
    assert_same(*runs)
    assert abs(runs[0].logs[0]["objective/kl"]) > 0.01
