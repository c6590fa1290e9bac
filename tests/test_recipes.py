"""Every shipped recipe parses, survives a round trip, and is its own manual."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmft.config import REWARD_MODELS, RewardTerm, dump_recipe, find_recipes, load_recipe, load_reward_recipe
from mmft.config.errors import kinds
from mmft.rewards.combine import build_reward
from mmft.rewards.terms import TERMS

REPOSITORY = Path(__file__).resolve().parent.parent
RECIPES = sorted((REPOSITORY / "recipes").glob("*.yaml"))
REWARDS = sorted((REPOSITORY / REWARD_MODELS).glob("*.yaml"))


def test_there_are_recipes() -> None:
    assert "caption_ppo" in [path.stem for path in RECIPES]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_parses_and_round_trips(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    again = tmp_path / path.name
    again.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(again) == recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_opens_with_its_manual(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    header = "\n".join(line for line in lines[: lines.index("")])
    assert lines[0].startswith("# ")
    assert f"mmft train recipes/{path.name}" in header
    assert "What to expect" in header


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_named_as_its_file(path: Path) -> None:
    assert load_recipe(path).name == path.stem


def test_found_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # from anywhere, not only a clone's top folder
    assert "caption_ppo" in find_recipes()
    assert load_recipe("caption_ppo").name == "caption_ppo"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_builds_its_reward(path: Path) -> None:
    build_reward(load_recipe(path).reward)


# Reward models


def test_there_are_reward_models() -> None:
    losses = {load_reward_recipe(path).loss for path in REWARDS}
    assert losses == {"bradley_terry", "mse", "aleatoric"}
    assert "caption" in [path.stem for path in REWARDS]


@pytest.mark.parametrize("path", REWARDS, ids=lambda path: path.stem)
def test_reward_recipe_parses_and_round_trips(path: Path, tmp_path: Path) -> None:
    recipe = load_reward_recipe(path)
    assert load_reward_recipe(path.stem) == recipe
    again = tmp_path / path.name
    again.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_reward_recipe(again) == recipe


@pytest.mark.parametrize("path", REWARDS, ids=lambda path: path.stem)
def test_reward_recipe_opens_with_its_manual(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    header = lines[: lines.index("")]
    assert all(line.startswith("#") for line in header)
    assert len(header[0]) > 40 and f"mmft reward train reward_models/{path.name}" in "\n".join(header)


def test_the_choice_of_a_reward_model_is_explained() -> None:
    guide = (REPOSITORY / REWARD_MODELS / "README.md").read_text(encoding="utf-8")
    assert all(f"`{path.name}`" in guide for path in REWARDS)
    fusions = ("sum", "weighted_sum", "attention", "cross_attention", "shared_attention", "coupled")
    assert all(f"`{fusion}`" in guide for fusion in fusions)


def test_schema_and_registry_have_the_same_terms() -> None:
    assert set(kinds(RewardTerm)) == set(TERMS)
