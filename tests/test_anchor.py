"""The anchor against dense arithmetic on merged weights."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close

from mmft.models import anchor as anchor_module
from mmft.models.anchor import ADAPTER_PENALTY, L2_DISTANCE, L2_LOSS, Anchor


class Net(nn.Module):
    """Layers of equal and of different shapes, an embedding, a convolution and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.wide = nn.Linear(6, 10)
        self.conv = nn.Conv1d(6, 4, kernel_size=3)
        self.norm = nn.LayerNorm(10)
        self.head = nn.Linear(10, 3, bias=False)

    def forward(self, ids):
        hidden = self.second(self.first(self.embed(ids)))
        return self.head(self.norm(self.wide(hidden)))


LINEAR = ["first", "second", "wide"]


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def lora(net, **options):
    """LoRA with B away from 0: an adapter that has trained."""
    config = {"r": 2, "lora_alpha": 3, "target_modules": LINEAR, "init_lora_weights": False} | options
    return get_peft_model(copy.deepcopy(net), LoraConfig(**config))


def merged_squared_distance(model, net):
    """||W_merged - W_pretrained||^2 the long way: PEFT's own merge, weight by weight."""
    merged = copy.deepcopy(model).merge_and_unload().state_dict()
    return sum((merged[name] - value).square().sum() for name, value in net.state_dict().items())


def dense_penalty(model):
    """The same from get_delta_weight, which autograd can follow."""
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    return sum(layer.get_delta_weight(a).square().sum() for layer in layers for a in layer.active_adapters)


CASES = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "ranks": {"rank_pattern": {"second": 4}, "alpha_pattern": {"wide": 7}},
    "embedding": {"target_modules": [*LINEAR, "embed"]},
    "conv": {"target_modules": [*LINEAR, "conv"]},
    "lora_bias": {"lora_bias": True},
    "modules_to_save": {"modules_to_save": ["head"]},
    "dora": {"use_dora": True},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_distance_is_that_of_the_merged_weights(net, options):
    model = lora(net, **options)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "modules_to_save" in name:
                p.add_(0.1)
    squared = merged_squared_distance(model, net)
    assert squared > 0.1
    output = Anchor(model, l2=0.3).penalty()
    assert_close(output.loss, 0.3 * squared)
    assert_close(output.metrics[L2_DISTANCE], squared.sqrt())
    assert_close(output.metrics[L2_LOSS], output.loss.detach())
    assert Anchor(model).distance() == pytest.approx(math.sqrt(squared.item()), rel=1e-5)


@pytest.mark.parametrize("name", ["plain", "rslora", "ranks", "embedding", "conv"])
def test_gradients_are_those_of_the_dense_penalty(net, name):
    model = lora(net, **CASES[name])
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours = torch.autograd.grad(Anchor(model, l2=0.3).penalty().loss, parameters)
    dense = torch.autograd.grad(0.3 * dense_penalty(model), parameters)
    assert_close(ours, dense)


def test_gradient_of_saved_modules(net):
    model = lora(net, modules_to_save=["head"])
    head = model.base_model.model.head.modules_to_save["default"].weight
    with torch.no_grad():
        head.add_(0.1)
    Anchor(model, l2=0.5).penalty().loss.backward()
    assert_close(head.grad, torch.full_like(head, 0.1))  # 2 * 0.5 * 0.1


