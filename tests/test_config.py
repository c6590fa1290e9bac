"""The recipe schema: what it accepts, what it refuses, and the one line it says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from mmft.config import ImageFolderConfig, ModelConfig, Recipe, RecipeError, dump_recipe, load_recipe
from mmft.config.errors import is_model, union_members
from mmft.types import UserError

MINIMAL = """\
data: {type: scenes, samples: 100}
reward:
  terms:
    - {type: bleu}
    - {type: length, weight: 0.1, target: [3, 9]}
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    return path


def complaint(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_fill_a_minimal_recipe(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    assert recipe.name == recipe.run_name == "small"
    assert recipe.model.path == "builtin:tiny-vlm"
    assert recipe.algorithm.lam == 0.95
    assert [term.label for term in recipe.reward.terms] == ["bleu", "length"]


def test_overrides_are_yaml_and_reach_into_lists(recipe_file: Path) -> None:
    recipe = load_recipe(
        recipe_file,
        ["train.lr=1e-5", "reward.terms.1.weight=2", "reward.terms.1.target=[2, 5]", "model.lora=null", "name=other"],
    )
    assert recipe.train.lr == 1e-5
    assert recipe.reward.terms[1].weight == 2
    assert recipe.reward.terms[1].target == (2, 5)
    assert recipe.model.lora is None
    assert recipe.run_name == "other"


def test_later_override_wins(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, ["train.seed=1", "train.seed=2"]).train.seed == 2


def test_a_mapping_replaces_the_block(recipe_file: Path) -> None:
    data = load_recipe(recipe_file, ["data={type: imagefolder, path: photos}"]).data
    assert data == ImageFolderConfig(path="photos")


def test_a_new_type_drops_the_keys_of_the_old(recipe_file: Path) -> None:
    data = load_recipe(recipe_file, ["data.type=imagefolder", "data.path=photos"]).data
    assert data == ImageFolderConfig(path="photos")
    # but a key that the user wrote beside it is never dropped silently
    assert "data.samples: unknown key" in complaint(
        recipe_file, "data.type=imagefolder", "data.path=photos", "data.samples=3"
    )


def test_a_new_term_type_keeps_what_both_have(recipe_file: Path) -> None:
    term = load_recipe(recipe_file, ["reward.terms.1.type=repetition"]).reward.terms[1]
    assert (term.type, term.weight) == ("repetition", 0.1)


def test_yaml_switches_are_words(recipe_file: Path) -> None:
    # YAML 1.1 reads a bare `on` as true
    assert load_recipe(recipe_file, ["model.encode_once=on"]).model.encode_once == "on"
    assert load_recipe(recipe_file, ["model.encode_once=off"]).model.encode_once == "off"


def test_interpolation(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, ["train.seed=7", "data.seed=${train.seed}"]).data.seed == 7


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("algorithm.clip_rnge=0.3", "algorithm.clip_rnge: unknown key; did you mean clip_range?"),
        ("algoritm.gamma=1", "algoritm: unknown key; did you mean algorithm?"),
        ("lr=1", "lr: unknown key; did you mean train.lr?"),
        ("anchor.zzz=1", "anchor.zzz: unknown key; valid keys: l2"),
        ("reward.terms.0.maxorder=2", "reward.terms.0.maxorder: unknown key; did you mean max_order?"),
        ("reward.terms.0.wieght=2", "reward.terms.0.wieght: unknown key; did you mean weight?"),
        ("reward.terms.9.weight=1", "reward.terms.9.weight: list index out of range"),
        ("data.type=imagfolder", 'data.type: unknown type "imagfolder"; did you mean imagefolder?'),
        ("data.type=coco", 'data.type: unknown type "coco"; there is scenes, imagefolder'),
        ("algorithm.type=grpo", 'algorithm.type: unknown type "grpo"; there is ppo'),
        ("data={path: x}", "data.type: missing; one of scenes, imagefolder"),
        ("data.type=imagefolder", "data.path: missing"),
        ("train.lr=fast", 'train.lr: must be a valid number, got "fast"'),
        ("train.steps=1.5", "train.steps: must be a valid integer, got 1.5"),
        ("train.steps='5'", 'train.steps: must be a valid integer, got "5"'),
        ("train.steps=0", "train.steps: must be greater than or equal to 1, got 0"),
        ("train.seed=true", "train.seed: must be a valid integer, got true"),
        ("kl.coef=.nan", "kl.coef: must be a finite number, got NaN"),
        ("kl.estimator=k2", 'kl.estimator: unknown value "k2"'),
        ("anchor=5", "anchor: must be a mapping of keys, got 5"),
        ("data=null", "data: must be a mapping of keys, got null"),
        ("logging.report_to=wandb", 'logging.report_to: must be a list, got "wandb"'),
        ("model.lora.target_modules=[q_proj, 3]", "model.lora.target_modules.1: must be a valid string, got 3"),
        ("reward.terms=[]", "reward.terms: must have at least 1 item, got []"),
        ("name=../../etc", 'name: "../../etc" will not do; expected: Letters, digits'),
        ("train.lr", "'train.lr': an override is written key=value"),
        ("=3", "'=3': an override is written key=value"),
        ("train..lr=3", "'train..lr=3': an override is written key=value"),
        ("train.lr=[1", "train.lr: '[1' is not a YAML value"),
    ],
)
def test_a_bad_override_is_one_line(recipe_file: Path, override: str, expected: str) -> None:
    assert complaint(recipe_file, override).startswith(f"command line: {expected}")


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["train.batch=64", "train.minibatches=3"], "train.minibatches"),
        (["train.samples_per_prompt=5"], "train.samples_per_prompt"),
        (["train.minibatches=2", "train.micro_batch=24"], "train.micro_batch"),
        (["reward.terms.1.target=[9, 3]"], "reward.terms.1.target"),
        (["reward.terms.1.target=[3, 3]"], "reward.terms.1.target"),
        (["reward.terms.0.weight=0", "reward.terms.1.weight=0"], "reward.terms"),
        (["reward.terms.1.name=bleu"], "reward.terms.1.name"),
        (["generation.min_new_tokens=99"], "generation.min_new_tokens"),
        (["model.lora=null", "adapter_penalty=0.1"], "adapter_penalty"),
        (["model.lora=null", "model.quantization=4bit"], "model.quantization"),
        (["model.lora.target_modules=all-linear", "model.encode_once=on"], "model.encode_once"),
        (["model.path=builtin:huge-vlm"], "model.path"),
        (["data={type: imagefolder, path: x, eval_fraction: 0}"], "data.eval_fraction"),
    ],
)
def test_impossible_combinations(recipe_file: Path, overrides: list[str], key: str) -> None:
    assert f": {key}: " in complaint(recipe_file, *overrides)


