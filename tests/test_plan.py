"""`mmft plan`: its counts against real models and what autograd really keeps, its advice, and the command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import zoo
from torch import nn

from mmft.cli import main
from mmft.config import LoraConfig, ModelConfig, find_recipes, load_recipe
from mmft.models.critic import ValueHead
from mmft.models.decoding import cache_of
from mmft.models.footprint import Footprint
from mmft.models.interface import Interface, evaluating
from mmft.models.policy import load_policy
from mmft.models.prompts import PromptBuilder
from mmft.models.reward import load_reward_model
from mmft.models.reward_footprint import reward_footprint
from mmft.models.scoring import response_states
from mmft.models.selfcheck import check
from mmft.models.value_adapter import add_value_adapter
from mmft.report.plan_table import sized
from mmft.run.planning import GB, PHASES, Counter, Memory, changed, done, parse_size, predict
from mmft.run.probing import extrapolate, probe_rows, small
from mmft.types import UserError

PROGRAM = GB // 2  # in place of what this process takes
SHORT = ("train.batch=16", "train.minibatches=1", "eval.samples=8", "data.samples=64", "generation.max_new_tokens=16")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmft.cli._quiet_libraries", lambda: None)  # it sets process-wide filters
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture(scope="module")
def counter() -> Counter:
    """What has been counted once serves all tests."""
    return Counter("cpu", PROGRAM)


@pytest.fixture(scope="module")
def memory(counter: Counter) -> Callable[..., Memory]:
    """Of the short recipe with other keys."""
    return lambda *overrides: counter.memory(load_recipe("caption_ppo_fixed", [*SHORT, *overrides]))


def footprint(dtype: torch.dtype = torch.float32, critic: str = "shared", **options: Any) -> Footprint:
    return Footprint(ModelConfig(**options), dtype, "cpu", critic)


def real_policy(config: ModelConfig, dtype: torch.dtype = torch.float32, critic: str = "shared") -> Any:
    policy = load_policy(config, "cpu", dtype)
    if critic == "adapter":
        add_value_adapter(policy.model)
    return policy


def nbytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


# Counts against real models.


@pytest.mark.parametrize(
    ("lora", "dtype", "critic"),
    [
        (LoraConfig(), torch.float32, "shared"),
        (LoraConfig(r=3, target_modules=("q_proj", "v_proj")), torch.bfloat16, "adapter"),
        (LoraConfig(r=5, target_modules="all-linear", use_dora=True), torch.float32, "adapter"),
        (LoraConfig(modules_to_save=("lm_head",)), torch.float32, "shared"),
        (None, torch.bfloat16, "shared"),
    ],
)
def test_weights_are_those_of_the_loaded_model(lora: LoraConfig | None, dtype: torch.dtype, critic: str) -> None:
    config = ModelConfig(lora=lora)
    weights = Footprint(config, dtype, "cpu", critic).weights
    model = real_policy(config, dtype, critic).model
    of_critic = [p for n, p in model.named_parameters() if ".critic." in n]
    own = {id(p) for p in of_critic}
    trained = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert weights.trainable == sum(p.numel() for p in trained)
    assert weights.trained == nbytes(trained)
    assert weights.frozen == nbytes(frozen) + nbytes(model.buffers())
    head = ValueHead(int(model.get_output_embeddings().weight.shape[1]))
    assert weights.critic == nbytes(of_critic) + nbytes(head.parameters())


def really_kept(policy: Any, prompts: list[Any], rows: int, group: int, new: int) -> int:
    """Bytes that autograd saves in the update's forward pass, weights left out."""
    interface, value_head = Interface(policy.model, policy.processor), ValueHead(256)
    check(interface, prompts)
    responses = torch.full((rows, new), 50)
    packed = interface.pack(
        [prompts[i // group] for i in range(rows)], responses, torch.ones_like(responses, dtype=torch.bool)
    )
    weights = [*policy.model.parameters(), *policy.model.buffers(), *value_head.parameters()]
    known = {w.untyped_storage().data_ptr() for w in weights}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), response_states(interface.head, packed) as kept:
        policy.model(**packed.inputs, use_cache=False, return_dict=True)
        value_head(kept["states"])
    return sum(storage.nbytes() for pointer, storage in saved.items() if pointer not in known)


@pytest.mark.parametrize(("group", "dtype"), [(1, torch.float32), (4, torch.float32), (4, torch.bfloat16)])
def test_activations_are_what_autograd_keeps(group: int, dtype: torch.dtype) -> None:
    policy = real_policy(ModelConfig(), dtype)
    builder = PromptBuilder(policy.processor)
    prompts = [p for p in map(builder, tiny.rows(24)) if len(p) == len(builder(tiny.rows(1)[0]))][: 8 // group]
    predicted = footprint(dtype).training(8, group, len(prompts[0]), 24).kept
    real = really_kept(policy, prompts, 8, group, 24)
    assert real <= predicted <= 1.06 * real  # beside it: the states themselves, ids, masks


def test_the_cache_is_the_real_one() -> None:
    policy, rows, prompt, new = real_policy(ModelConfig()), 4, 70, 16
    with evaluating(policy.model), torch.no_grad():
        ids = torch.full((rows, prompt + new - 1), 50)
        output = policy.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
    real = sum(nbytes((layer.keys, layer.values)) for layer in cache_of(output).layers)
    predicted = footprint().sampling(rows, 2, prompt, new)
    assert real <= predicted.cache <= 1.02 * real
    assert predicted.passes > 0 and predicted.logits > 0


def test_features_are_those_that_are_kept() -> None:
    policy = real_policy(ModelConfig())
    interface = Interface(policy.model, policy.processor)
    prompts = [interface.builder(row) for row in tiny.rows(3)]
    check(interface, prompts)
    interface.features.clear()
    interface.features.inputs(prompts)
    assert footprint().pictures(prompts).each == interface.features._bytes // 3


def test_the_reward_model_is_counted_with_its_towers() -> None:
    model = load_reward_model("builtin:caption-reward")
    towers = {id(t): t for t in model._towers.values()}.values()
    real = nbytes(p for module in (model, *towers) for p in module.parameters())
    weights, working = reward_footprint("builtin:caption-reward", 16, 1, 70, 16)
    assert weights == real
    assert working > 0


def test_logits_do_not_grow_with_vocabulary_times_sequence(tmp_path: Path) -> None:
    """1024 tokens over 2**16 and 2**17 words would be 256 MB and 512 MB; chunks of 2**22 numbers are all there is."""
    sizes = []
    for vocabulary in (2**16, 2**17):
        folder = tmp_path / str(vocabulary)
        shutil.copytree(ModelConfig().resolved_path(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["text_config"]["vocab_size"] = vocabulary
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        sizes.append(footprint(path=str(folder)).training(32, 1, 70, 32))
    assert sizes[1].peak < 1.05 * sizes[0].peak
    assert max(s.logits for s in sizes) < 6 * 4 * 2**22


def test_quantised_weights_take_a_part_of_their_bytes() -> None:
    plain = footprint(torch.bfloat16).weights
    eight, four = (footprint(torch.bfloat16, quantization=bits).weights for bits in ("8bit", "4bit"))
    # Linear layers in a byte and in half a one, the rest in float32.
    linear = sum(
        m.weight.numel() for m in real_policy(ModelConfig(lora=None)).model.modules()
        if type(m) is nn.Linear and m.out_features != 2048
    )  # fmt: skip
    assert eight.parameters == four.parameters == plain.parameters
    assert 0.45 * linear < eight.frozen - four.frozen < 0.5 * linear


@pytest.mark.parametrize("family", ["idefics3", "blip", "florence2"])
def test_what_cannot_be_counted_is_estimated(family: str, tmp_path: Path) -> None:
    if reason := zoo.missing(family):
        pytest.skip(reason)
    zoo.build(family, tmp_path)
    model = footprint(path=str(tmp_path))
    prompts = [model.interface.builder(row) for row in tiny.rows(2)]
    few, more = (model.training(rows, 1, len(prompts[0]) or 1, 8) for rows in (2, 4))
    assert model.pictures(prompts).each > 0
    assert model.sampling(4, 2, len(prompts[0]) or 1, 8).cache > 0
    assert 0 < few.kept < more.kept
    assert model.estimated
    assert model.encodes_once(prompts[0]) and not footprint(path=str(tmp_path), lora=None).encodes_once(prompts[0])


# Parts and phases.


def test_parts_add_up(memory: Callable[..., Memory], counter: Counter) -> None:
    found = memory()
    for phase in PHASES:
        assert found.total(phase) == sum(sizes.get(phase, 0) for sizes in found.parts.values())
    assert found.peak == max(found.total(phase) for phase in PHASES) == found.total(found.peak_phase)
    assert {"program", "frozen weights", "adapters", "gradients", "optimizer", "picture features"} <= set(found.parts)
    assert {"key-value cache", "activations", "logits"} <= set(found.parts)
    assert counter.facts(load_recipe("caption_ppo_fixed", SHORT))["estimated"] == [], "the bundled model is counted"
    assert found.parts["optimizer"]["update"] == 2 * found.parts["gradients"]["update"]


def test_more_of_anything_takes_more(memory: Callable[..., Memory]) -> None:
    def of(part: str, phase: str, *overrides: str) -> int:
        return memory(*overrides).parts[part][phase]

    micro = [of("activations", "update", f"train.micro_batch={n}") for n in (4, 8, 16)]
    assert micro[0] < micro[1] < micro[2] and micro[2] == pytest.approx(4 * micro[0], rel=0.01)
    assert of("activations", "update", "generation.max_new_tokens=32") > micro[2]
    cache = [of("key-value cache", "sample", f"train.batch={n}", "train.minibatches=1") for n in (8, 16)]
    assert cache[1] == pytest.approx(2 * cache[0], rel=0.01)
    assert of("key-value cache", "sample", "generation.max_new_tokens=32") > cache[1]
    assert of("picture features", "sample", "train.steps=2") < of("picture features", "sample", "train.steps=4")
    assert of("picture features", "sample", "model.feature_cache_gb=0.001") == int(0.001 * GB)


def test_sharing_prompts_takes_less(memory: Callable[..., Memory]) -> None:
    apart = memory("train.samples_per_prompt=4", "train.share_prompts=false").parts["activations"]["update"]
    assert memory("train.samples_per_prompt=4").parts["activations"]["update"] < 0.6 * apart


def test_a_critic_of_its_own_and_all_weights_take_more(memory: Callable[..., Memory]) -> None:
    plain, critic = memory(), memory("algorithm.critic=adapter")
    assert critic.parts["activations"]["update"] > 1.9 * plain.parts["activations"]["update"]
    assert critic.parts["critic"]["update"] > plain.parts["critic"]["update"]
    whole = memory("model.lora=null").parts
    assert "adapters" not in whole and "picture features" not in whole
    assert whole["trained weights"] == whole["anchor"]
    assert whole["tower's activations"]["update"] > 0
    assert "tower's activations" not in plain.parts
    assert "anchor" not in memory("model.lora=null", "anchor.l2=0").parts


def test_pixels_in_every_pass_need_no_features(memory: Callable[..., Memory]) -> None:
    off = memory("model.encode_once=off").parts
    assert "picture features" not in off
    assert off["picture encoding"]["encode"] > 0


# Advice.


def test_advice_makes_it_fit_and_changes_results_last(counter: Counter) -> None:
    recipe = load_recipe("caption_ppo_fixed", [*SHORT, "train.samples_per_prompt=4", "train.share_prompts=false"])
    whole = predict(recipe, 64 * GB, counter)
    assert whole.fits and not whole.advice
    for share in (0.95, 0.5, 0.2):
        available = PROGRAM + int(share * (whole.memory.peak - PROGRAM))
        found = predict(recipe, available, counter)
        assert not found.fits and found.advice
        after = changed(recipe, done(found.advice))
        assert after is not None
        followed = predict(after, available, counter)
        assert followed.fits and followed.memory.peak == found.advice[-1].peak
        assert found.memory.peak - sum(change.saves for change in found.advice) == found.advice[-1].peak
        if share == 0.95:
            assert len(found.advice) == 1 and found.advice[0].key == "train.micro_batch"


def test_no_advice_where_nothing_helps(counter: Counter) -> None:
    recipe = load_recipe("caption_ppo_fixed", SHORT)
    found = predict(recipe, PROGRAM // 2, counter)
    assert not found.fits
    assert not found.advice or found.advice[-1].peak > PROGRAM // 2


def test_changes_that_do_not_go_together_are_none() -> None:
    recipe = load_recipe("caption_ppo_fixed", SHORT)
    assert changed(recipe, {"train.micro_batch": 5}) is None
    half = changed(recipe, {"train.batch": 8, "model.lora": {}})
    assert half is not None and half.train.batch == 8 and half.model.lora == LoraConfig()


# Time.


def test_time_is_extrapolated_from_two_sizes() -> None:
    assert extrapolate((8, 16), (3.0, 5.0), 64) == pytest.approx(17.0)  # 1 s and 0.25 s a row
    assert extrapolate((8, 16), (3.0, 2.9), 64) == pytest.approx(2.9)  # rows cost nothing here
    assert extrapolate((8, 16), (1.0, 3.0), 32) == pytest.approx(6.0)  # no pass costs less than nothing
    assert extrapolate((8,), (2.0,), 4) == pytest.approx(1.0)


def test_probes_are_small_whole_prompts_and_valid() -> None:
    for overrides, rows in ([(), (8, 16)], [("train.samples_per_prompt=16",), (16,)], [("train.batch=4",), (4,)]):
        recipe = load_recipe("caption_ppo", [*SHORT, *overrides])
        assert probe_rows(recipe) == rows
        for count in rows:
            one = small(recipe, count)
            assert type(one).model_validate_json(one.model_dump_json()) == one


# The command.


BUNDLED = sorted(name for name in find_recipes() if load_recipe(name).model.path.startswith("builtin:"))


@pytest.mark.parametrize("name", BUNDLED)  # tests/test_hub_recipes.py plans the others
def test_every_recipe_of_a_bundled_model_can_be_planned(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", name, "--no-probe", "--memory", "64GB"]) == 0
    out = capsys.readouterr().out
    assert "it fits" in out and "together" in out and "activations" in out


def test_json_and_the_exit_status(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mmft.run.planning.program_bytes", lambda device: PROGRAM)  # this process grows meanwhile
    arguments = ["plan", "caption_ppo_fixed", *SHORT, "--json"]
    assert main([*arguments, "--memory", "64GB"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert {"recipe", "device", "dtype", "parameters", "trainable", "prompt_tokens", "memory", "advice"} <= set(record)
    found = record["memory"]
    assert {"parts", "phases", "peak", "available", "fits"} == set(found)
    assert set(found["phases"]) == set(PHASES) and found["peak"]["bytes"] == max(found["phases"].values())
    assert record["advice"] == [] and found["fits"] is True and found["available"] == 64 * GB
    seconds = record["time"]
    assert {"sample", "score", "reference", "reward", "update"} <= set(seconds["phases"])
    assert seconds["step"] == pytest.approx(sum(seconds["phases"].values()))
    assert seconds["run"] > 100 * seconds["step"] > 0 and seconds["evaluations"] == 2
    assert not list(tmp_path.iterdir()), "no run folder is made"

    # The probe's libraries and models stay in this process: the peak is now another.
    assert main([*arguments, "--memory", "64GB", "--no-probe"]) == 0
    found = json.loads(capsys.readouterr().out)["memory"]
    little = ["--memory", f"{0.98 * found['peak']['bytes'] / GB}GB", "--no-probe"]
    assert main([*arguments, *little]) == 1
    record = json.loads(capsys.readouterr().out)
    assert record["time"] is None and record["memory"]["fits"] is False
    changes = [entry["change"] for entry in record["advice"]]
    assert changes and all(entry["saves"] > 0 for entry in record["advice"])
    assert main(["plan", "caption_ppo_fixed", *SHORT, *changes, "--no-probe", *little[:2]]) == 0
    assert "it fits" in capsys.readouterr().out


def test_the_table_says_what_to_change(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "caption_ppo_fixed", *SHORT, "--no-probe", "--memory", "100MB"]) == 1
    out = capsys.readouterr().out
    assert "it does not fit" in out and "larger machine" in out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["caption_ppo", "train.micro_btach=4"], "train.micro_btach: unknown key; did you mean micro_batch?"),
        (["caption_pop"], "caption_pop: no such recipe; did you mean recipes/caption_ppo.yaml?"),
        (["caption_ppo", "--memory", "a lot"], "--memory: 'a lot' is not a size; write it as 24GB or 512MB"),
        (["caption_ppo", "model.path=./nowhere"], "model.path: './nowhere': no such folder"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any, repository: Path
) -> None:
    monkeypatch.chdir(repository)
    assert main(["plan", *arguments, "--no-probe"]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--help"]) == 0
    assert "Example: mmft plan" in capsys.readouterr().out


def test_sizes_are_read_and_written() -> None:
    assert parse_size("24GB") == parse_size("24 GiB") == parse_size("24g") == 24 * GB
    assert parse_size("1.5MB") == 3 * 2**19
    assert sized(3 * GB // 2) == "1.50 GB" and sized(48 * 2**20) == "48 MB" and sized(200) == "< 0.1 MB"
    with pytest.raises(UserError):
        parse_size("24")
