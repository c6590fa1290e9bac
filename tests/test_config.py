"""The recipe schema: what it accepts, what it refuses, and the one line it says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from mmft.config import (
    Corruptions,
    ImageFolderConfig,
    JudgementFile,
    ModelConfig,
    Recipe,
    RecipeError,
    RewardRecipe,
    dump_recipe,
    is_reward_recipe,
    load_recipe,
    load_reward_recipe,
)
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
    assert load_recipe(recipe_file, ["reward.tripwire.action=off"]).reward.tripwire.action == "off"
    recipe_file.write_text(MINIMAL + "  tripwire: {action: off}\n", encoding="utf-8")
    assert load_recipe(recipe_file).reward.tripwire.action == "off"


def test_variants_of_the_adapter(recipe_file: Path) -> None:
    lora = load_recipe(recipe_file, ["model.lora.use_dora=true", "model.lora.modules_to_save=[lm_head]"]).model.lora
    assert lora is not None and lora.use_dora and lora.modules_to_save == ("lm_head",)
    assert (lora.use_rslora, lora.init) == (False, "default")
    assert load_recipe(recipe_file).algorithm.critic == "shared"
    assert load_recipe(recipe_file, ["algorithm.critic=adapter"]).algorithm.critic == "adapter"
    message = complaint(recipe_file, "algorithm.critic=adapter", "model.lora=null")
    assert message == "command line: algorithm.critic: adapter needs weights that stay as they are; " \
        "set model.lora or use shared"  # fmt: skip


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
        ("data.type=zzz", 'data.type: unknown type "zzz"; there is scenes, imagefolder'),
        ("algorithm.type=grpo", 'algorithm.type: unknown type "grpo"; there is ppo'),
        ("data={path: x}", "data.type: missing; one of scenes, imagefolder"),
        ("data.type=imagefolder", "data.path: missing"),
        ("train.lr=fast", 'train.lr: must be a valid number, got "fast"'),
        ("train.steps=1.5", "train.steps: must be a valid integer, got 1.5"),
        ("train.steps='5'", 'train.steps: must be a valid integer, got "5"'),
        ("train.steps=0", "train.steps: must be greater than or equal to 1, got 0"),
        ("train.seed=true", "train.seed: must be a valid integer, got true"),
        ("kl.coef=.nan", "kl.coef: must be a finite number, got NaN"),
        ("model.lora.init=olora", "model.lora.init: olora changes the pretrained weights, which KL and anchor"),
        ("model.lora.init=PiSSA_niter_4", "model.lora.init: PiSSA_niter_4 changes the pretrained weights"),
        ("model.lora.init=zeros", 'model.lora.init: unknown value "zeros"'),
        ("model.lora.use_rslora=1.5", "model.lora.use_rslora: must be a valid boolean"),
        ("algorithm.critic=own", 'algorithm.critic: unknown value "own"'),
        ("kl.estimator=k2", 'kl.estimator: unknown value "k2"'),
        ("anchor=5", "anchor: must be a mapping of keys, got 5"),
        ("data=null", "data: must be a mapping of keys, got null"),
        ("logging.report_to=wandb", 'logging.report_to: must be a list, got "wandb"'),
        ("model.lora.target_modules=[q_proj, 3]", "model.lora.target_modules.1: must be a valid string, got 3"),
        ("reward.terms=[]", "reward.terms: missing; list terms or set reward.model"),
        (
            "reward.model=builtin:caption",
            "reward.model: nothing bundled is called 'builtin:caption'; there is builtin:",
        ),
        ("reward.modle=x", "reward.modle: unknown key; did you mean model?"),
        ("reward.uncertainty_penalty=0.5", "reward.uncertainty_penalty: there is no reward.model whose uncertainty"),
        ("reward.tripwire.action=halt", 'reward.tripwire.action: unknown value "halt"; there is warn, stop, off'),
        ("reward.tripwire.threshold=1.5", "reward.tripwire.threshold: must be less than 1, got 1.5"),
        ("reward.tripwire.window=1", "reward.tripwire.window: must be greater than or equal to 2, got 1"),
        ("reward.shaping.potential.type=detial", 'reward.shaping.potential.type: unknown type "detial"; did you mean'),
        ("reward.workers=-1", "reward.workers: must be greater than or equal to 0, got -1"),
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


def test_a_learned_model_needs_no_terms(recipe_file: Path) -> None:
    reward = load_recipe(recipe_file, ["reward={model: builtin:caption-reward, uncertainty_penalty: 0.5}"]).reward
    assert reward.terms == () and reward.uncertainty_penalty == 0.5 and reward.shaping is None
    beside = load_recipe(recipe_file, ["reward.model=my/reward", "reward.terms.0.weight=0"]).reward
    assert [(term.label, term.weight) for term in beside.terms] == [("bleu", 0.0), ("length", 0.1)]
    shaping = load_recipe(recipe_file, ["reward.shaping={beta: 0.5}"]).reward.shaping
    assert shaping is not None and (shaping.beta, shaping.potential.type) == (0.5, "detail")


# Recipes of reward models

REWARD = """\
loss: bradley_terry
terms:
  - {type: bleu}
  - {type: length, target: [3, 9]}
