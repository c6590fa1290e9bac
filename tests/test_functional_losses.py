"""Policy loss, KL and value loss against hand arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from mmft.functional import policy, value
from mmft.functional.policy import KLController, kl_estimate, ppo_clip_loss
from mmft.functional.value import clipped_value_loss, explained_variance

NAN, INF = float("nan"), float("inf")


def test_ppo_clip_loss_by_hand():
    # eps 0.2. ratio [1.5, 1.5, 0.5, 0.5], A [1, -1, 1, -1]
    #   min(r A, clip(r) A) = [min(1.5, 1.2), min(-1.5, -1.2), min(0.5, 0.8), min(-0.5, -0.8)] = [1.2, -1.5, 0.5, -0.8]
    #   mean -0.15, so loss 0.15; the clipped term decides in the first and the last
    logprobs = torch.tensor([[1.5, 1.5, 0.5, 0.5, 1.0]]).log().requires_grad_()
    advantage = torch.tensor([[1.0, -1.0, 1.0, -1.0, NAN]])
    old = torch.tensor([[0.0, 0.0, 0.0, 0.0, -INF]])
    mask = torch.tensor([[True, True, True, True, False]])
    output = ppo_clip_loss(logprobs, old, advantage, mask, clip_range=0.2)
    assert_close(output.loss, torch.tensor(0.15))
    assert_close(output.metrics[policy.CLIP_FRACTION], torch.tensor(0.5))
    assert_close(output.metrics[policy.RATIO_MEAN], torch.tensor(1.0))
    assert_close(output.metrics[policy.RATIO_MAX], torch.tensor(1.5))
    mean_square = (2 * math.log(1.5) ** 2 + 2 * math.log(0.5) ** 2) / 4
    assert_close(output.metrics[policy.APPROX_KL], torch.tensor(0.5 * mean_square))
    output.loss.backward()
    # Only unclipped terms pull: d(-r A)/dlogp / 4 = -r A / 4 -> second +1.5/4, third -0.5/4. Padding pulls nothing.
    assert_close(logprobs.grad, torch.tensor([[0.0, 0.375, -0.125, 0.0, 0.0]]))


def test_first_minibatch_ratio_is_exactly_one():
    logprobs = torch.randn(2, 3)
    output = ppo_clip_loss(logprobs, logprobs.clone(), torch.randn(2, 3), torch.ones(2, 3, dtype=torch.bool), 0.2)
    assert output.metrics[policy.RATIO_MEAN].item() == output.metrics[policy.RATIO_MAX].item() == 1.0
    assert output.metrics[policy.APPROX_KL].item() == output.metrics[policy.CLIP_FRACTION].item() == 0.0


def test_kl_estimates_by_hand():
    # pi = 1/2, pi_ref = 1/4: r = 1/2; k1 = ln 2, k3 = 1/2 - 1 + ln 2.   pi = 1/4, pi_ref = 1/2: r = 2
    logprobs = torch.tensor([[0.5, 0.25, 1.0]]).log()
    ref = torch.tensor([[0.25, 0.5, NAN]]).log()
    mask = torch.tensor([[True, True, False]])
    assert_close(kl_estimate(logprobs, ref, mask, "k1"), torch.tensor([[math.log(2), -math.log(2), 0.0]]))
    assert_close(kl_estimate(logprobs, ref, mask, "k3"), torch.tensor([[math.log(2) - 0.5, 1 - math.log(2), 0.0]]))


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_estimates_are_unbiased(estimator):
    # Exact expectation over the actions of pi, not a sample: sum_a pi(a) k(a) = KL(pi || pi_ref).
    torch.manual_seed(0)
    logp, logq = torch.randn(1, 6).log_softmax(-1), torch.randn(1, 6).log_softmax(-1)
    kl = kl_estimate(logp, logq, torch.ones(1, 6, dtype=torch.bool), estimator)
    assert_close((logp.exp() * kl).sum(), (logp.exp() * (logp - logq)).sum())


def test_unknown_kl_estimator():
    with pytest.raises(ValueError, match="'k2'"):
        kl_estimate(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), "k2")


def test_kl_controller_by_hand():
    controller = KLController(coef=0.1, target=2.0, horizon=100)
    assert controller.update(kl=2.2, n_steps=50) == pytest.approx(0.1 * 1.05)  # e = 0.1, 1 + 0.1 * 50 / 100
    assert controller.update(kl=9.0, n_steps=50) == pytest.approx(0.105 * 1.1)  # e clipped at 0.2
    assert controller.update(kl=0.0, n_steps=1000) == pytest.approx(0.1155 * 0.8)  # e = -0.2, at most one horizon
    resumed = KLController(coef=7.0, target=2.0, horizon=100)
    resumed.load_state_dict(controller.state_dict())
    assert resumed.update(2.2, 50) == controller.update(2.2, 50)


def test_kl_controller_without_target_is_fixed():
    controller = KLController(coef=0.05)
    assert controller.update(kl=100.0, n_steps=64) == 0.05


@pytest.mark.parametrize("options", [{"target": 0.0}, {"horizon": 0}])
def test_kl_controller_refuses_nonsense(options):
    with pytest.raises(ValueError, match="must be positive"):
        KLController(coef=0.1, **options)


def test_clipped_value_loss_by_hand():
    # c 0.5, V_old 0. V [1, 1, 0.25, -1], G [2, 0, 1, -2] -> clipped V [0.5, 0.5, 0.25, -0.5]
    #   squares [1, 1, 0.5625, 1], clipped squares [2.25, 0.25, 0.5625, 2.25], max [2.25, 1, 0.5625, 2.25]
    v = torch.tensor([[1.0, 1.0, 0.25, -1.0, 5.0]], requires_grad=True)
    g = torch.tensor([[2.0, 0.0, 1.0, -2.0, NAN]])
    mask = torch.tensor([[True, True, True, True, False]])
    output = clipped_value_loss(v, torch.zeros(1, 5), g, mask, clip_range=0.5)
    assert_close(output.loss, torch.tensor(0.5 * (2.25 + 1.0 + 0.5625 + 2.25) / 4))
    assert_close(output.metrics[value.CLIP_FRACTION], torch.tensor(2 / 4))
    output.loss.backward()
    # (V - G) / 4 where the unclipped square decides; at equality both halves pass it on in full
    assert_close(v.grad, torch.tensor([[0.0, 0.25, -0.1875, 0.0, 0.0]]))


def test_value_loss_without_clipping():
    mask = torch.ones(1, 2, dtype=torch.bool)
    output = clipped_value_loss(torch.tensor([[3.0, 0.0]]), torch.zeros(1, 2), torch.ones(1, 2), mask, None)
    assert_close(output.loss, torch.tensor(0.5 * (4 + 1) / 2))
    assert output.metrics[value.CLIP_FRACTION].item() == 0.0


def test_explained_variance_by_hand():
    # G [0, 2, 4], variance 8/3. V = G: 1. V = 2: 0. V = [0, 1, 2]: G - V = [0, 1, 2], variance 2/3 -> 3/4
    g = torch.tensor([[0.0, 2.0, 4.0, NAN]])
    mask = torch.tensor([[True, True, True, False]])
    for v, expected in ((g, 1.0), (torch.full_like(g, 2.0), 0.0), (torch.tensor([[0.0, 1.0, 2.0, 9.0]]), 0.75)):
        assert_close(explained_variance(v, g, mask), torch.tensor(expected))


def test_explained_variance_of_constant_returns_is_zero():
    g = torch.full((3, 7), 0.1)
    assert explained_variance(torch.randn(3, 7), g, torch.ones(3, 7, dtype=torch.bool)).item() == 0.0


def test_losses_equal_those_of_trl_written_out():
    # TRL 1.12 masks by arithmetic on finite numbers; both must give one number to 1e-6.
    torch.manual_seed(0)
    lp, old = -torch.rand(4, 5), -torch.rand(4, 5)
    adv, v, v_old, g = (torch.randn(4, 5) for _ in range(4))
    mask = torch.rand(4, 5) > 0.3
    keep = mask.float()
    ratio = torch.exp(lp - old)
    surrogate = torch.min(ratio * adv, ratio.clip(0.8, 1.2) * adv)
    assert_close(ppo_clip_loss(lp, old, adv, mask, 0.2).loss, -(surrogate * keep).sum() / keep.sum(), rtol=0, atol=1e-6)
    worst = torch.max((v - g) ** 2, (v_old + (v - v_old).clip(-0.2, 0.2) - g) ** 2)
    expected = 0.5 * (worst * keep).sum() / keep.sum()
    assert_close(clipped_value_loss(v, v_old, g, mask, 0.2).loss, expected, rtol=0, atol=1e-6)
