"""A batch that broke an update: kept with the weights it met, and run again until the culprit has a name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from rich.console import Console

from mmft import run
from mmft.cli import main
from mmft.config import load_recipe
from mmft.run import building
from mmft.run.replaying import _conclusion, _show
from mmft.train import trainer_state
from mmft.train.replay import NonFiniteUpdate, ReplayReport, RowReport, read_batch, replay
from mmft.types import RewardOutput, UserError

CENTRED = "value_model.score.2.bias"  # moved by the rollout's mean, before the update


def poison(trainer: Any, row: int) -> None:
    """Makes the score of one row no number, once everything else of the batch is known."""
    known = trainer.on_rollout

    def poisoned(step: int, rollout: Any) -> None:
        if known is not None:
            known(step, rollout)
        rollout.scores_B[row] = float("nan")
        trainer.poisoned = rollout.rows[row].id

    trainer.on_rollout = poisoned


def kept_by(trainer: Any, folder: Path) -> Path:
    """Where the trainer will keep a batch that breaks."""
    file = folder / "batch.safetensors"

    def keep(data: bytes) -> Path:
        file.write_bytes(data)
        return file

    trainer.keep_batch = keep
    return file


def broken(folder: Path, row: int, **changes: Any) -> tuple[Any, Path, str]:
    """A trainer whose first update broke, the file of the batch, and what was said."""
    folder.mkdir(exist_ok=True)
    trainer = tiny.trainer(tiny.vision_policy(eos_bias=3.0), folder, num_mini_batches=1, **changes)
    poison(trainer, row)
    before = trainer_state.tensors_of(trainer)
    file = kept_by(trainer, folder)
    with pytest.raises(NonFiniteUpdate) as error:
        trainer.train()
    after = trainer_state.tensors_of(trainer)
    assert all(torch.equal(before[n], after[n]) for n in before if CENTRED not in n)
    assert all(p.grad is None for p in trainer_state.trained(trainer).values())
    return trainer, file, str(error.value)


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


def test_a_gradient_alone_may_break(tmp_path: Path) -> None:
    """The loss is finite. The first parameter going backward is the culprit, not those before it in the model."""
    trainer = tiny.trainer(tiny.vision_policy(), tmp_path, num_mini_batches=1)
    weights = trainer_state.trained(trainer)
    bad = next(name for name in weights if "layers.1.self_attn.v_proj.lora_B" in name)
    handle = weights[bad].register_hook(lambda gradient: gradient * float("inf"))
    before = trainer_state.tensors_of(trainer)
    file = kept_by(trainer, tmp_path)
    with pytest.raises(NonFiniteUpdate, match="the gradient is (nan|inf) at step 1; no weight was changed"):
        trainer.train()
    after = trainer_state.tensors_of(trainer)
    assert all(torch.equal(before[n], after[n]) for n in before if CENTRED not in n)
    report = replay(read_batch(file), trainer)
    assert (report.finite, report.module, report.parameter) == (False, None, bad)
    assert all(row.finite for row in report.rows)
    handle.remove()
    assert replay(read_batch(file), trainer).finite


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_loss_and_gradients_are_those_of_the_update(
    micro_batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every part of the loss, and however many rows go through the model at once."""
    parts = {"entropy_coef": 0.1, "l2": 0.05, "whiten_advantages": False}
    trainer = tiny.trainer(tiny.vision_policy(eos_bias=3.0), tmp_path, num_mini_batches=1, **parts)
    tiny.stirred(trainer.policy_model, 0.1)
    file = kept_by(trainer, tmp_path)
    weights = trainer_state.trained(trainer)
    met: dict[str, Any] = {}

    def stop(stats: dict[str, list[float]]) -> None:
        met.update({name: p.grad.clone() for name, p in weights.items() if p.grad is not None})
        met["loss"] = stats["loss/total"][0]
        raise NonFiniteUpdate("stopped")

    monkeypatch.setattr(trainer.updater, "_step", stop)
    with pytest.raises(NonFiniteUpdate):
        trainer.train()
    again: dict[str, Any] = {}

    def look() -> None:
        again.update({name: p.grad.clone() for name, p in weights.items() if p.grad is not None})
        for p in weights.values():
            p.grad = None

    monkeypatch.setattr(trainer.optimizer, "zero_grad", look)
    trainer.updater.micro_batch = micro_batch
    again["loss"] = replay(read_batch(file), trainer).loss
    assert again["loss"] == pytest.approx(met["loss"], rel=1e-5) and again.keys() == met.keys()
    for name in weights.keys() & met.keys():
        torch.testing.assert_close(again[name], met[name], rtol=1e-4, atol=1e-6)


def test_what_is_wrong_with_a_row_is_said(tmp_path: Path) -> None:
    trainer, file, _ = broken(tmp_path / "a", 5)
    batch = read_batch(file)
    for name in ("advantage_BT", "return_BT", "value_BT"):
        getattr(batch.experience, name).nan_to_num_(0.0)
    for tensor in batch.weights.values():
        tensor.nan_to_num_(0.0)
    batch.experience.advantage_BT[2] = -1.0
    batch.experience.logprobs_BT[2] = -200.0  # e^(200 - |log pi|) is beyond fp32
    report = replay(batch, trainer)
    assert [row.culprit for row in report.rows if not row.finite] == ["its ratio is inf"]
    said = _conclusion(report)
    assert said == f"not finite: row {batch.ids[2]}: its ratio is inf"


def test_conclusions_and_hostile_captions(capsys: pytest.CaptureFixture[str]) -> None:
    bad = [RowReport(f"r{i}", "a [/b] [red]dog", float("nan"), 1.0, 1.0) for i in range(7)]
    report = ReplayReport(bad, float("nan"), "layers.1", None)
    assert _conclusion(report).startswith("not finite: row r0: its loss is nan; row r1: ")
    assert _conclusion(report).endswith(
        "and 2 more rows; the first module with an output that is not finite is layers.1"
    )
    _show(SimpleNamespace(step=3, reason="the [loss]"), report, Console())
    said = capsys.readouterr().out
    assert "step 3: the [loss]" in said and said.count("a [/b] [red]dog") == 7
    good = RowReport("r", "c", 0.5, 1.0, 1.0)
    assert _conclusion(ReplayReport([good], 0.25, None, None)) == "all is finite now: the loss is 0.25"
    together = _conclusion(ReplayReport([good], float("inf"), None, None))
    assert together == "not finite: each row's loss is finite, and that of all is inf"


def test_batches_of_another_model_or_without_rows(tmp_path: Path) -> None:
    trainer, file, _ = broken(tmp_path / "a", 5)
    batch = read_batch(file)
    with pytest.raises(UserError, match="no rows of this process"):
        replay(dataclasses.replace(batch, ids=[]), trainer)
    name = next(iter(batch.weights))
    with pytest.raises(UserError, match="of another model"):
        replay(dataclasses.replace(batch, weights={**batch.weights, name: torch.zeros(1)}), trainer)


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
    assert "step 1: the loss is nan" in said and "not finite: row " in said and "its advantage is nan" in said
    assert main(["replay", str(tmp_path / "nothing")]) == 2
