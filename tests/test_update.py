"""The update: which rows go together, what is computed once, and what happens where memory runs out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import set_seed

from mmft.models.scoring import TokenScores
from mmft.train import rollout as rollouts
from mmft.train.ppo import VisionPPOTrainer
from mmft.train.update import Updater

GROUPED = {"samples_per_prompt": 2, "total_episodes": 16, "learning_rate": 3e-3}


def trained(folder: Path, **changes: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    set_seed(5)
    trainer = tiny.trainer(tiny.vision_policy(eos_bias=3.0), folder, **GROUPED | changes)
    trainer.train()
    weights = {n: p.detach().clone() for n, p in trainer.policy_model.named_parameters() if p.requires_grad}
    return trainer, weights


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float) -> None:
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=tolerance, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


def test_micro_batches_keep_prompts_together_and_long_rows_first(tmp_path: Path) -> None:
    trainer = tiny.trainer(tiny.vision_policy(), tmp_path, samples_per_prompt=2, per_device_train_batch_size=4)
    prompts = [p for p in (trainer.builder(row) for row in tiny.rows(4)) for _ in range(2)]
    mask = torch.ones(8, 6, dtype=torch.bool)
    order = [torch.tensor([6, 0, 7, 1, 4, 2, 5, 3])]
    (micro,) = trainer.updater.micro_batches(order, prompts, mask)
    rows = torch.cat(micro).tolist()
    assert sorted(rows) == list(range(8)) and [len(m) for m in micro] == [4, 4]
    assert all(rows[i] // 2 == rows[i + 1] // 2 for i in range(0, 8, 2))
    lengths = [len(prompts[i]) for i in rows]
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) > 1


def test_the_first_pass_is_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scoring's graph serves the update: a forward pass less a step, and the same weights to the bit."""
    passes: list[bool] = []
    forward = rollouts.forward

    def counted(*args: Any, **options: Any) -> TokenScores:
        passes.append(torch.is_grad_enabled())
        return forward(*args, **options)

    monkeypatch.setattr(rollouts, "forward", counted)
    once, weights = trained(tmp_path / "once")
    with_graph = sum(passes)
    passes.clear()
    score = Updater.score

    def without(self: Any, *args: Any) -> Any:
        scored = score(self, *args)
        scored.live = None
        return scored

    monkeypatch.setattr(Updater, "score", without)
    _, again = trained(tmp_path / "again")
    assert sum(passes) == with_graph + 2, "two steps, one pass more in each"
    assert_close(weights, again, 0.0)
    assert [log["policy/ratio_first"] for log in tiny.logs_of(once)] == [1.0, 1.0]


def test_shared_prompts_learn_the_same(tmp_path: Path) -> None:
    shared, weights = trained(tmp_path / "shared")
    apart, expected = trained(tmp_path / "apart", share_prompts=False, samples_per_prompt=2)
    assert shared.interface.share_prompts and not apart.interface.share_prompts
    first, other = tiny.logs_of(shared)[0], tiny.logs_of(apart)[0]
    for name in (
        "objective/scores",
        "objective/entropy",
    ):  # what is sampled is the same; minibatches are drawn otherwise
        assert first[name] == pytest.approx(other[name], abs=1e-4)
    assert weights.keys() == expected.keys()


def test_shared_prompts_have_the_same_gradients(tmp_path: Path) -> None:
    """One micro-batch of four prompts with two answers each, forward and backward."""
    found = []
    for share in (True, False):
        trainer = tiny.trainer(tiny.vision_policy(), tmp_path)
        tiny.stirred(trainer.policy_model, 0.2)
        prompts = [p for p in (trainer.builder(row) for row in tiny.rows(4)) for _ in range(2)]
        trainer.interface.share_prompts, trainer.interface.checked = share, True
        tokens = tiny.answers(8, 5)
        mask = torch.arange(5)[None, :] < torch.tensor([5, 3, 1, 5, 4, 4, 2, 5])[:, None]
        scores = rollouts.forward(trainer.model, trainer.interface, prompts, tokens, mask, torch.arange(8))
        packed = trainer.interface.pack(prompts, tokens, mask)
        assert len(packed.inputs["input_ids"]) == (4 if share else 8)
        (scores.logprobs_BT * mask).sum().backward()
        grads = {n: p.grad.clone() for n, p in trainer.policy_model.named_parameters() if p.grad is not None}
        found.append((scores.logprobs_BT[mask].detach(), scores.value_BT[mask].detach(), grads))
    (lp, v, ours), (expected_lp, expected_v, theirs) = found
    torch.testing.assert_close(lp, expected_lp, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(v, expected_v, atol=1e-4, rtol=1e-4)
    assert ours.keys() == theirs.keys() and len(ours) > 4
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=2e-4, rtol=1e-3)


def test_out_of_memory_halves_the_rows_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _, expected = trained(tmp_path / "whole")
    forward = rollouts.forward

    def small(model: Any, feeds: Any, prompts: Any, responses: Any, mask: Any, index: Any, *rest: Any, **o: Any) -> Any:
        if len(index) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(model, feeds, prompts, responses, mask, index, *rest, **o)

    monkeypatch.setattr(rollouts, "forward", small)
    trainer, weights = trained(tmp_path / "small")
    assert trainer.updater.micro_batch == 1
    assert "going on with 2 rows at once" in caplog.text
    assert_close(weights, expected, 1e-5)


def test_other_errors_are_not_taken_for_a_full_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(rollouts, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        trained(tmp_path)


def test_without_a_kl_there_is_no_reference_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    reference = VisionPPOTrainer._reference_logprobs
    monkeypatch.setattr(
        VisionPPOTrainer, "_reference_logprobs", lambda *args: (asked.append(reference(*args)), asked[-1])[1]
    )
    trainer, _ = trained(tmp_path, kl_coef=0.0)
    assert asked == [None, None]
    assert all("objective/kl" not in log for log in tiny.logs_of(trainer))


def test_the_critics_adapter_learns_beside_the_policys(tmp_path: Path) -> None:
    trainer = tiny.trainer(tiny.vision_policy(eos_bias=3.0), tmp_path, **GROUPED, critic="adapter")
    before = {n: p.detach().clone() for n, p in trainer.policy_model.named_parameters() if p.requires_grad}
    trainer.train()
    moved = {n for n, p in trainer.policy_model.named_parameters() if p.requires_grad and not torch.equal(p, before[n])}
    assert any(".critic." in n for n in moved) and any(".default." in n for n in moved)
    groups = trainer.optimizer.param_groups
    critic = {id(p) for n, p in trainer.policy_model.named_parameters() if ".critic." in n}
    assert critic <= {id(p) for p in groups[1]["params"]} and not critic & {id(p) for p in groups[0]["params"]}
    assert [log["policy/ratio_first"] for log in tiny.logs_of(trainer)] == [1.0, 1.0]


def test_the_parts_of_a_step_are_timed(tmp_path: Path) -> None:
    trainer, _ = trained(tmp_path)
    log = tiny.logs_of(trainer)[-1]
    parts = [log[f"time/{part}"] for part in ("sample", "score", "reference", "reward", "update")]
    assert all(part > 0 for part in parts)
    assert sum(parts) <= log["time/step"]
