"""The live trainer with pictures: exact ratios, credit at EOS, accumulation, stopping, coefficients, clipping."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from mmft.functional.masked import masked_whiten
from mmft.models.decoding import sample_responses
from mmft.models.interface import evaluating
from mmft.models.policy import Policy
from mmft.models.prompts import PromptBuilder
from mmft.train import rollout as rollouts
from mmft.train.experience import ExperienceSettings, Rollout, make_experience, penalised_scores
from mmft.train.ppo_config import VisionPPOConfig
from mmft.types import RewardOutput, UserError

ALWAYS, NEVER = 1e4, -1e4


def trained(tmp_path: Path, policy: Policy | None = None, **changes: Any) -> tuple[Any, list[Rollout]]:
    """A trainer after training, and the rollouts it learned from."""
    trainer = tiny.trainer(policy or tiny.vision_policy(), tmp_path, **changes)
    seen: list[Rollout] = []
    trainer.on_rollout = lambda step, rollout: seen.append(copy.copy(rollout))
    trainer.train()
    return trainer, seen


def adapter_of(trainer: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.policy_model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("micro", [2, 4])
def test_the_first_ratio_is_exactly_one(micro: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The update's first pass over the first minibatch repeats the rollout's arithmetic, pictures and all."""
    deviations = []
    original = rollouts.forward

    def forward(
        model: Any, feeds: Any, prompts: Any, responses: Any, mask: Any, index: torch.Tensor, *rest: Any, **options: Any
    ) -> Any:
        scores = original(model, feeds, prompts, responses, mask, index, *rest, **options)
        if updating and len(deviations) < 4 // micro - 1:  # the first micro-batch's pass is the rollout's own
            gap = scores.logprobs_BT - seen[-1].logprobs_BT[index]
            deviations.append(gap.masked_fill(~mask[index], 0.0).abs().max().item())
        return scores

    monkeypatch.setattr(rollouts, "forward", forward)
    trainer = tiny.trainer(
        tiny.vision_policy(), tmp_path, per_device_train_batch_size=micro, gradient_accumulation_steps=8 // micro,
        total_episodes=24, learning_rate=3e-3,
    )  # fmt: skip
    seen: list[Rollout] = []
    updating: list[bool] = []
    trainer.on_rollout = lambda step, rollout: (seen.append(rollout), deviations.clear(), updating.append(True))
    log = trainer.log
    monkeypatch.setattr(trainer, "log", lambda *args: (log(*args), updating.clear()))
    trainer.train()
    logs = tiny.logs_of(trainer)
    assert [log["policy/ratio_first"] for log in logs] == [1.0, 1.0, 1.0]
    assert deviations == [0.0] * (4 // micro - 1)
    assert logs[-1]["policy/ratio_max"] > 1.01, "the later minibatches should have moved"
    assert abs(logs[-1]["objective/kl"]) > 1e-4


def test_sampled_and_recomputed_logprobs_agree(tmp_path: Path) -> None:
    """A cache and left padding against one forward pass with right padding."""
    trainer = tiny.trainer(tiny.vision_policy(eos_bias=5.5), tmp_path)
    prompts = [trainer.builder(row) for row in tiny.rows()]
    trainer._begin()
    responses, mask, sampled = sample_responses(trainer.interface, prompts, trainer._sampling(), 3)
    scored = rollouts.score(
        trainer.model, trainer.interface, prompts, responses, mask, [torch.arange(8)]
    ).logprobs_BT  # fmt: skip
    assert 0 < mask.sum() < mask.numel()
    torch.testing.assert_close(sampled[mask], scored[mask], atol=1e-4, rtol=1e-4)


def test_a_mismatch_of_sampling_and_scoring_stops_the_run() -> None:
    sampled, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    rollouts.check_sampling(sampled, sampled - 0.01, mask, torch.float32)
    with pytest.raises(RuntimeError, match="do not see the same input"):
        rollouts.check_sampling(sampled, sampled - 0.1, mask, torch.float32)


@pytest.mark.parametrize(("bias", "tokens", "finished"), [(ALWAYS, 1.0, 1.0), (NEVER, 6.0, 0.0)])
def test_all_eos_and_no_eos(bias: float, tokens: float, finished: float, tmp_path: Path) -> None:
    policy = tiny.vision_policy(eos_bias=bias)
    before = adapter_of(trainer := tiny.trainer(policy, tmp_path, missing_eos_penalty=1.0, entropy_coef=0.01, l2=1e-3))
    seen: list[Rollout] = []
    trainer.on_rollout = lambda step, rollout: seen.append(rollout)
    trainer.train()
    (log,), (rollout,) = tiny.logs_of(trainer), seen
    assert (log["response/tokens"], log["response/finished"]) == (tokens, finished)
    assert rollout.mask_BT.sum(1).tolist() == [tokens] * 8
    assert all(torch.isfinite(torch.tensor(value)) for value in log.values())
    assert all(torch.isfinite(weight).all() for weight in adapter_of(trainer).values())
    assert log["objective/scores"] == pytest.approx(rollout.scores_B.mean().item() - (1.0 - finished), abs=1e-6)
    moved = any(not torch.equal(before[name], weight) for name, weight in adapter_of(trainer).items())
    assert moved or bias == ALWAYS, "a choice that is certain teaches nothing; others do"


def hand_made(**changes: Any) -> Rollout:
    """Two responses of 4 positions: [x, y, EOS, -] and [x, y, z, w] without an end."""
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    logprobs = torch.tensor([[-1.0, -2.0, -0.5, 0.0], [-1.0, -1.0, -1.0, -1.0]])
    reference = torch.tensor([[-1.5, -2.0, -0.5, 0.0], [-1.0, -1.0, -1.0, -3.0]])
    values = torch.tensor([[0.1, 0.2, 0.3, 9.0], [0.0, 0.0, 0.0, 0.5]])
    return Rollout([], [], torch.zeros(2, 4).long(), mask, mask.sum(1) < 4, logprobs, reference, values,
                   torch.tensor([2.0, 1.0]), **changes)  # fmt: skip


def settings(**changes: Any) -> ExperienceSettings:
    default: dict[str, Any] = {
        "kl_coef": 0.1, "kl_estimator": "k1", "gamma": 1.0, "lam": 0.5, "whiten_rewards": False,
        "whiten_advantages": False, "missing_eos_penalty": 0.25, "eos_credit": "own",
    }  # fmt: skip
    return ExperienceSettings(**default | changes)


def test_credit_at_the_eos_itself() -> None:
    """kl = logprob - reference: 0.5 at (0,0), 2 at (1,3); reward = -0.1 kl, + score at the response's last token.

    Row 0, lam 0.5, from the end: d2 = 2 - 0.3 = 1.7; d1 = 0 + 0.3 - 0.2 = 0.1; d0 = -0.05 + 0.2 - 0.1 = 0.05
    A2 = 1.7; A1 = 0.1 + 0.85 = 0.95; A0 = 0.05 + 0.475 = 0.525
    Row 1: r3 = 1 - 0.25 - 0.2 = 0.55; d3 = 0.05; d2 = 0.5; d1 = d0 = 0
    A3 = 0.05; A2 = 0.525; A1 = 0.2625; A0 = 0.13125
    """
    made = make_experience(hand_made(), settings())
    expected = [[-0.05, 0.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.55]]
    torch.testing.assert_close(made.reward_BT, torch.tensor(expected))
    advantages = [[0.525, 0.95, 1.7, 0.0], [0.13125, 0.2625, 0.525, 0.05]]
    torch.testing.assert_close(made.advantage_BT, torch.tensor(advantages))
    assert made.value_BT[0, 3] == 0, "V after the end is 0, whatever the critic says there"
    assert torch.equal(made.value_mask_BT, made.mask_BT)


def test_credit_one_later_as_in_trl() -> None:
    """Row 0 is credited at position 3, where V = 9 counts: d3 = 2 - 9 = -7, d2 = 0 + 9 - 0.3 = 8.7, A2 = 5.2.

    Row 1 fills the width: nothing later, so the last token.
    """
    made = make_experience(hand_made(), settings(eos_credit="next"))
    expected = [[-0.05, 0.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.55]]
    torch.testing.assert_close(made.reward_BT, torch.tensor(expected))
    assert made.value_mask_BT.tolist() == [[True] * 4, [True] * 4]
    assert made.advantage_BT[0, 2].item() == pytest.approx(5.2)
    assert made.advantage_BT[0, 3] == 0, "no action was taken there"


def test_whitening_counts_response_tokens_alone() -> None:
    plain, whitened = (make_experience(hand_made(), settings(whiten_advantages=on)) for on in (False, True))
    expected = masked_whiten(plain.advantage_BT, plain.mask_BT)
    torch.testing.assert_close(whitened.advantage_BT, expected)
    kept = whitened.advantage_BT[whitened.mask_BT]
    assert kept.mean().item() == pytest.approx(0, abs=1e-6)
    assert kept.std().item() == pytest.approx(1, abs=1e-4)


def test_penalty_for_no_end() -> None:
    scores, finished = torch.tensor([1.0, 1.0]), torch.tensor([True, False])
    assert penalised_scores(scores, finished, 0.5).tolist() == [1.0, 0.5]
    assert penalised_scores(scores, finished, None).tolist() == [1.0, 1.0]


def weights_of(module: torch.nn.Module) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(module.parameters()).detach().clone()


def plain_gradient_step(trainer: Any) -> Any:
    @torch.no_grad()
    def step() -> None:
        for group in trainer.optimizer.param_groups:
            for parameter in group["params"]:
                parameter -= 0.1 * parameter.grad

    return step


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")  # the optimizer is replaced
def test_micro_batches_add_up_to_the_minibatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of unequal lengths: means of means would weigh tokens wrongly. One epoch, so nothing compounds.

    Plain gradient steps: Adam's would turn rounding noise into whole steps.
    """
    results = []
    for micro in (2, 8):
        policy = tiny.vision_policy(eos_bias=5.5)
        trainer = tiny.trainer(
            policy, tmp_path, per_device_train_batch_size=micro, gradient_accumulation_steps=8 // micro,
            num_mini_batches=1, num_ppo_epochs=1, entropy_coef=0.05, vf_coef=0.5, l2=0.1, adapter_penalty=0.01,
            max_grad_norm=100.0,
        )  # fmt: skip
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:  # away from 0, so that the anchor and A have gradients
                torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(len(name)))
        before = adapter_of(trainer)
        tiny.stirred(trainer.value_model, 0.2)
        monkeypatch.setattr(trainer.optimizer, "step", plain_gradient_step(trainer))
        trainer.train()
        results.append((adapter_of(trainer), weights_of(trainer.value_model), tiny.logs_of(trainer)[0]))
    (few, few_value, few_log), (whole, whole_value, whole_log) = results
    assert few_log["response/finished"] not in (0.0, 1.0)
    assert max((whole[name] - before[name]).abs().max() for name in whole) > 1e-3
    for name in whole:
        torch.testing.assert_close(
            few[name], whole[name], atol=1e-6, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )
    torch.testing.assert_close(few_value, whole_value, atol=1e-6, rtol=1e-5)
    for name in ("loss/policy_avg", "loss/value_avg", "loss/total", "policy/grad_norm", "policy/entropy_avg"):
        assert few_log[name] == pytest.approx(whole_log[name], rel=1e-5, abs=1e-6), name


def test_target_kl_stops_before_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first minibatch's KL is 0, so exactly one step is taken; the second minibatch is measured and left."""
    trainer = tiny.trainer(tiny.vision_policy(), tmp_path, target_kl=1e-9, learning_rate=1e-2, num_ppo_epochs=4)
    steps, weights = [], []
    original = trainer.updater._step
    monkeypatch.setattr(
        trainer.updater, "_step", lambda stats: (original(stats), steps.append(1), weights.append(adapter_of(trainer)))
    )
    trainer.train()
    log = tiny.logs_of(trainer)[0]
    assert len(steps) == log["update/minibatches"] == 1
    assert log["update/stopped_early"] == 1.0
    assert all(torch.equal(weights[0][name], weight) for name, weight in adapter_of(trainer).items())
    assert all(p.grad is None for p in trainer.policy_model.parameters()), "the gradient of the stopped step is dropped"


def test_no_target_takes_every_step(tmp_path: Path) -> None:
    trainer, _ = trained(tmp_path, learning_rate=1e-2, num_ppo_epochs=4)
    log = tiny.logs_of(trainer)[0]
    assert log["update/minibatches"] == 8
    assert "update/stopped_early" not in log


def test_the_kl_coefficient_adapts(tmp_path: Path) -> None:
    """KL 0 in step 1 is 100% below target: e = -0.2, 8 responses of a horizon of 16: coef *= 1 - 0.2 * 8 / 16."""
    trainer, _ = trained(tmp_path, kl_coef=1.0, kl_target=5.0, kl_horizon=16, total_episodes=16)
    assert [log["kl/coef"] for log in tiny.logs_of(trainer)] == pytest.approx([1.0, 0.9])
    fixed, _ = trained(tmp_path, kl_coef=1.0, total_episodes=16)
    assert [log["kl/coef"] for log in tiny.logs_of(fixed)] == [1.0, 1.0]


def no_reward(captions: list[str], rows: list[Any], finished: list[bool]) -> RewardOutput:
    return RewardOutput([0.0] * len(captions))


@pytest.mark.parametrize(("coef", "sign"), [(0.5, 1), (-0.5, -1)])
def test_the_entropy_bonus_raises_entropy(coef: float, sign: int, tmp_path: Path) -> None:
    """With no reward and no KL, entropy is all there is to follow."""
    changes = {"entropy_coef": coef, "kl_coef": 0.0, "vf_coef": 0.0, "learning_rate": 3e-3, "total_episodes": 40}
    trainer, _ = trained(tmp_path, reward=no_reward, **changes)
    logs = tiny.logs_of(trainer)
    change = logs[-1]["policy/entropy_avg"] - logs[0]["policy/entropy_avg"]
    assert sign * change > 1e-3


def test_gradients_are_clipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tiny.trainer(tiny.vision_policy(), tmp_path, max_grad_norm=0.01)
    norms = []
    original = trainer.optimizer.step

    def step(*arguments: Any) -> Any:
        gradients = [p.grad for group in trainer.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.stack([g.norm() for g in gradients]).norm().item())
        return original(*arguments)

    monkeypatch.setattr(trainer.optimizer, "step", step)
    trainer.train()
    assert tiny.logs_of(trainer)[0]["policy/grad_norm"] > 0.01, "the log has the norm before clipping"
    assert norms and max(norms) <= 0.01 * 1.001


def test_a_loss_that_is_not_finite_stops_with_weights_unchanged(tmp_path: Path) -> None:
    def broken(captions: list[str], rows: list[Any], finished: list[bool]) -> RewardOutput:
        return RewardOutput([float("nan")] * len(captions))

    trainer = tiny.trainer(tiny.vision_policy(), tmp_path, reward=broken)
    before = adapter_of(trainer)
    with pytest.raises(FloatingPointError, match="step 1; no weight was changed"):
        trainer.train()
    assert all(torch.equal(before[name], weight) for name, weight in adapter_of(trainer).items())


def test_groups_share_a_prompt_and_rows_reach_the_reward(tmp_path: Path) -> None:
    _, (rollout,) = trained(tmp_path, samples_per_prompt=4)
    ids = [row.id for row in rollout.rows]
    assert ids == [ids[0]] * 4 + [ids[4]] * 4 and ids[0] != ids[4]
    assert rollout.prompts[0] is rollout.prompts[3]
    assert len({tuple(r.tolist()) for r in rollout.responses_BT[:4]}) > 1, "samples of one prompt differ"
    assert rollout.captions == [text.strip() for text in rollout.captions]


def test_a_short_minimum_is_part_of_the_policy(tmp_path: Path) -> None:
    """Where EOS can't be sampled yet it has probability 0 in the log-probabilities too; or the run would be stopped."""
    trainer, (rollout,) = trained(tmp_path, tiny.vision_policy(eos_bias=7.0), min_new_tokens=3)
    assert rollout.mask_BT.sum(1).min() == 4
    assert rollout.finished_B.any()
    assert tiny.logs_of(trainer)[0]["policy/ratio_first"] == 1.0


def test_data_smaller_than_a_batch_is_repeated(tmp_path: Path) -> None:
    """In whole epochs, one after the other."""
    _, (rollout,) = trained(tmp_path, data=tiny.rows(3))
    ids = [row.id for row in rollout.rows]
    assert len(set(ids[:3])) == len(set(ids[3:6])) == 3 and len(ids) == 8


def test_no_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the data has no rows"):
        tiny.trainer(tiny.vision_policy(), tmp_path, data=[])


def test_the_critic_learns_at_its_own_rate(tmp_path: Path) -> None:
    trainer = tiny.trainer(tiny.vision_policy(), tmp_path, learning_rate=1e-4, value_learning_rate=1e-2)
    policy, critic = trainer.optimizer.param_groups
    assert (policy["lr"], critic["lr"]) == (1e-4, 1e-2)
    assert sum(p.numel() for p in critic["params"]) == len(before := weights_of(trainer.value_model))
    trainer.train()
    assert (weights_of(trainer.value_model) - before).abs().max() > 1e-3


def test_same_seed_same_numbers_another_seed_others(tmp_path: Path) -> None:
    def numbers(seed: int) -> list[dict[str, float]]:
        torch.manual_seed(seed)
        torch.random.manual_seed(seed)
        import numpy as np

        np.random.seed(seed)
        trainer, _ = trained(tmp_path, seed=seed, total_episodes=16)
        return [{k: v for k, v in log.items() if not k.startswith("time/")} for log in tiny.logs_of(trainer)]

    assert numbers(0) == numbers(0)
    assert numbers(0) != numbers(1)


def test_models_with_batch_norm_and_dropout_are_scored_in_evaluation_mode(tmp_path: Path) -> None:
    """A frozen norm must not learn, and functional dropout must not act, or a row would depend on its batch."""
    trainer = tiny.trainer(tiny.vision_policy(), tmp_path)
    modes = []
    trainer.policy_model.get_output_embeddings().register_forward_pre_hook(
        lambda module, _: modes.append(module.training)
    )
    trainer.train()
    assert modes and not any(modes)
    with evaluating(trainer.policy_model):
        pass
    assert not trainer.policy_model.training


def test_our_settings_are_quiet(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=FutureWarning)
        warnings.filterwarnings(
            "ignore", message="`(is_)?gradient_checkpointing` is deprecated", category=FutureWarning
        )
        tiny.trainer(tiny.vision_policy(), tmp_path).train()
    assert VisionPPOConfig(output_dir=str(tmp_path), report_to=[]).gradient_checkpointing is False


def test_collated_rows_keep_their_pictures() -> None:
    builder = PromptBuilder(tiny.processor())
    batch = builder.collate(tiny.rows(3))
    assert [len(batch["prompts"]), len(batch["rows"])] == [3, 3]
    assert all(p.pictures["pixel_values"].shape[0] == 1 for p in batch["prompts"])