"""


@pytest.fixture
def reward_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(REWARD, encoding="utf-8")
    return path


def test_defaults_fill_a_minimal_reward_recipe(reward_file: Path) -> None:
    recipe = load_reward_recipe(reward_file)
    assert recipe.name == recipe.run_name == "mine"
    assert recipe.model is not None and recipe.model.fusion == "cross_attention"
    assert recipe.data.type == "scenes" and recipe.data.seed != 0, "other scenes than those policies train on"
    assert [term.label for term in recipe.terms] == ["bleu", "length"]


def test_a_new_type_of_judgements_drops_the_keys_of_the_old(reward_file: Path) -> None:
    reward_file.write_text(REWARD + "data: {type: scenes, pictures: 50, pairs: 3}\n", encoding="utf-8")
    assert load_reward_recipe(reward_file, ["data.type=file", "data.path=p.jsonl"]).data == JudgementFile(
        path="p.jsonl"
    )
    source = "data.source={type: imagefolder, path: photos}"
    expected = Corruptions(pictures=50, source=ImageFolderConfig(path="photos"))
    assert load_reward_recipe(reward_file, ["data.type=corruptions", source]).data == expected


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["loss=bradley_tery"], 'loss: unknown value "bradley_tery"; did you mean bradley_terry?'),
        (["loss=mse", "data.type=corruptions"], "loss: mse learns from ratings, and corruptions give preferences"),
        (["model=null", "terms=[]"], "terms: missing; a reward without a network needs terms"),
        (["model.hidden=30"], "model.heads: 4 does not divide hidden 30"),
        (["model.fusoin=sum"], "model.fusoin: unknown key; did you mean fusion?"),
        (
            ["model.fusion=crossattention"],
            'model.fusion: unknown value "crossattention"; did you mean cross_attention?',
        ),
        (
            ["model.vision=builtin:clip"],
            "model.vision: nothing bundled is called 'builtin:clip'; there is builtin:tiny-vlm",
        ),
        (["model.queries=words"], 'model.queries: unknown value "words"; there is text, image, all'),
        (["model.dropout=1"], "model.dropout: must be less than 1, got 1"),
        (["terms.1.weight=0.5"], "terms.1.weight: weights are learned, of terms as measured; remove the key"),
        (["terms.0.normalize=zscore"], "terms.0.normalize: weights are learned"),
        (["terms.1.name=bleu"], "terms.1.name: a term named 'bleu' is already there"),
        (["terms.0.type=python"], 'terms.0.type: unknown type "python"; there is bleu, detail, length'),
        (["data.type=scene"], 'data.type: unknown type "scene"; did you mean scenes?'),
        (["data.type=file"], "data.path: missing"),
        (["data.type=scenes", "data.annotaters={}"], "data.annotaters: unknown key; did you mean annotators?"),
        (
            ["data.type=scenes", "data.annotators.noise=-1"],
            "data.annotators.noise: must be greater than or equal to 0, got -1",
        ),
        (["train.patience=0"], "train.patience: must be greater than or equal to 1, got 0"),
        (["lr=1"], "lr: unknown key; did you mean train.lr?"),
        (["reward.terms=[]"], "reward: unknown key"),
    ],
)
def test_a_bad_reward_recipe_is_one_line(reward_file: Path, overrides: list[str], expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_reward_recipe(reward_file, overrides)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"command line: {expected}")


def test_which_command_a_file_is_for(reward_file: Path, recipe_file: Path, repository: Path) -> None:
    assert is_reward_recipe(reward_file) and not is_reward_recipe(recipe_file)
    assert is_reward_recipe("caption_linear") and not is_reward_recipe("caption_ppo")
    assert is_reward_recipe(repository / "reward_models" / "caption.yaml")
    assert not is_reward_recipe(repository / "recipes" / "caption_ppo.yaml")
    assert not is_reward_recipe("nowhere.yaml")
    recipe_file.write_text(MINIMAL + "loss: mse\n", encoding="utf-8")
    assert not is_reward_recipe(recipe_file), "a recipe with a stray key"
    assert "loss: unknown key" in complaint(recipe_file)


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
    models = {*_models(Recipe), *_models(RewardRecipe)}
    assert len(models) >= 28
    for model in models:
        assert model.model_config.get("frozen")
        assert model.model_config.get("extra") == "forbid"
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name} has no description"
