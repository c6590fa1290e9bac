"""The command line: what it calls, what it prints, and how it fails."""

from __future__ import annotations

import re
import signal
import sys
import types
from pathlib import Path

import pytest

from mmft.cli import main
from mmft.config import ImageFolderConfig, Recipe, ScenesConfig, load_recipe, load_reward_recipe
from mmft.types import Stopped, UserError

COMMANDS = [
    "train", "eval", "generate", "report", "recipes", "validate", "plan", "replay", "push", "pull", "merge",
    "data preview", "data check", "reward train", "reward score", "reward data",
]  # fmt: skip


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmft.cli._quiet_libraries", lambda: None)  # it sets process-wide filters
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """Stand-in for mmft.run that records what the command line asks of it."""
    seen: list[tuple[object, ...]] = []

    def recorder(name: str, result: object = None):
        def record(*arguments: object) -> object:
            seen.append((name, *arguments))
            return result

        return record

    job = types.ModuleType("mmft.run")
    results = {
        "train": None, "evaluate": None, "generate": ["a dog"], "preview": Path("sheet.png"), "train_reward": None,
        "evaluate_reward": None, "score_captions": [{"caption": "a dög", "reward": 0.5}], "write_judgements": 7,
        "replay_batch": False,
    }  # fmt: skip
    for name, result in results.items():
        setattr(job, name, recorder(name, result))
    job.is_reward_model = lambda target: target == "runs/reward"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mmft.run", job)
    monkeypatch.setattr("mmft.run", job, raising=False)
    return seen


@pytest.mark.parametrize("command", COMMANDS)
def test_each_help_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    assert re.search(f"Examples?: mmft {command}", capsys.readouterr().out)


def test_help_lists_what_exists_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(command.split()[0] in out for command in COMMANDS)
    assert not any(later in out for later in ("annotate", "demo"))


