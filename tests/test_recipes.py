"""Every shipped recipe parses, survives a round trip, and is its own manual."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmft.config import RewardTerm, dump_recipe, find_recipes, load_recipe
from mmft.config.errors import kinds
from mmft.rewards.combine import build_reward
from mmft.rewards.terms import TERMS

RECIPES = sorted((Path(__file__).resolve().parent.parent / "recipes").glob("*.yaml"))


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


def test_schema_and_registry_have_the_same_terms() -> None:
    assert set(kinds(RewardTerm)) == set(TERMS)
