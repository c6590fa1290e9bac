"""`mmft reward train`, `score`, `data`; `mmft eval` and `report` on what they leave: every shipped recipe, small."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from mmft.cli import main
from mmft.config import load_reward_recipe, resolve
from mmft.data.scenes import make_scene, render
from mmft.report.folder import read_lines
from mmft.rewards.preferences import read_judgements
from mmft.rewards.sources import open_judgements
from mmft.types import UserError

NAMES = ("caption", "caption_linear", "caption_aleatoric", "caption_mse", "preference_bt")
DATA = ("data.pictures=24", "data.candidates=3", "data.pairs=2")
LESS = ("eval.pictures=8", "train.steps=3", "train.batch=8", "train.every=2", "train.validation=0.3")
NETWORK = ("model.hidden=16", "model.heads=2", "model.layers=1", "model.image_tokens=4", "model.mc_samples=2")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmft.cli._quiet_libraries", lambda: None)  # it sets process-wide filters
    monkeypatch.setenv("COLUMNS", "120")


def settings(name: str, root: Path, *more: str) -> list[str]:
    """Overrides that make a shipped recipe small."""
    return [*LESS, *(NETWORK if name != "caption_linear" else ()), f"logging.dir={root}", *more]


def train(name: str, root: Path, *more: str) -> Path:
    """Through the command line; the folder it makes."""
    overrides = settings(name, root, *more)
    assert main(["reward", "train", name, *overrides]) == 0
    return root / load_reward_recipe(name, overrides).run_name


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a shipped recipe's model, trained at the first call; tests that read it leave it as it is."""
    root, made = tmp_path_factory.mktemp("rewards"), {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = train(name, root, *DATA)
        return made[name]

    return folder


def record_of(folder: Path, name: str = "eval.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def scores(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["reward", "score", *arguments]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


# Training


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_leaves_a_whole_model(name: str, trained: Callable[[str], Path]) -> None:
    folder = trained(name)
    recipe = load_reward_recipe(folder / "recipe.yaml")
    assert recipe == load_reward_recipe(name, settings(name, folder.parent, *DATA))
    written = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"config.json", "model.safetensors", "recipe.yaml", "eval.json", "report.html"} <= written
    assert not [name for name in written if ".tmp" in name or name.endswith((".bin", ".pt", ".pkl", ".py"))]
    assert all(bool(tensor.isfinite().all()) for tensor in load_file(folder / "model.safetensors").values())
    config = record_of(folder, "config.json")
    assert config["model_type"] == "caption_reward" and config["loss"] == recipe.loss
    assert [entry["type"] for entry in config["terms"]] == [term.type for term in recipe.terms]
    assert config["reward_scale"] > 0
    record = record_of(folder)
    assert record["samples"]["pictures"] == 8
    assert record["pairwise"]["reward"]["all"]["low"] <= record["pairwise"]["reward"]["all"]["mean"]
    assert {"bleu", "length"} <= set(record["pairwise"]), "the baselines"
    if recipe.model is None:
        return
    assert {"tokenizer.json", "vision/preprocessor_config.json"} & written, "words and pictures of its own"
    assert [line["step"] for line in read_lines(folder / "metrics.jsonl")] == [2, 3]
    assert 0 <= record["ood"]["auroc"]["mean"] <= 1


def test_the_weights_are_those_that_the_record_shows(trained: Callable[[str], Path]) -> None:
    for name in ("caption", "caption_linear", "caption_aleatoric"):
        config, record = record_of(trained(name), "config.json"), record_of(trained(name))
        shown = {weight["name"]: weight for weight in record["weights"]}
        expected = {entry["name"] or entry["type"]: entry["weight"] for entry in config["terms"]}
        if config["fusion"] is not None:
            expected["network"] = config["network_weight"]
        assert {label: weight["weight"] for label, weight in shown.items()} == pytest.approx(expected)
        assert all(0 <= weight["low"] <= weight["high"] for weight in shown.values())


@pytest.mark.parametrize("name", ["caption_aleatoric", "caption_mse"])
def test_ratings_are_judged_as_ratings(name: str, trained: Callable[[str], Path]) -> None:
    record, config = record_of(trained(name)), record_of(trained(name), "config.json")
    assert record["samples"]["ratings"] > 8 and "kendall_tau" in record
    assert set(record["calibration"]["ratings"]["coverage"]) == {"0.5", "0.8", "0.9", "0.95"}
    assert (config["noise_std"] > 0) == (name == "caption_mse"), "one noise for all, or a head that tells it"


def test_the_same_seed_gives_the_same_bytes(trained: Callable[[str], Path], tmp_path: Path) -> None:
    again = train("preference_bt", tmp_path, *DATA)
    for name in ("model.safetensors", "metrics.jsonl", "eval.json"):
        assert (again / name).read_bytes() == (trained("preference_bt") / name).read_bytes(), name


# Scores


def test_a_score_has_every_term_raw_and_weighted(
    trained: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trained("caption")
    lines = scores(capsys, str(folder), "--data", "scenes", "--limit", "2")
    assert len(lines) == 10 and len({line["id"] for line in lines}) == 2, "five references of each of two scenes"
    config = record_of(folder, "config.json")
    factor = {entry["type"]: config["reward_scale"] * entry["weight"] for entry in config["terms"]}
    factor["network"] = config["reward_scale"] * config["network_weight"]
    for cost in ("length", "repetition", "bad_ending"):
        factor[cost] *= -1
    for line in lines:
        assert {name: factor[name] * value for name, value in line["terms"].items()} == pytest.approx(line["weighted"])
        assert set(line["terms"]) == {"bleu", "detail", "length", "repetition", "bad_ending", "network"}
        assert line["reward"] == pytest.approx(sum(line["weighted"].values()))
        assert line["mean"] == pytest.approx(line["terms"]["network"])
        assert line["sigma"] == pytest.approx(math.hypot(line["sigma_epistemic"], line["sigma_aleatoric"]), rel=1e-5)
        assert line["sigma_epistemic"] > 0 and line["sigma_aleatoric"] == 0, "a preference has no noise of its own"


def test_a_model_of_ratings_tells_the_noise(trained: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("caption_aleatoric", "caption_mse"):
        line = scores(capsys, str(trained(name)), "--data", "scenes", "--limit", "1")[0]
        assert line["sigma_aleatoric"] > 0 and line["sigma_epistemic"] > 0
        assert line["sigma"] == pytest.approx(math.hypot(line["sigma_epistemic"], line["sigma_aleatoric"]), rel=1e-5)


def test_weights_alone_predict_no_sigma(trained: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    lines = scores(capsys, str(trained("caption_linear")), "--data", "scenes", "--limit", "1")
    assert len(lines) == 5 and not [key for key in lines[0] if key.startswith(("mean", "sigma"))]
    assert lines[0]["reward"] == pytest.approx(sum(lines[0]["weighted"].values()))


def test_a_caption_is_scored_without_itself(
    trained: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All pictures of a folder, held out or not; a caption against the picture's others, one alone against itself."""
    folder = captioned(tmp_path / "mine", 3, [["a red dog", "two green cats"], ["a red dog"], []])
    lines = scores(capsys, str(trained("caption_linear")), "--data", str(folder))
    assert [line["caption"] for line in lines] == ["a red dog", "two green cats", "a red dog"]
    assert lines[0]["terms"]["bleu"] < 0.5 and lines[2]["terms"]["bleu"] == pytest.approx(1.0)


def test_the_bundled_model_prefers_what_is_true(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    scene = make_scene(3, "heldout")
    render(scene).save(tmp_path / "scene.png")
    pair = {"image": "scene.png", "chosen": "true", "rejected": "a blue zebra and three bicycles on the left"}
    true = scores(capsys, "builtin:caption-reward", "--data", "scenes", "--limit", "4")[-5]["caption"]
    judged = pair | {"chosen": true, "references": [true]}
    (tmp_path / "pair.jsonl").write_text(json.dumps(judged) + "\n", encoding="utf-8")
    chosen, rejected = scores(capsys, "builtin:caption-reward", "--data", str(tmp_path / "pair.jsonl"))
    assert (chosen["role"], rejected["role"]) == ("chosen", "rejected")
    assert chosen["mean"] > rejected["mean"] and chosen["reward"] > rejected["reward"]


# Files of judgements


@pytest.mark.parametrize(
    ("name", "suffix", "kind"),
    [
        ("caption_linear", "jsonl", "pairs"),
        ("caption_linear", "parquet", "pairs"),
        ("caption_aleatoric", "jsonl", "ratings"),
    ],
)
def test_what_is_written_can_be_learned_from(
    name: str, suffix: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / f"judged.{suffix}"
    assert main(["reward", "data", name, str(file), *settings(name, tmp_path, *DATA)]) == 0
    items = read_judgements(file)
    pictures = len({item.picture_key for item in items})
    assert capsys.readouterr().out == f"{file}: {len(items)} judgements\n"
    assert pictures == 24
    folder = train(name, tmp_path, "data.type=file", f"data.path={file}")
    record = record_of(folder)
    held = record["samples"]
    assert 0 < held["pictures"] < pictures and held[kind] == len(
        [item for item in items if item.picture_key in held_out(folder)]
    )
    assert load_reward_recipe(folder / "recipe.yaml").data.type == "file"
    lines = scores(capsys, str(folder), "--data", str(file), "--limit", "3")
    assert len(lines) == (6 if kind == "pairs" else 3)
    key = "role" if kind == "pairs" else "rating"
    assert all(key in line and line["kind"] for line in lines)


def held_out(folder: Path) -> set[str]:
    recipe = load_reward_recipe(folder / "recipe.yaml")
    return {item.picture_key for item in open_judgements(recipe).heldout}


def captioned(folder: Path, count: int, captions: list[list[str]]) -> Path:
    folder.mkdir()
    lines = []
    for i in range(count):
        colours = np.random.default_rng(i).integers(0, 255, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(colours).save(folder / f"{i}.png")
        lines.append({"file_name": f"{i}.png", "caption": captions[i % len(captions)]})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def test_corruptions_of_the_scenes(tmp_path: Path) -> None:
    folder = train("caption_linear", tmp_path, "data.type=corruptions", "data.pictures=24", "data.per_picture=3")
    record = record_of(folder)
    assert record["samples"]["pictures"] == 8 and record["samples"]["pairs"] == 24
    kinds = record["pairwise"]["reward"]["by_kind"]
    assert {"negation", "truncation"} & set(kinds) and sum(found["pairs"] for found in kinds.values()) == 24


def test_corruptions_of_ones_own_pictures(tmp_path: Path) -> None:
    captions = [
        ["two red dogs on a green chair", "red dogs"],
        ["a small cat under three blue trees", "a cat in the shade"],
        ["a white bird above the house"],
    ]
    mine = captioned(tmp_path / "mine", 12, captions)
    source = f"data.source={{type: imagefolder, path: {mine}, eval_fraction: 0.3}}"
    folder = train("preference_bt", tmp_path / "runs", "data.type=corruptions", source, "data.kinds=[noun, shuffle]")
    record = record_of(folder)
    assert 0 < record["samples"]["pictures"] < 12
    assert set(record["pairwise"]["reward"]["by_kind"]) <= {"noun", "shuffle"}
    assert "adversarial" not in record and "agreement" not in record, "nobody knows the truth of these pictures"


# Judged again


def test_eval_says_again_what_training_said(trained: Callable[[str], Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(trained("caption"), copy)
    assert main(["eval", str(copy)]) == 0
    again, first = record_of(copy), record_of(trained("caption"))
    for scorer in ("reward", "network", "bleu", "length"):
        assert again["pairwise"][scorer] == first["pairwise"][scorer]
    assert again["weights"] == first["weights"], "what only training knows stays"
    assert again["calibration"] == first["calibration"] and again["ood"] == first["ood"]
    assert again["adversarial"] == first["adversarial"] and again["agreement"] == first["agreement"]
    before = (copy / "eval.json").read_bytes()
    assert main(["eval", str(copy), "eval.pictures=9"]) == 0
    assert record_of(copy, "eval_custom.json")["samples"]["pictures"] == 9
    assert (copy / "eval.json").read_bytes() == before


def test_eval_on_another_file(trained: Callable[[str], Path], tmp_path: Path) -> None:
    file = tmp_path / "other.jsonl"
    assert main(["reward", "data", "caption_linear", str(file), *DATA, "data.seed=7"]) == 0
    copy = tmp_path / "copy"
    shutil.copytree(trained("caption_linear"), copy)
    assert main(["eval", str(copy), "--data", str(file)]) == 0
    record = record_of(copy, "eval_custom.json")
    assert 0 < record["samples"]["pictures"] < 24 and "adversarial" not in record


def test_the_report_of_a_reward_model_is_its_own(
    trained: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(trained("caption_linear"), copy)
    written = (copy / "report.html").read_text(encoding="utf-8")
    (copy / "report.html").unlink()
    assert main(["report", str(copy)]) == 0
    assert capsys.readouterr().out.strip() == str(copy / "report.html")
    assert "How the weights were learned" in written
    assert (copy / "report.html").read_text(encoding="utf-8").count("How the weights were learned") == 1


# What the user can mend: status 2 and one line, and no folder left behind


def preferences_file(root: Path, pictures: int = 12, references: bool = False) -> Path:
    folder = captioned(root / "pictures", pictures, [["a red dog"]])
    lines: list[dict[str, Any]] = [
        {"image": f"{i}.png", "chosen": "a red dog", "rejected": "a blue dog"} for i in range(pictures)
    ]
    if references:
        lines = [line | {"references": ["a dog"]} for line in lines]
    (folder / "judged.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder / "judged.jsonl"


def ratings_file(root: Path) -> Path:
    folder = captioned(root / "pictures", 12, [["a red dog"]])
    lines = [{"image": f"{i}.png", "caption": "a red dog", "rating": float(i)} for i in range(12)]
    (folder / "judged.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder / "judged.jsonl"


def of_file(name: str, root: Path, file: Path, *more: str) -> list[str]:
    return ["reward", "train", name, *settings(name, root / "runs", "data.type=file", f"data.path={file}", *more)]


def case_no_file(root: Path) -> list[str]:
    return of_file("preference_bt", root, root / "nowhere.jsonl")


def case_no_judgements(root: Path) -> list[str]:
    return of_file("preference_bt", root, captioned(root / "pictures", 2, [["a dog"]]) / "metadata.jsonl")


def case_bad_row(root: Path) -> list[str]:
    file = preferences_file(root)
    file.write_text(file.read_text() + '{"image": "0.png", "chosen": "a dog", "rejectd": "a cat"}\n')
    return of_file("preference_bt", root, file)


def case_ratings_for_preferences(root: Path) -> list[str]:
    return of_file("preference_bt", root, ratings_file(root))


def case_preferences_for_ratings(root: Path) -> list[str]:
    return of_file("caption_mse", root, preferences_file(root))


def case_too_few_pictures(root: Path) -> list[str]:
    return of_file("preference_bt", root, preferences_file(root, 2))


def case_no_references(root: Path) -> list[str]:
    return of_file("caption_linear", root, preferences_file(root))


def case_nothing_learned(root: Path) -> list[str]:
    """Both captions score alike, so no weight comes of them."""
    return of_file("caption_linear", root, preferences_file(root, references=True), "terms=[{type: repetition}]")


def case_no_kind(root: Path) -> list[str]:
    kinds = ["data.type=corruptions", "data.kinds=[negatoin]"]
    return ["reward", "train", "caption_linear", *settings("caption_linear", root / "runs", *kinds)]


def case_no_tower(root: Path) -> list[str]:
    few = [*DATA, f"model.vision={root / 'nowhere'}"]
    return ["reward", "train", "preference_bt", *settings("preference_bt", root / "runs", *few)]


def case_suffix(root: Path) -> list[str]:
    return ["reward", "data", "caption_linear", str(root / "judged.csv")]


def case_score_nowhere(root: Path) -> list[str]:
    return ["reward", "score", str(root / "nowhere"), "--data", "scenes"]


def case_score_policy(root: Path) -> list[str]:
    return ["reward", "score", "builtin:tiny-vlm", "--data", "scenes"]


def case_score_no_data(root: Path) -> list[str]:
    return ["reward", "score", "builtin:caption-reward", "--data", str(root / "nowhere")]


def case_score_no_captions(root: Path) -> list[str]:
    return ["reward", "score", "builtin:caption-reward", "--data", str(captioned(root / "mine", 2, [[]]))]


def case_a_policys_recipe(root: Path) -> list[str]:
    return ["reward", "train", "recipes/caption_ppo.yaml"]


def policy(root: Path, *more: str) -> list[str]:
    return ["train", "caption_ppo", f"logging.dir={root / 'runs'}", *more]


def case_policy_empty_folder(root: Path) -> list[str]:
    (root / "empty").mkdir()
    return policy(root, f"reward.model={root / 'empty'}")


def case_policy_no_reward_model(root: Path) -> list[str]:
    return policy(root, f"reward.model={resolve('builtin:tiny-vlm')}")


def case_policy_torn_weights(root: Path) -> list[str]:
    shutil.copytree(resolve("builtin:caption-reward"), root / "torn")
    (root / "torn" / "model.safetensors").write_bytes(b"no weights")
    return policy(root, f"reward.model={root / 'torn'}")


def case_kappa_without_a_network(root: Path) -> list[str]:
    folder = train("caption_linear", root / "linear", *DATA)
    return policy(root, f"reward.model={folder}", "reward.uncertainty_penalty=0.5")


ERRORS: dict[Callable[[Path], list[str]], tuple[str, ...]] = {
    case_no_file: ("nowhere.jsonl: no such file",),
    case_no_judgements: ("metadata.jsonl: row 1: file_name: unknown key", "did you mean image?"),
    case_bad_row: ("judged.jsonl: row 13", "rejectd", "did you mean rejected?"),
    case_ratings_for_preferences: ("judged.jsonl: holds ratings", "bradley_terry learns from preferences"),
    case_preferences_for_ratings: ("judged.jsonl: holds preferences", "mse learns from ratings"),
    case_too_few_pictures: ("judged.jsonl: too few pictures",),
    case_no_references: ("reward term 'bleu' needs references", ".png has none"),
    case_nothing_learned: ("a weight of 0", "nothing was learned"),
    case_no_kind: ("negatoin", "did you mean negation?"),
    case_no_tower: ("nowhere",),
    case_suffix: ("judged.csv", ".jsonl or .parquet"),
    case_score_nowhere: ("nowhere", "no such folder"),
    case_score_policy: ("'builtin:tiny-vlm'", "llava"),
    case_score_no_data: ("nowhere",),
    case_score_no_captions: ("mine: no captions to score",),
    case_a_policys_recipe: ("caption_ppo.yaml: ", "unknown key"),
    case_policy_empty_folder: ("reward.model: ", "empty", "no reward model"),
    case_policy_no_reward_model: ("reward.model: ", "is a llava"),
    case_policy_torn_weights: ("reward.model: ", "torn", "cannot be loaded"),
    case_kappa_without_a_network: ("reward.uncertainty_penalty: ", "no network"),
}


@pytest.mark.parametrize("case", ERRORS, ids=lambda case: case.__name__.removeprefix("case_"))
def test_what_the_user_can_mend_is_one_line(
    case: Callable[[Path], list[str]],
    tmp_path: Path,
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(repository)
    arguments = case(tmp_path)
    capsys.readouterr()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err and captured.out == ""
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert captured.err.endswith(line + "\n")
    assert all(part in line for part in ERRORS[case]), line
    assert not list((tmp_path / "runs").glob("*")), "nothing was trained: the name stays free"
    with pytest.raises(UserError):
        main([*arguments, "--debug"])