def test_several_active_adapters_are_one_update(net):
    model = lora(net)
    model.add_adapter("other", LoraConfig(r=3, lora_alpha=1, target_modules=["second"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    merged = copy.deepcopy(model).base_model.merge_and_unload(adapter_names=["default", "other"]).state_dict()
    squared = sum((merged[name] - value).square().sum() for name, value in net.state_dict().items())
    assert_close(Anchor(model, l2=1.0).penalty().loss, squared)


def test_a_fresh_adapter_is_at_distance_zero(net):
    model = lora(net, init_lora_weights=True)
    output = Anchor(model, l2=1.0).penalty()
    output.loss.backward()
    assert output.metrics[L2_DISTANCE].item() == 0.0
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_adapter_penalty_is_the_norm_of_the_factors(net):
    model = lora(net, modules_to_save=["head"])
    anchor = Anchor(model, adapter_penalty=0.25)
    phi = [p for name, p in model.named_parameters() if "lora_" in name]
    output = anchor.penalty()
    assert_close(output.loss, 0.25 * sum(p.square().sum() for p in phi))
    assert output.metrics.keys() == {ADAPTER_PENALTY}
    assert_close(torch.autograd.grad(output.loss, phi), tuple(0.5 * p.detach() for p in phi))
    both = Anchor(model, l2=0.3, adapter_penalty=0.25).penalty()
    assert_close(both.loss, both.metrics[L2_LOSS] + both.metrics[ADAPTER_PENALTY])


def test_full_fine_tuning_is_held_at_its_first_weights(net):
    net.norm.requires_grad_(False)
    anchor = Anchor(net, l2=2.0)
    assert anchor.distance() == 0.0
    with torch.no_grad():
        net.first.weight.add_(0.5)  # 36 weights: 36 * 0.25 = 9
        net.norm.weight.add_(1.0)  # frozen: not ours to hold
    output = anchor.penalty()
    assert_close(output.loss, torch.tensor(18.0))
    assert anchor.distance() == pytest.approx(3.0)
    output.loss.backward()
    assert_close(net.first.weight.grad, torch.full((6, 6), 2.0))  # 2 * l2 * 0.5


def test_biases_trained_beside_lora_count(net):
    model = lora(net, bias="lora_only")
    anchor = Anchor(model, l2=1.0)
    before = anchor.penalty().loss.item()
    with torch.no_grad():
        model.base_model.model.first.base_layer.bias.add_(2.0)  # 6 biases: 6 * 4
    assert anchor.penalty().loss.item() == pytest.approx(before + 24.0, rel=1e-5)


def test_tied_weights_are_counted_once(net):
    net.other_head = nn.Linear(10, 3, bias=False)
    net.other_head.weight = net.head.weight
    anchor = Anchor(net, l2=1.0)
    with torch.no_grad():
        net.head.weight.add_(1.0)
    assert_close(anchor.penalty().loss, torch.tensor(30.0))


def test_coefficient_zero_costs_nothing(net, monkeypatch):
    def called(*_):
        raise AssertionError("computed although its coefficient is 0")

    for name in ("lora_l2", "squared_norm", "l2_to_reference", "adapter_penalty"):
        monkeypatch.setattr(anchor_module, name, called)
    output = Anchor(lora(net)).penalty()
    assert output.loss.item() == 0.0 and not output.loss.requires_grad and output.metrics == {}
    full = Anchor(net)
    assert full.penalty().loss.item() == 0.0
    assert full.distance() is None and full._copied == []


def test_the_anchor_is_fp32_under_autocast(net):
    model = lora(net)
    exact = Anchor(model, l2=1.0).penalty().loss
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(Anchor(model, l2=1.0, adapter_penalty=0.0).penalty().loss, exact, rtol=0, atol=0)


def test_parameters_are_looked_up_at_each_call(net):
    model = lora(net, modules_to_save=["head"])
    anchor = Anchor(model, l2=1.0)
    before = anchor.penalty().loss
    model.double()
    assert_close(anchor.penalty().loss, before.double())
    with model.disable_adapter():  # the adapter's distance does not depend on whether it is switched on
        assert_close(anchor.penalty().loss, before.double())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dora": True, "target_modules": [*LINEAR, "embed"]}, "embed uses DoraEmbeddingVariant"),
        ({"init_lora_weights": "pissa_niter_2"}, "init_lora_weights='pissa_niter_2'"),
        ({"trainable_token_indices": {"embed": [1, 2]}}, "embed"),
    ],
)
def test_unknown_distances_are_refused_by_name(net, options, words):
    model = lora(net, **options)
    with pytest.raises(ValueError, match=words):
        Anchor(model, l2=1.0)
    assert Anchor(model).distance() is None


def test_other_adapters_are_refused_by_name(net):
    model = get_peft_model(net, IA3Config(target_modules=LINEAR, feedforward_modules=[]))
    with pytest.raises(ValueError, match="first is a Linear, not LoRA"):
        Anchor(model, l2=1.0)


@pytest.mark.parametrize("options", [{"l2": -1.0}, {"adapter_penalty": -1.0}, {"adapter_penalty": 1.0}])
def test_nonsense_is_refused(net, options):
    with pytest.raises(ValueError, match=r"at least 0|needs an adapter"):
        Anchor(net, **options)
