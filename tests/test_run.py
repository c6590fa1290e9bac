"""The whole job through `mmft.run` and the command line: run folder, determinism, one's own pictures, and errors."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, set_seed

from mmft import run
from mmft.cli import main
from mmft.config import ModelConfig, load_recipe
from mmft.models.policy import load_policy
from mmft.models.prompts import PromptBuilder, pad_prompts
from mmft.report.folder import RunFolder, read_lines
from mmft.run.training import build_trainer
from mmft.types import UserError

SMALL = (
    "train.steps=2", "train.batch=8", "train.samples_per_prompt=2", "eval.samples=4", "data.samples=40",
    "generation.max_new_tokens=8", "model.lora.r=2", "logging.samples_every=1",
)  # fmt: skip


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmft.cli._quiet_libraries", lambda: None)  # it sets process-wide filters
    monkeypatch.setenv("COLUMNS", "120")


def recipe(root: Path, *overrides: str) -> Any:
    return load_recipe("caption_ppo", [*SMALL, f"logging.dir={root}", *overrides])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One short run of the default recipe; tests that read it leave it as it is."""
    return run.train(recipe(tmp_path_factory.mktemp("runs")))


def test_the_run_folder_is_complete(finished: Path) -> None:
    expected = {
        "recipe.yaml", "metrics.jsonl", "timing.jsonl", "samples.jsonl", "eval.json", "eval_samples.jsonl",
        "report.html", "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
        "critic/value_head.safetensors", "reward/state.json",
    }  # fmt: skip
    written = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    assert expected <= written
    assert not [name for name in written if ".tmp" in name or name.startswith(".")]
    assert load_recipe(finished / "recipe.yaml").model_dump() == recipe(finished.parent).model_dump()


def test_every_step_and_every_sample_are_logged(finished: Path) -> None:
    folder = RunFolder(finished)
    metrics, samples = folder.metrics(), list(folder.samples())
    assert [line["step"] for line in metrics] == [1, 2]
    for line in metrics:
        assert line["policy/ratio_first"] == 1.0
        assert not [name for name in line if "time" in name]
        assert all(value is not None for value in line.values())
    assert {"objective/kl", "anchor/l2_distance", "reward/raw/bleu", "reward/weighted/network"} <= set(metrics[0])
    assert [sample["step"] for sample in samples] == [1] * 8 + [2] * 8
    for sample in samples:
        weighted = sum(term["weighted"] for term in sample["terms"].values())
        assert sample["reward"] == pytest.approx(weighted, abs=1e-6)
        assert len(sample["references"]) == 5 and "scene" not in sample


def test_the_evaluation_has_both_sides_and_the_oracle(finished: Path) -> None:
    record = json.loads((finished / "eval.json").read_text())
    for side in ("before", "after"):
        assert {"reward", "bleu_4", "oracle_recall", "oracle_precision", "oracle_hallucination"} <= set(record[side])
        reward = record[side]["reward"]
        assert reward["low"] <= reward["mean"] <= reward["high"]
    assert record["samples"] == 4
    assert record["before"]["oracle_precision"]["mean"] > 0.7, "the bundled model sees"
    assert len(RunFolder(finished).eval_samples()) == 4


def test_the_adapter_is_plain_peft_and_gives_the_trained_logits(finished: Path, tmp_path: Path) -> None:
    """Trained once more by the same seed: the model in memory against the one that PEFT alone loads from the folder."""
    job = run.prepare(recipe(tmp_path))
    set_seed(job.recipe.train.seed)
    policy = load_policy(job.recipe.model, "cpu", torch.float32)
    build_trainer(job, policy, RunFolder.create(tmp_path, "again")).train()
    builder = PromptBuilder(policy.processor)
    inputs = pad_prompts([builder(job.heldout[i]) for i in range(3)], builder.pad_id, "left")
    base = AutoModelForImageTextToText.from_pretrained(ModelConfig().resolved_path(), dtype=torch.float32)
    with torch.no_grad():
        bare = base(**inputs).logits
        plain = PeftModel.from_pretrained(base, str(finished / "adapter")).eval()
        loaded, trained = plain(**inputs).logits, policy.model.eval()(**inputs).logits
    assert torch.equal(loaded, trained)
    assert (loaded - bare).abs().max() > 1e-4


def test_the_same_seed_leaves_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    again = run.train(recipe(tmp_path / "a"))
    for name in ("metrics.jsonl", "samples.jsonl", "eval_samples.jsonl", "adapter/adapter_model.safetensors"):
        assert (again / name).read_bytes() == (finished / name).read_bytes(), name
    other = run.train(recipe(tmp_path / "b", "train.seed=1", "train.save_every=1"))
    assert (other / "metrics.jsonl").read_bytes() != (finished / "metrics.jsonl").read_bytes()


