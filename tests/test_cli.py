"""The command line: what it calls, what it prints, and how it fails."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from mmft.cli import main
from mmft.config import ImageFolderConfig, Recipe, ScenesConfig, load_recipe
from mmft.types import UserError

COMMANDS = ["train", "eval", "generate", "report", "recipes", "validate", "data preview"]


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
    for name, result in {"train": None, "evaluate": None, "generate": ["a dog"], "preview": Path("sheet.png")}.items():
        setattr(job, name, recorder(name, result))
    monkeypatch.setitem(sys.modules, "mmft.run", job)
    monkeypatch.setattr("mmft.run", job, raising=False)
    return seen


@pytest.mark.parametrize("command", COMMANDS)
def test_each_help_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    assert f"Example: mmft {command}" in capsys.readouterr().out


def test_help_lists_what_exists_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(command.split()[0] in out for command in COMMANDS)
    assert not any(later in out for later in ("annotate", "demo", "merge", "push"))


def test_no_arguments_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "Usage: mmft" in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian", "x"], "error: No such command 'trian'. Did you mean 'train'?"),
        (["data", "preveiw"], "error: No such command 'preveiw'. Did you mean 'preview'?"),
        (["train"], "error: Missing argument 'RECIPE'."),
        (["train", "caption_ppo", "--resume"], "error: No such option: --resume"),
        (["train", "nowhere.yaml"], "error: nowhere.yaml: no such recipe"),
        (["train", "caption_ppo", "lr=1"], "error: command line: lr: unknown key; did you mean train.lr?"),
        (["validate", "caption_ppo", "train.batch=63"], "error: recipes/caption_ppo.yaml: train."),
        (["generate", "run", "nowhere.png"], "error: nowhere.png: no such picture"),
        (["report", "nowhere"], "error: nowhere: no such run folder"),
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
    assert calls == [("train", load_recipe("caption_ppo", ["train.steps=3"]))]
    assert isinstance(calls[0][1], Recipe)


def test_eval_passes_target_data_and_overrides(calls: list[tuple[object, ...]]) -> None:
    assert main(["eval", "runs/x", "eval.samples=8", "--data", "photos"]) == 0
    assert main(["eval", "runs/x"]) == 0
    assert calls == [("evaluate", "runs/x", "photos", ["eval.samples=8"]), ("evaluate", "runs/x", None, [])]


def test_generate_prints_a_caption_a_picture(
    calls: list[tuple[object, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "dog.png"
    picture.touch()
    assert main(["generate", "runs/x", str(picture), "--prompt", "What?"]) == 0
    assert capsys.readouterr().out == f"{picture}: a dog\n"
    assert calls == [("generate", "runs/x", [picture], "What?")]


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
    assert "recipes/caption_ppo.yaml  A better captioner" in capsys.readouterr().out


def test_validate_says_valid_or_shows_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "caption_ppo", "train.seed=5"]) == 0
    assert "caption_ppo: valid. ppo on scenes" in capsys.readouterr().out
    assert main(["validate", "caption_ppo", "train.seed=5", "--show"]) == 0
    shown = tmp_path / "shown.yaml"
    shown.write_text(capsys.readouterr().out, encoding="utf-8")
    assert load_recipe(shown) == load_recipe("caption_ppo", ["train.seed=5"])


def test_interrupt_is_one_line_and_status_130(
    calls: list[tuple[object, ...]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(recipe: Recipe) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["mmft.run"], "train", interrupted)
    assert main(["train", "caption_ppo"]) == 130
    assert capsys.readouterr().err.strip() == "interrupted"


def test_a_bug_keeps_its_traceback(calls: list[tuple[object, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(recipe: Recipe) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(sys.modules["mmft.run"], "train", broken)
    with pytest.raises(ZeroDivisionError):
        main(["train", "caption_ppo"])


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("mmft ")
