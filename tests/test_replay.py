"""A batch that broke an update: kept with the weights it met, and run again until the culprit has a name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from mmft import run
from mmft.cli import main
from mmft.config import load_recipe
from mmft.run import building
from mmft.train import trainer_state
from mmft.train.replay import NonFiniteUpdate, read_batch, replay
from mmft.types import RewardOutput, UserError


def poison(trainer: Any, row: int) -> None:
    """Makes the score of one row no number, once everything else of the batch is known."""
    known = trainer.on_rollout

    def poisoned(step: int, rollout: Any) -> None:
        if known is not None:
            known(step, rollout)
        rollout.scores_B[row] = float("nan")
        trainer.poisoned = rollout.rows[row].id

    trainer.on_rollout = poisoned


def broken(folder: Path, row: int, **changes: Any) -> tuple[Any, Path, str]:
    """A trainer whose first update broke, the file of the batch, and what was said."""
    folder.mkdir(exist_ok=True)
    trainer = tiny.trainer(tiny.vision_policy(eos_bias=3.0), folder, num_mini_batches=1, **changes)
    poison(trainer, row)
    before = trainer_state.tensors_of(trainer)

    def keep(data: bytes) -> Path:
        (folder / "batch.safetensors").write_bytes(data)
        return folder / "batch.safetensors"

    trainer.keep_batch = keep
    with pytest.raises(NonFiniteUpdate) as error:
        trainer.train()
    after = trainer_state.tensors_of(trainer)
    centred = "value_model.score.2.bias"  # moved by the rollout's mean, before the update
    assert all(torch.equal(before[n], after[n]) for n in before if centred not in n)
    assert all(p.grad is None for p in trainer_state.trained(trainer).values())
    return trainer, folder / "batch.safetensors", str(error.value)


def test_the_row_with_the_bad_advantage_is_named(tmp_path: Path) -> None:
    """Without whitening, which would spread it over all rows."""
    trainer, file, said = broken(tmp_path / "a", 5, whiten_advantages=False)
    assert said.startswith("the loss is nan at step 1; no weight was changed") and said.endswith(f"mmft replay {file}")
    batch = read_batch(file)
    report = replay(batch, trainer)
    assert [row.id for row in report.rows if not row.finite] == [trainer.poisoned]
    assert (report.finite, report.module, batch.step) == (False, None, 1)
    assert all(row.worst_ratio == pytest.approx(1.0, abs=1e-5) for row in report.rows)


def test_the_first_bad_module_is_named(tmp_path: Path) -> None:
    trainer, file, _ = broken(tmp_path / "a", 0)
    bad = trainer.policy_model.get_base_model().model.language_model.layers[1].mlp.up_proj.base_layer
    with torch.no_grad():
        bad.weight[0, 0] = float("inf")
    report = replay(read_batch(file), trainer)
    assert report.module is not None and report.module.endswith("layers.1.mlp.up_proj.base_layer")


def test_a_mended_batch_is_finite(tmp_path: Path) -> None:
    """In another process's trainer, which has other weights until the file's are put in."""
    _, file, _ = broken(tmp_path / "a", 5)
    batch = read_batch(file)
    other = tiny.trainer(tiny.vision_policy(seed=0, eos_bias=3.0), tmp_path / "b")
    tiny.stirred(other.policy_model, 0.1)
    batch.experience.advantage_BT.nan_to_num_(0.0)
    batch.experience.return_BT.nan_to_num_(0.0)
    batch.experience.value_BT.nan_to_num_(0.0)
    other_bias = other.value_model.score[-1].bias
    for name, tensor in batch.weights.items():
        if "score.2.bias" in name:
            tensor.zero_()
    report = replay(batch, other)
    assert report.finite and report.rows[0].worst_ratio == pytest.approx(1.0, abs=1e-5)
    assert torch.equal(other_bias, torch.zeros(1))


def test_a_reward_that_is_no_number_stops_before_the_update(tmp_path: Path) -> None:
    def reward(captions: list[str], rows: list[Any], finished: list[bool]) -> RewardOutput:
        return RewardOutput([float("inf")] * len(captions))

    with pytest.raises(FloatingPointError, match="the reward of a response is not finite at step 1"):
        tiny.trainer(tiny.vision_policy(), tmp_path, reward=reward).train()


def test_a_gradient_alone_may_break(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is finite, the norm of the gradient is not."""
    folder = tmp_path / "a"
    folder.mkdir()
    trainer = tiny.trainer(tiny.vision_policy(), folder)
    monkeypatch.setattr(trainer.accelerator, "clip_grad_norm_", lambda *_: torch.tensor(float("inf")))
    with pytest.raises(NonFiniteUpdate, match="the gradient is inf at step 1; no weight was changed"):
        trainer.train()


def test_files_that_are_no_batches(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="cannot be read"):
        read_batch(tmp_path / "x")
    trainer = tiny.trainer(tiny.vision_policy(), tmp_path)
    trainer_state.save_state(_with_batches(trainer), tmp_path)
    with pytest.raises(UserError, match="not a batch"):
        read_batch(tmp_path / trainer_state.TENSORS)


def _with_batches(trainer: Any) -> Any:
    trainer.state.episode = 0
    return trainer


def test_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mmft.cli._quiet_libraries", lambda: None)
    small = ("train.steps=1", "train.batch=4", "eval.samples=2", "data.samples=8", "generation.max_new_tokens=4")
    recipe = load_recipe("caption_ppo_fixed", [*small, f"logging.dir={tmp_path}", "model.lora.r=2"])
    build = building.build_trainer

    def poisoned(*arguments: Any) -> Any:
        trainer = build(*arguments)
        poison(trainer, 1)
        return trainer

    monkeypatch.setattr("mmft.run.training.build_trainer", poisoned)
    with pytest.raises(NonFiniteUpdate, match=r"mmft replay .*batch-step-1-process-0\.safetensors"):
        run.train(recipe)
    (file,) = (tmp_path / "caption_ppo_fixed").glob("batch-*")
    capsys.readouterr()
    assert main(["replay", str(file)]) == 1
    said = capsys.readouterr().out
    assert "step 1: the loss is nan" in said and "not finite: rows " in said
    assert main(["replay", str(tmp_path / "nothing")]) == 2