@pytest.mark.slow  # tests/test_resume.py asks the same of more
def test_saving_on_the_way_changes_nothing(finished: Path, tmp_path: Path) -> None:
    """Reading an adapter back draws random numbers inside PEFT; the run must not feel it."""
    saved = run.train(recipe(tmp_path, "train.save_every=1", "train.keep=1", "eval.every=1"))
    numbers = [line for line in read_lines(saved / "metrics.jsonl") if "objective/kl" in line]
    assert numbers == RunFolder(finished).metrics()
    assert "objective/kl" not in RunFolder(saved).metrics()[-1], "the evaluation comes last here"
    assert RunFolder(saved).last_step() == numbers[-1], "the table's KL and L2 are the last step's all the same"
    assert [path.name for path in (saved / "checkpoints").glob("step-*")] == ["step-2"]
    assert (saved / "checkpoints/step-2/adapter/adapter_model.safetensors").read_bytes() == (
        finished / "adapter/adapter_model.safetensors"
    ).read_bytes()


def test_the_command_prints_its_own_words_only(tmp_path: Path, repository: Path) -> None:
    """No library's warning, advice or loading bar reaches a user who asked for nothing of the kind."""
    small = ["train.steps=1", *SMALL[1:], f"logging.dir={tmp_path}"]
    command = [sys.executable, "-m", "mmft", "train", "caption_ppo", *small]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert "Oracle recall" in said and "adapter: " in said
    assert not [
        line for line in said.splitlines() if "warn" in line.lower() or "%|" in line or "[transformers]" in line
    ]


def test_a_save_that_went_wrong_is_not_reported_as_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = PeftModel.save_pretrained

    def altered(self: Any, folder: str, **options: Any) -> None:
        original(self, folder, **options)
        file = Path(folder) / "adapter_model.safetensors"
        tensors = load_file(file)
        for name in tensors:
            tensors[name] = torch.zeros_like(tensors[name])
        save_file(tensors, file, {"format": "pt"})

    monkeypatch.setattr(PeftModel, "save_pretrained", altered)
    with pytest.raises(RuntimeError, match="gives other logits than the trained one"):
        run.train(recipe(tmp_path))
    assert not (tmp_path / "caption_ppo" / "adapter").exists()
    assert not (tmp_path / "caption_ppo" / "eval.json").exists()


