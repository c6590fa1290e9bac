"""The critic as a second adapter: it learns and is saved for itself, and the policy does not notice it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import PeftModel
from torch import Tensor, nn

from mmft.config import LoraConfig
from mmft.models.adapter_io import save_adapter
from mmft.models.anchor import Anchor
from mmft.models.lora import add_adapter
from mmft.models.prompts import PromptBuilder, pad_prompts
from mmft.models.value_adapter import (
    adapter_active,
    adapters_off,
    add_value_adapter,
    load_value_adapter,
    save_value_adapter,
)
from mmft.types import UserError

Gradients = dict[str, Tensor]


def model_of(**options: Any) -> PeftModel:
    """A Llava with an adapter of each kind, both away from the identity, in training mode."""
    model = add_adapter(tiny.llava(), LoraConfig(r=3, **options))
    add_value_adapter(model)
    tiny.stirred(model, 0.2)
    return model.train()


@pytest.fixture
def model() -> PeftModel:
    return model_of()


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    builder = PromptBuilder(tiny.processor())
    return pad_prompts([builder(row) for row in tiny.rows(2)], builder.pad_id, "right")


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def parameters(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if f".{adapter}." in name}


def gradients(model: nn.Module, loss: Tensor) -> Gradients:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def policy_loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits.log_softmax(-1)[..., 5].mean()


def critic_loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with adapter_active(model, "critic"):
        return model(**inputs).logits.square().mean()


def assert_same(found: Gradients, expected: Gradients) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def test_the_policys_logits_do_not_change(inputs: dict[str, Tensor]) -> None:
    model = add_adapter(tiny.llava(), LoraConfig(r=3))
    tiny.stirred(model, 0.2)
    before = logits(model, inputs)
    add_value_adapter(model)
    tiny.stirred(nn.ParameterList(parameters(model, "critic").values()), 0.2, seed=2)
    assert torch.equal(logits(model, inputs), before)
    with adapter_active(model, "critic"):
        critic = logits(model, inputs)
    assert (critic - before).abs().max() > 1e-2
    assert torch.equal(logits(model, inputs), before)
    assert model.active_adapter == "default"


def test_a_fresh_critic_sees_what_the_pretrained_model_sees(inputs: dict[str, Tensor]) -> None:
    model = add_adapter(tiny.llava(), LoraConfig(r=3, use_dora=True))
    tiny.stirred(model, 0.2)
    add_value_adapter(model)
    with adapter_active(model, "critic"):
        fresh = logits(model, inputs)
    assert torch.equal(fresh, logits(tiny.llava(), inputs))


def test_it_is_of_the_policys_kind_or_as_configured() -> None:
    model = add_adapter(tiny.llava(), LoraConfig(r=3, use_dora=True, modules_to_save=("lm_head",)))
    add_value_adapter(model)
    policy, critic = model.peft_config["default"], model.peft_config["critic"]
    assert (critic.r, critic.target_modules, critic.use_dora) == (policy.r, policy.target_modules, True)
    assert critic.modules_to_save is None
    assert len(parameters(model, "critic")) == len([n for n in parameters(model, "default") if "lora_" in n])
    other = add_adapter(tiny.llava(), LoraConfig(r=3))
    add_value_adapter(other, LoraConfig(r=2, target_modules=("q_proj",)))
    shapes = {tuple(p.shape) for p in parameters(other, "critic").values()}
    assert shapes == {(2, 32), (32, 2)} and len(parameters(other, "critic")) == 2 * 2


@pytest.mark.parametrize("order", ["policy first", "critic first"])
def test_one_loss_over_both_passes_gives_each_its_own_gradient(
    order: str, model: PeftModel, inputs: dict[str, Tensor]
) -> None:
    alone = gradients(model, policy_loss(model, inputs)) | gradients(model, critic_loss(model, inputs))
    assert alone.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    parts: list[Callable] = [policy_loss, critic_loss] if order == "policy first" else [critic_loss, policy_loss]
    assert_same(gradients(model, sum(part(model, inputs) for part in parts)), alone)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_pass_is_recomputed_with_the_adapter_it_began_with(
    reentrant: bool, model: PeftModel, inputs: dict[str, Tensor]
) -> None:
    expected = gradients(model, policy_loss(model, inputs) + critic_loss(model, inputs))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = gradients(model, policy_loss(model, inputs) + critic_loss(model, inputs))
    assert_same(found, expected)
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@pytest.mark.parametrize("off", [adapters_off, PeftModel.disable_adapter], ids=["ours", "PEFT's"])
def test_both_learn_after_a_reference_pass(
    off: Callable[[Any], AbstractContextManager], model: PeftModel, inputs: dict[str, Tensor]
) -> None:
    expected = gradients(model, policy_loss(model, inputs) + critic_loss(model, inputs))
    base = logits(tiny.llava().train(), inputs)
    trained = logits(model, inputs)
    with off(model):
        assert torch.equal(logits(model, inputs), base)
        with adapter_active(model, "critic"):
            assert torch.equal(logits(model, inputs), base), "what is off stays off"
    assert torch.equal(logits(model, inputs), trained)
    assert_same(gradients(model, policy_loss(model, inputs) + critic_loss(model, inputs)), expected)


def test_a_reference_pass_inside_leaves_everything_as_it_was(model: PeftModel, inputs: dict[str, Tensor]) -> None:
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    with adapter_active(model, "critic"):
        critic = logits(model, inputs)
        with model.disable_adapter():
            logits(model, inputs)
        assert torch.equal(logits(model, inputs), critic)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trains


def test_adapters_off_trains_nothing_less(model: PeftModel) -> None:
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    with adapters_off(model):
        pass
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trains


def test_an_error_inside_switches_back(model: PeftModel, inputs: dict[str, Tensor]) -> None:
    before = logits(model, inputs)
    with pytest.raises(RuntimeError, match="stop"), adapter_active(model, "critic"):
        raise RuntimeError("stop")
    assert torch.equal(logits(model, inputs), before)


def test_a_wrapped_model_is_switched_too(model: PeftModel, inputs: dict[str, Tensor]) -> None:
    with adapter_active(model, "critic"):
        expected = logits(model, inputs)

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = model

    with adapter_active(Wrapper(), "critic"):
        assert torch.equal(logits(model, inputs), expected)


def test_an_unknown_adapter_is_named(model: PeftModel) -> None:
    with pytest.raises(ValueError, match="no adapter is named 'critc'; there are default, critic"), \
            adapter_active(model, "critc"):  # fmt: skip
        pass
    with pytest.raises(ValueError, match="the model has no adapters"), adapter_active(tiny.llava(), "critic"):
        pass


def test_saved_modules_are_the_policys_alone(inputs: dict[str, Tensor]) -> None:
    """With `lm_head` in modules_to_save, the critic reads through the pretrained head."""
    model = model_of(modules_to_save=("lm_head",))
    plain = model_of()
    with adapter_active(model, "critic"), adapter_active(plain, "critic"):
        for (_, one), (_, other) in zip(
            parameters(model, "critic").items(), parameters(plain, "critic").items(), strict=True
        ):
            one.data.copy_(other.data)
        assert torch.equal(logits(model, inputs), logits(plain, inputs))
        assert model.get_output_embeddings().weight is model.base_model.model.lm_head.original_module.weight
    found = gradients(model, policy_loss(model, inputs) + critic_loss(model, inputs))
    assert any("modules_to_save.default" in name for name in found)


# With the anchor


@pytest.mark.parametrize("inside", [False, True], ids=["policy active", "critic active"])
def test_the_anchor_sees_the_policys_adapter_alone(inside: bool) -> None:
    model = add_adapter(tiny.llava(), LoraConfig(r=3, modules_to_save=("lm_head",)))
    tiny.stirred(model, 0.2)
    expected = Anchor(model, l2=1.0, adapter_penalty=1.0).penalty().loss
    before = Anchor(model, l2=1.0, adapter_penalty=1.0)
    add_value_adapter(model)
    tiny.stirred(nn.ParameterList(parameters(model, "critic").values()), 0.2)
    after = Anchor(model, l2=1.0, adapter_penalty=1.0)
    with adapter_active(model, "critic") if inside else nullcontext():
        for anchor in (before, after):
            loss = anchor.penalty().loss
            assert torch.equal(loss, expected)
    assert not [name for name in gradients(model, loss) if ".critic." in name]


# Saving


def test_the_policys_folder_holds_the_policy_alone(model: PeftModel, inputs: dict[str, Tensor], tmp_path: Path) -> None:
    model.eval()
    trained = logits(model, inputs)
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    folder = save_adapter(model, tmp_path / "adapter", inputs)
    assert not [path for path in folder.rglob("*") if "critic" in path.name]
    plain = PeftModel.from_pretrained(tiny.llava(), folder).eval()
    assert list(plain.peft_config) == ["default"]
    assert torch.equal(logits(plain, inputs), trained)
    assert list(model.peft_config) == ["default", "critic"]
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trains, "the critic goes on learning"


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True, "modules_to_save": ("lm_head",)}])
def test_the_critics_adapter_comes_back_exactly(
    options: dict[str, Any], inputs: dict[str, Tensor], tmp_path: Path
) -> None:
    model = model_of(**options).eval()
    with adapter_active(model, "critic"):
        critic = logits(model, inputs)
    policy = logits(model, inputs)
    folder = save_value_adapter(model, tmp_path / "critic" / "adapter")
    assert sorted(path.name for path in folder.parent.iterdir()) == ["adapter"]
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in folder.iterdir()}

    tiny.stirred(nn.ParameterList(parameters(model, "critic").values()), 0.5, seed=3)
    held = parameters(model, "critic")
    load_value_adapter(model, folder)  # in place of the one that is there, whose weights an optimizer may hold
    assert all(parameters(model, "critic")[name] is p for name, p in held.items())
    other = add_adapter(tiny.llava(), LoraConfig(r=3, **options)).eval()
    other.load_state_dict(
        {name: value for name, value in model.state_dict().items() if ".critic." not in name}, strict=False
    )
    random = torch.get_rng_state()
    load_value_adapter(other, folder)
    assert torch.equal(torch.get_rng_state(), random)
    for loaded in (model, other):
        assert all(p.requires_grad for p in parameters(loaded, "critic").values())
        assert torch.equal(logits(loaded, inputs), policy)
        with adapter_active(loaded, "critic"):
            assert torch.equal(logits(loaded, inputs), critic)


def test_saving_replaces_the_old_folder_whole(model: PeftModel, tmp_path: Path) -> None:
    folder = save_value_adapter(model, tmp_path / "adapter")
    (folder / "stale").write_text("")
    save_value_adapter(model, folder)
    assert not (folder / "stale").exists()


def test_folders_that_are_not_there_are_the_users(model: PeftModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no saved critic adapter"):
        load_value_adapter(model, tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        save_value_adapter(model, tmp_path / "file" / "adapter")
