"""Supervised fine-tuning: its loss is the likelihood of what it shows, and it begins where reinforcement goes on."""

from __future__ import annotations

import dataclasses
import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch

from mmft import run
from mmft.config import RecipeError, load_recipe
from mmft.data.cursor import Shuffled
from mmft.models.interface import Interface
from mmft.models.policy import picture_token_ids
from mmft.report.folder import read_lines
from mmft.run.supervised import check_supervised
from mmft.train.sft import SFTSettings, fine_tune, target_of
from mmft.types import Row, UserError

SMALL = (
    "train.batch=8", "train.samples_per_prompt=2", "train.minibatches=2", "train.epochs=1", "eval.samples=6",
    "data.samples=32", "generation.max_new_tokens=6", "model.lora.r=2", "logging.samples_every=1", "train.save_every=1",
)  # fmt: skip


def tune(policy: Any, rows: list[Row], folder: Path, **settings: Any) -> list[dict[str, float]]:
    seen: list[dict[str, float]] = []
    interface = Interface(policy.model, policy.processor)
    options = {"steps": 1, "batch": 4, "micro_batch": 4, "lr": 1e-4, "use_cpu": True} | settings
    banned = picture_token_ids(policy.model, policy.processor)
    cursor = Shuffled(rows, 0)
    fine_tune(policy.model, interface, banned, cursor, SFTSettings(**options), folder, lambda step, n: seen.append(n))
    return seen


def spoken(count: int = 4) -> list[Row]:
    """Rows of one reference each."""
    return [dataclasses.replace(row, references=row.references[:1]) for row in tiny.rows(count)]