def test_eval_and_generate_read_the_run(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    (copy / "eval.json").unlink()
    assert main(["eval", str(copy)]) == 0
    again, first = (json.loads((folder / "eval.json").read_text()) for folder in (copy, finished))
    assert again["after"] == first["after"] and again["before"] == first["before"]
    picture = tmp_path / "scene.png"
    tiny.rows(1)[0].image.save(picture)
    capsys.readouterr()
    assert main(["generate", str(finished), str(picture)]) == 0
    assert main(["generate", "builtin:tiny-vlm", str(picture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(
        line.startswith(f"{picture}: ") and len(line) > len(str(picture)) + 5 for line in lines
    )


def test_every_weight_may_train(tmp_path: Path) -> None:
    """Without adapters the trained model itself is saved, and `eval` finds it."""
    folder = run.train(recipe(tmp_path, "model.lora=null", "anchor.l2=0.001", "train.steps=1", "train.lr=1e-5"))
    assert (folder / "adapter" / "model.safetensors").is_file()
    assert RunFolder(folder).metrics()[0]["policy/ratio_first"] == 1.0
    record = run.evaluate(str(folder))
    assert (
        record["after"]["reward"]["mean"] == json.loads((folder / "eval.json").read_text())["after"]["reward"]["mean"]
    )


# One's own pictures


def pictures(folder: Path, count: int = 3, caption: bool = True) -> Path:
    folder.mkdir()
    lines = []
    for i in range(count):
        colours = np.random.default_rng(i).integers(0, 255, (40 + 10 * i, 60, 3), dtype=np.uint8)
        Image.fromarray(colours).save(folder / f"{i}.png")
        line: dict[str, Any] = {"file_name": f"{i}.png"}
        lines.append(line | {"caption": [f"coloured noise number {i}", "a noisy picture"]} if caption else line)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def own_data(root: Path, folder: Path, *more: str) -> list[str]:
    small = [item for item in SMALL if not item.startswith("data.")]
    where = ["data.type=imagefolder", f"data.path={folder}"]
    return ["train", "caption_ppo", *small, f"logging.dir={root / 'runs'}", *where, *more]


def test_two_overrides_train_on_a_folder_smaller_than_the_batch(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "mine")
    assert main(own_data(tmp_path, folder, "train.samples_per_prompt=1", "data.eval_fraction=0.4")) == 0
    metrics = RunFolder(tmp_path / "runs" / "caption_ppo").metrics()
    assert [line["step"] for line in metrics] == [1, 2]
    record = json.loads((tmp_path / "runs/caption_ppo/eval.json").read_text())
    assert "bleu_4" in record["after"] and "oracle_recall" not in record["after"]
    assert (tmp_path / "runs/caption_ppo/report.html").is_file()


# What the user can mend: status 2, one line, nothing written; with --debug the traceback


def broken_checkpoint(tmp_path: Path, change: Any) -> str:
    folder = tmp_path / "checkpoint"
    model = tiny.llava()
    model.lm_head = torch.nn.Linear(32, len(tiny.processor().tokenizer), bias=False)
    model.save_pretrained(folder)
    tiny.processor().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return f"model.path={folder}"


def case_missing_picture(tmp_path: Path) -> list[str]:
    folder = pictures(tmp_path / "mine")
    (folder / "1.png").unlink()
    return own_data(tmp_path, folder, "data.on_bad_row=raise")


def case_torn_picture(tmp_path: Path) -> list[str]:
    folder = pictures(tmp_path / "mine")
    (folder / "1.png").write_bytes(b"no picture")
    return own_data(tmp_path, folder, "data.on_bad_row=raise")


def case_no_folder(tmp_path: Path) -> list[str]:
    return own_data(tmp_path, tmp_path / "nowhere")


def case_no_references(tmp_path: Path) -> list[str]:
    return own_data(tmp_path, pictures(tmp_path / "mine", caption=False), "data.eval_fraction=0.4")


def case_batch(tmp_path: Path) -> list[str]:
    return ["train", "caption_ppo", "train.batch=10", "train.samples_per_prompt=4", f"logging.dir={tmp_path / 'runs'}"]


def case_typo(tmp_path: Path) -> list[str]:
    return ["train", "caption_ppo", "train.stepz=10", f"logging.dir={tmp_path / 'runs'}"]


def case_unwritable(tmp_path: Path) -> list[str]:
    (tmp_path / "file").write_text("")
    return ["train", "caption_ppo", *SMALL, f"logging.dir={tmp_path / 'file'}"]


def case_no_model(tmp_path: Path) -> list[str]:
    return ["train", "caption_ppo", *SMALL, f"logging.dir={tmp_path / 'runs'}", f"model.path={tmp_path / 'nowhere'}"]


def case_nan(tmp_path: Path) -> list[str]:
    path = broken_checkpoint(tmp_path, lambda tensors: tensors["language_model.lm_head.weight"].fill_(float("nan")))
    return ["train", "caption_ppo", *SMALL, f"logging.dir={tmp_path / 'runs'}", path]


def case_lacking(tmp_path: Path) -> list[str]:
    path = broken_checkpoint(tmp_path, lambda tensors: tensors.pop(next(name for name in tensors if "norm" in name)))
    return ["train", "caption_ppo", *SMALL, f"logging.dir={tmp_path / 'runs'}", path]


def case_placeholder(tmp_path: Path) -> list[str]:
    return ["train", "caption_ppo", *SMALL, f"logging.dir={tmp_path / 'runs'}", "data.prompt='See <image>'"]


ERRORS = {
    case_missing_picture: ("1.png", "metadata.jsonl", "row 2"),
    case_torn_picture: ("1.png",),
    case_no_folder: ("nowhere",),
    case_no_references: ("reward term 'bleu' needs references", "terms that do without: bad_ending"),
    case_batch: ("train.samples_per_prompt", "4 does not divide train.batch 10"),
    case_typo: ("train.stepz", "did you mean steps?"),
    case_unwritable: ("file", "cannot write"),
    case_no_model: ("model.path", "nowhere", "no such folder"),
    case_nan: ("model.path", "not finite", "lm_head.weight"),
    case_lacking: ("model.path", "lacks 1 weights", "norm"),
    case_placeholder: ("placeholder '<image>'",),
}


def last_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("case", ERRORS, ids=lambda case: case.__name__.removeprefix("case_"))
def test_what_the_user_can_mend_is_one_line(case: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments: Sequence[str] = case(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    (line,) = last_lines(captured.err)
    assert captured.err.endswith(line + "\n")
    assert all(part in line for part in ERRORS[case]), line
    with pytest.raises(UserError):
        main([*arguments, "--debug"])


def test_data_errors_come_before_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*arguments: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("mmft.run.training.load_policy", loaded)
    for case in (case_no_references, case_unwritable, case_no_folder):
        (tmp_path / case.__name__).mkdir()
        assert main(case(tmp_path / case.__name__)) == 2
