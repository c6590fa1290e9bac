"""Reward heads against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import gelu, layer_norm
from torch.testing import assert_close

from mmft.nn.dropout import sampling_dropout
from mmft.nn.heads import LOG_VARIANCE_BOUND, GaussianHead, ScalarHead


def mlp(head, x):
    norm, up, _, _, down = head.score
    return gelu(layer_norm(x, norm.normalized_shape) @ up.weight.T + up.bias) @ down.weight.T + down.bias


def test_heads_are_their_formula():
    x = torch.randn(5, 8)
    scalar, gaussian = ScalarHead(8).eval(), GaussianHead(8).eval()
    assert_close(scalar(x), mlp(scalar, x)[:, 0])
    mean, log_variance = gaussian(x)
    assert_close(mean, mlp(gaussian, x)[:, 0])
    assert_close(log_variance, 8 * torch.tanh(mlp(gaussian, x)[:, 1] / 8))
    for head in (scalar, gaussian):
        with sampling_dropout(head, 0):
            assert not torch.equal(head(x)[0], head(x)[0])


@pytest.mark.parametrize("raw", [30.0, -30.0])
def test_log_variance_is_bounded_and_can_come_back(raw):
    head = GaussianHead(8).eval()
    with torch.no_grad():
        head.score[-1].weight.zero_()
        head.score[-1].bias.copy_(torch.tensor([0.0, raw]))
    _, log_variance = head(torch.randn(1, 8))
    assert_close(log_variance, torch.tensor([8 * math.tanh(raw / 8)]))
    assert abs(log_variance.item()) < LOG_VARIANCE_BOUND
    log_variance.sum().backward()
    # d/ds_raw c tanh(s_raw / c) = 1 - tanh^2 > 0
    assert head.score[-1].bias.grad[1].item() == pytest.approx(1 - math.tanh(raw / 8) ** 2, rel=1e-3)