def test_a_fault_in_the_file_names_the_file(recipe_file: Path) -> None:
    recipe_file.write_text(MINIMAL + "train: {leraning_rate: 1, stps: 2}\n", encoding="utf-8")
    message = complaint(recipe_file, "train.seed=3")
    assert message.startswith(f"{recipe_file}: train.leraning_rate: unknown key")
    assert message.endswith("(and 1 more)")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data: 1\ndata: 2\n", "line 2: found duplicate key data"),
        ("data: [1,\n", "line 2: "),
        ("- a\n- b\n", "must hold keys"),
        ("hello\n", "data: missing (and 1 more)"),
        ("", "must hold keys"),
        ("a: ${nowhere}\n", "Interpolation key 'nowhere' not found"),
        ("a: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
    ],
)
def test_a_broken_file_is_one_line(recipe_file: Path, text: str, expected: str) -> None:
    recipe_file.write_text(text, encoding="utf-8")
    message = complaint(recipe_file)
    assert message.startswith(f"{recipe_file}: ")
    assert expected in message or (text == "hello\n" and "hello: unknown key" in message)


def test_a_binary_file_is_one_line(recipe_file: Path) -> None:
    recipe_file.write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    assert "not a readable YAML file" in complaint(recipe_file)


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    assert complaint(tmp_path / "nowhere.yaml") == f"{tmp_path / 'nowhere.yaml'}: no such recipe"
    assert "did you mean" in complaint(tmp_path / "caption_pppo.yaml")
    assert complaint(tmp_path) == f"{tmp_path}: a folder, not a recipe file"


def test_round_trip_of_awkward_values(recipe_file: Path) -> None:
    recipe = load_recipe(
        recipe_file,
        ["model.encode_once=off", "data.prompt='yes: #1, \"1e-3\" é'", "train.lr=1e-7", "logging.report_to=[wandb]"],
    )
    recipe_file.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(recipe_file) == recipe


def test_a_recipe_is_frozen(recipe_file: Path) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_recipe(recipe_file).train.lr = 1.0  # type: ignore[misc]


def test_model_paths_resolve() -> None:
    assert Path(ModelConfig().resolved_path()).parts[-3:] == ("mmft", "assets", "tiny-vlm")
    assert ModelConfig(path="org/model").resolved_path() == "org/model"


def test_errors_are_user_errors() -> None:
    assert issubclass(RecipeError, UserError)
    assert issubclass(RecipeError, ValueError)


def _models(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        for member in union_members(field.annotation):
            inner = [part for part in getattr(member, "__args__", ()) if part is not Ellipsis]
            for candidate in [member, *(found for part in inner for found in union_members(part))]:
                if is_model(candidate):
                    yield from _models(candidate)


def test_every_field_is_described_and_every_block_closed() -> None:
    models = set(_models(Recipe))
    assert len(models) >= 18
    for model in models:
        assert model.model_config.get("frozen")
        assert model.model_config.get("extra") == "forbid"
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name} has no description"