def test_no_arguments_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "Usage: mmft" in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian", "x"], "error: No such command 'trian'. Did you mean 'train'?"),
        (["data", "preveiw"], "error: No such command 'preveiw'. Did you mean 'preview'?"),
        (["train"], "error: Missing argument 'RECIPE'."),
        (["train", "caption_ppo", "logging.dir=none", "--resume"], "error: none/caption_ppo: no run to resume"),
        (["train", "caption_ppo", "--resume", "nowhere"], "error: nowhere: no such run folder"),
        (["train", "caption_ppo", "--force"], "error: --force: goes with --resume"),
        (["train", "nowhere.yaml"], "error: nowhere.yaml: no such recipe"),
        (["train", "caption_ppo", "lr=1"], "error: command line: lr: unknown key; did you mean train.lr?"),
        (["validate", "caption_ppo", "train.batch=63"], "error: recipes/caption_ppo.yaml: train."),
        (["generate", "run", "nowhere.png"], "error: nowhere.png: no such picture"),
        (["report", "nowhere"], "error: nowhere: no such run folder"),
        (["replay", "nowhere.safetensors"], "error: nowhere.safetensors: no such file"),
        (["reward", "trian"], "error: No such command 'trian'. Did you mean 'train'?"),
        (["reward", "train", "captoin"], "error: captoin: no such recipe; did you mean reward_models/caption.yaml?"),
        (["reward", "train", "caption", "lr=1"], "error: command line: lr: unknown key; did you mean train.lr?"),
        (["reward", "score", "runs/reward"], "error: Missing option '--data'"),
        (["data", "preview", "--rows", "0"], "error: Invalid value for '--rows'"),
    ],
)
def test_user_errors_are_one_line_and_status_2(
    arguments: list[str],
    expected: str,
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(repository)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(expected)
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("place", [0, 1, 3])
def test_debug_shows_the_traceback_wherever_it_stands(place: int) -> None:
    arguments = ["train", "caption_ppo", "lr=1"]
    arguments.insert(place, "--debug")
    with pytest.raises(UserError):
        main(arguments)


def test_train_passes_the_checked_recipe(calls: list[tuple[object, ...]]) -> None:
    assert main(["train", "caption_ppo", "train.steps=3", "--debug"]) == 0
    assert calls == [("train", load_recipe("caption_ppo", ["train.steps=3"]), None, False)]
    assert isinstance(calls[0][1], Recipe)


@pytest.mark.parametrize(
    ("arguments", "resume"),
    [
        (["caption_ppo", "--resume"], ""),
        (["--resume", "caption_ppo"], ""),
        (["caption_ppo", "--resume", "train.steps=3"], ""),
        (["caption_ppo", "--resume", "--force"], ""),
        (["caption_ppo", "--resume", "runs/x"], "runs/x"),
        (["caption_ppo", "train.steps=3", "--resume=runs/x=y"], "runs/x=y"),
    ],
)
def test_resume_may_have_a_value(arguments: list[str], resume: str, calls: list[tuple[object, ...]]) -> None:
    assert main(["train", *arguments]) == 0
    assert calls[0][2:] == (resume, "--force" in arguments)


def test_a_stopped_run_tells_by_which_signal(monkeypatch: pytest.MonkeyPatch, calls: list[tuple[object, ...]]) -> None:
    def stopped(*arguments: object) -> None:
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(sys.modules["mmft.run"], "train", stopped)
    assert main(["train", "caption_ppo"]) == 143


def test_eval_passes_target_data_and_overrides(calls: list[tuple[object, ...]]) -> None:
    assert main(["eval", "runs/x", "eval.samples=8", "--data", "photos"]) == 0
    assert main(["eval", "runs/x"]) == 0
    assert main(["eval", "runs/reward", "eval.pictures=8", "--data", "mine.jsonl"]) == 0
    assert calls == [
        ("evaluate", "runs/x", "photos", ["eval.samples=8"]),
        ("evaluate", "runs/x", None, []),
        ("evaluate_reward", "runs/reward", "mine.jsonl", ("eval.pictures=8",)),
    ]


def test_reward_commands_pass_what_they_are_given(
    calls: list[tuple[object, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reward", "train", "caption", "train.steps=3"]) == 0
    assert main(["reward", "data", "caption_linear", "out.jsonl", "data.pictures=9"]) == 0
    assert main(["reward", "score", "runs/reward", "--data", "scenes", "--limit", "2"]) == 0
    assert calls == [
        ("train_reward", load_reward_recipe("caption", ["train.steps=3"])),
        ("write_judgements", load_reward_recipe("caption_linear", ["data.pictures=9"]), Path("out.jsonl")),
        ("score_captions", "runs/reward", "scenes", 2),
    ]
    assert capsys.readouterr().out == 'out.jsonl: 7 judgements\n{"caption": "a dög", "reward": 0.5}\n'


def test_generate_prints_a_caption_a_picture(
    calls: list[tuple[object, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "dog.png"
    picture.touch()
    assert main(["generate", "runs/x", str(picture), "--prompt", "What?"]) == 0
    assert capsys.readouterr().out == f"{picture}: a dog\n"
    assert calls == [("generate", "runs/x", [picture], "What?")]


def test_replay_passes_overrides_and_tells_that_numbers_are_not_finite(
    calls: list[tuple[object, ...]], tmp_path: Path
) -> None:
    (tmp_path / "batch").touch()
    assert main(["replay", str(tmp_path / "batch"), "train.precision=fp32"]) == 1
    assert calls == [("replay_batch", tmp_path / "batch", ["train.precision=fp32"])]


def test_preview_shows_the_scenes_or_a_recipes_data(calls: list[tuple[object, ...]]) -> None:
    folder = "data={type: imagefolder, path: photos}"
    assert main(["data", "preview", "--seed", "3"]) == 0
    assert main(["data", "preview", "caption_ppo", folder, "--rows", "4", "--out", "out.png"]) == 0
    assert calls == [
        ("preview", ScenesConfig(seed=3), 12, Path("contact_sheet.png")),
        ("preview", ImageFolderConfig(path="photos"), 4, Path("out.png")),
    ]


def test_recipes_lists_each_with_its_first_line(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(repository)
    assert main(["recipes"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert [line for line in lines if line.startswith("recipes/caption_ppo.yaml A better captioner")]
    assert [line for line in lines if line.startswith("reward_models/caption_linear.yaml The weights of BLEU")]
    folders = [line.partition("/")[0] for line in lines]
    assert folders == sorted(folders) and set(folders) == {"recipes", "reward_models"}


def test_validate_says_valid_or_shows_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "caption_ppo", "train.seed=5"]) == 0
    assert "caption_ppo: valid. ppo on scenes" in capsys.readouterr().out
    assert main(["validate", "caption_ppo", "train.seed=5", "--show"]) == 0
    shown = tmp_path / "shown.yaml"
    shown.write_text(capsys.readouterr().out, encoding="utf-8")
    assert load_recipe(shown) == load_recipe("caption_ppo", ["train.seed=5"])


def test_validate_tells_a_reward_models_recipe(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its folder, by its name, or by what is in it."""
    monkeypatch.chdir(repository)
    for recipe in ("reward_models/caption.yaml", "caption"):
        assert main(["validate", recipe, "model.fusion=sum", "train.steps=7"]) == 0
        said = capsys.readouterr().out
        assert said.startswith(f"{recipe}: valid. Reward model: bradley_terry on scenes, sum of builtin:tiny-vlm and ")
        assert "at most 7 steps" in said and "bleu, detail, length" in said and said.count("\n") == 1
    assert main(["validate", "caption_linear"]) == 0
    assert "steps" not in capsys.readouterr().out, "no network, no steps"
    assert main(["validate", "caption_mse", "train.seed=5", "--show"]) == 0
    shown = tmp_path / "shown.yaml"
    shown.write_text(capsys.readouterr().out, encoding="utf-8")
    assert main(["validate", str(shown)]) == 0
    assert load_reward_recipe(shown) == load_reward_recipe("caption_mse", ["train.seed=5"])
    assert main(["validate", "reward_models/caption.yaml", "loss=mes"]) == 2
    assert capsys.readouterr().err == 'error: command line: loss: unknown value "mes"; did you mean mse?\n'


def test_interrupt_is_one_line_and_status_130(
    calls: list[tuple[object, ...]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["mmft.run"], "train", interrupted)
    assert main(["train", "caption_ppo"]) == 130
    assert capsys.readouterr().err.strip() == "interrupted"


def test_a_bug_keeps_its_traceback(calls: list[tuple[object, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(sys.modules["mmft.run"], "train", broken)
    with pytest.raises(ZeroDivisionError):
        main(["train", "caption_ppo"])


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("mmft ")