def likelihood(policy: Any, row: Row) -> tuple[float, int]:
    """Summed -log p of a row's reference and EOS, and how many tokens, by the model's own forward pass."""
    processor = policy.processor
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row.prompt}]}]
    text = processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    inputs = processor(images=[row.image], text=[text], return_tensors="pt")
    tokenizer = processor.tokenizer
    answer = [*tokenizer(row.references[0], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    ids = torch.cat([inputs["input_ids"], torch.tensor([answer])], 1)
    with torch.no_grad():
        logits = policy.model(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=inputs["pixel_values"]
        ).logits[0]
    logits[:, picture_token_ids(policy.model, processor)] = -float("inf")
    logprobs = logits.float().log_softmax(-1)[-len(answer) - 1 : -1]
    return -float(logprobs.gather(1, torch.tensor(answer)[:, None]).sum()), len(answer)


def test_the_loss_is_the_mean_over_tokens(tmp_path: Path) -> None:
    policy, rows = tiny.vision_policy(), spoken()
    parts = [likelihood(policy, row) for row in rows]
    expected = sum(nats for nats, _ in parts) / sum(count for _, count in parts)
    ((first),) = tune(policy, rows, tmp_path)
    assert first["loss/sft"] == pytest.approx(expected, abs=1e-4)


def test_it_learns_what_it_is_shown(tmp_path: Path) -> None:
    policy = tiny.vision_policy()
    before = {name: p.clone() for name, p in policy.model.named_parameters()}
    rows = [dataclasses.replace(row, references=("a dog",)) for row in tiny.rows(4)]
    seen = tune(policy, rows, tmp_path, steps=30, micro_batch=2, lr=1e-2)
    assert len(seen) == 30 and seen[-1]["loss/sft"] < 0.7 * seen[0]["loss/sft"]
    changed = {name for name, p in policy.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("lora" in name for name in changed), "adapters alone"
    assert not policy.model.training


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    def weights() -> dict[str, torch.Tensor]:
        policy = tiny.vision_policy()
        tune(policy, tiny.rows(6), tmp_path, steps=2, lr=1e-2, seed=3, workers=2)
        return {name: p for name, p in policy.model.named_parameters() if "lora" in name}

    one, other = weights(), weights()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_is_to_be_said() -> None:
    row, rng = Row("1", None, "what is it?", ("a dog",), "what is it?", "dog"), random.Random(0)
    assert target_of(row, rng) == "dog"
    assert target_of(dataclasses.replace(row, prompt="Briefly: what is it?"), rng) == "dog"
    assert target_of(dataclasses.replace(row, prompt="Describe."), rng) == "a dog", "the question is not asked"
    assert target_of(dataclasses.replace(row, answer=None), rng) == "a dog"
    assert target_of(Row("1", None, "Describe."), rng) is None
    many = Row("1", None, "Describe.", ("a", "b", "c"))
    assert {target_of(many, rng) for _ in range(40)} == {"a", "b", "c"}


def test_rows_without_a_target_are_left_out(tmp_path: Path) -> None:
    rows = [dataclasses.replace(row, references=()) for row in spoken(3)] + spoken(1)
    assert len(tune(tiny.vision_policy(), rows, tmp_path, batch=2, micro_batch=2, steps=3)) == 3
    with pytest.raises(UserError, match="needs references or answers, and the data has none"):
        tune(tiny.vision_policy(), rows[:3], tmp_path)


def test_a_loss_that_is_not_finite_stops(tmp_path: Path) -> None:
    policy = tiny.vision_policy()
    with torch.no_grad():
        next(p for name, p in policy.model.named_parameters() if "lora_A" in name).fill_(float("nan"))
    with pytest.raises(UserError, match=r"sft: the loss is nan at step 1"):
        tune(policy, spoken(), tmp_path)


@pytest.fixture(scope="module")
def warmed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("warm")
    overrides = ("train.steps=2", "warm_up.steps=3", "warm_up.batch=8", "warm_up.lr=1e-2", f"logging.dir={folder}")
    return run.train(load_recipe("caption_ppo_fixed", [*SMALL, *overrides]))


def test_a_warm_up_comes_before_what_is_called_before(warmed: Path, tmp_path: Path) -> None:
    lines = list(read_lines(warmed / "warm_up.jsonl"))
    assert [line["step"] for line in lines] == [1, 2, 3] and "loss/sft" in lines[0]
    assert [line["step"] for line in read_lines(warmed / "metrics.jsonl")] == [1, 2], "steps count from 1 as ever"
    cold = run.train(load_recipe("caption_ppo_fixed", [*SMALL, "train.steps=1", f"logging.dir={tmp_path}"]))
    assert (cold / "before.json").read_text() != (warmed / "before.json").read_text()


def test_a_resumed_run_is_not_warmed_again(warmed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ("train.steps=3", "warm_up.steps=3", "warm_up.batch=8", "warm_up.lr=1e-2")
    recipe = load_recipe("caption_ppo_fixed", [*SMALL, *overrides, f"logging.dir={warmed.parent}"])
    log = (warmed / "warm_up.jsonl").read_bytes()
    copy = shutil.copytree(warmed, tmp_path / warmed.name)
    assert run.train(recipe, resume=str(copy), force=True) == copy
    said = capsys.readouterr().err
    assert "going on after step 2" in said and "warm-up" not in said
    assert (copy / "warm_up.jsonl").read_bytes() == log


def test_a_whole_run(tmp_path: Path) -> None:
    overrides = ("algorithm={type: sft}", "train.steps=3", "train.lr=1e-3", f"logging.dir={tmp_path}")
    folder = run.train(load_recipe("caption_ppo_fixed", [*SMALL, *overrides]))
    lines = list(read_lines(folder / "metrics.jsonl"))
    assert [line["step"] for line in lines] == [1, 2, 3] and {"loss/sft", "lr", "sft/grad_norm"} <= lines[0].keys()
    assert (folder / "adapter" / "adapter_model.safetensors").is_file() and (folder / "eval.json").is_file()
    assert not (folder / "critic").exists(), "no critic was trained"
    assert "Loss of supervised fine-tuning" in (folder / "report.html").read_text()


def test_what_does_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="warm_up: algorithm sft is what it would do"):
        load_recipe("caption_ppo_fixed", ["algorithm={type: sft}", "warm_up.steps=2"])
    with pytest.raises(RecipeError, match="micro_batch: 3 does not divide warm_up.batch 8"):
        load_recipe("caption_ppo_fixed", ["warm_up.batch=8", "warm_up.micro_batch=3"])

    def job(processes: int, *overrides: str) -> Any:
        recipe = load_recipe("caption_ppo_fixed", list(overrides))
        return SimpleNamespace(recipe=recipe, processes=SimpleNamespace(count=processes))

    check_supervised(job(2), "")
    check_supervised(job(1, "warm_up.steps=2"), "")
    with pytest.raises(UserError, match="warm_up: runs in one process"):
        check_supervised(job(2, "warm_up.steps=2"), None)
    with pytest.raises(UserError, match="algorithm sft: keeps no checkpoints"):
        check_supervised(job(1, "algorithm={type: sft}"), "")
