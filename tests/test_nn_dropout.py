"""Dropout that can be sampled: its masks, and what they depend on."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mmft.nn.dropout import McDropout, sampling_dropout


def test_dropout_in_training():
    dropout, x = McDropout(0.5), torch.randn(64, 3, 16)
    y = dropout(x)
    kept = y.ne(0)
    assert_close(y, torch.where(kept, 2 * x, 0.0))  # 1 / (1 - 1/2)
    assert torch.equal(kept, kept[:, :1].expand_as(kept))  # tokens of a row share a mask
    assert not kept[:, 0].eq(kept[0, 0]).all()  # rows do not
    assert 0.4 < kept.float().mean() < 0.6  # 1024 draws: 6 standard deviations
    assert torch.equal(dropout.eval()(x), x)
    assert torch.equal(McDropout(0.0).train()(x), x)


@pytest.mark.parametrize("sampling", [False, True])
def test_p_is_the_share_dropped(sampling):
    dropout, x = McDropout(0.2).train(not sampling), torch.ones(1, 10_000)
    with sampling_dropout(nn.Sequential(dropout if sampling else McDropout(0.2)), 0):
        y = dropout(x)
    assert set(y.unique().tolist()) == {0.0, 1.25}  # 1 / (1 - 0.2)
    assert abs(y.eq(0).float().mean().item() - 0.2) < 0.02  # 5 standard deviations of 0.004


def test_trl_cannot_switch_it_off():
    model = nn.Sequential(McDropout(0.5))
    for module in model.modules():
        if isinstance(module, nn.Dropout):  # what TRL's PPOTrainer does
            module.p = 0.0
    assert model[0].p == 0.5


def test_sampled_masks_depend_on_the_seed_alone():
    model, x = nn.Sequential(McDropout(0.5), McDropout(0.5)).eval(), torch.ones(5, 64)
    state = torch.get_rng_state()
    with sampling_dropout(model, 7):
        assert not model.training
        first, second = model(x), model(x)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    with sampling_dropout(model, 7):
        assert torch.equal(model(x), first)
        # One function, whatever the rows: a row alone, or with more tokens, has the same features dropped.
        assert torch.equal(model(torch.ones(1, 3, 64))[0], second[:3])
    assert set(first.unique().tolist()) == {0.0, 4.0}
    assert not torch.equal(first, second)
    assert torch.equal(model(x), x)
    with sampling_dropout(model, 8):
        assert not torch.equal(model(x), first)


def test_sampling_without_a_seed_differs_and_leaves_global_numbers_alone():
    model, x = McDropout(0.5).eval(), torch.ones(1, 256)
    state = torch.get_rng_state()
    samples = []
    for _ in range(2):
        with sampling_dropout(model, None):
            samples.append(model(x))
    assert not torch.equal(*samples)
    assert torch.equal(torch.get_rng_state(), state)


def test_sampling_ends_with_its_block():
    model, x = McDropout(0.5).eval(), torch.ones(2, 32)
    with pytest.raises(KeyError), sampling_dropout(model, 0):
        raise KeyError
    assert torch.equal(model(x), x)
    with sampling_dropout(model, 0):
        with sampling_dropout(model, 1):
            model(x)
        outer = model(x)  # the outer generator goes on, from its start
    with sampling_dropout(model, 0):
        assert torch.equal(model(x), outer)


def test_nothing_to_sample_is_an_error():
    with pytest.raises(ValueError, match="Linear has no McDropout"), sampling_dropout(nn.Linear(1, 1), 0):
        pass


@pytest.mark.parametrize("p", [-0.1, 1.0])
def test_dropout_probabilities(p):
    with pytest.raises(ValueError, match="in \\[0, 1\\)"):
        McDropout(p)
