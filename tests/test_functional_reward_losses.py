"""Losses of reward models against hand arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from mmft.functional import reward_losses
from mmft.functional.reward_losses import aleatoric_loss, bradley_terry_loss, mse_loss

NAN = float("nan")
LN2, LN3, LN7 = math.log(2), math.log(3), math.log(7)


def test_mse_loss_by_hand():
    # R - R_hat = [1, 0, -2]: L = (1 + 0 + 4) / 3, dL/dR_hat = -2 (R - R_hat) / 3
    predicted = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    output = mse_loss(predicted, torch.tensor([2.0, 2.0, 2.0]))
    assert_close(output.loss, torch.tensor(5 / 3))
    assert_close(output.metrics[reward_losses.RMSE], torch.tensor(math.sqrt(5 / 3)))
    output.loss.backward()
    assert_close(predicted.grad, torch.tensor([-2 / 3, 0.0, 4 / 3]))


def test_bradley_terry_loss_by_hand():
    # d            ln 7         -ln 3     0                 ln 3, a tie
    # margin       0            0         ln 3              NaN, not read
    # sigmoid      7/8          1/4       1/4               3/4 and 1/4
    # L            ln 8/7       ln 4      ln 4              1/2 (ln 4/3 + ln 4) = 1/2 ln 16/3
    # dL/dd        -1/8         -3/4      -3/4              1/2 (3/4 - 1/4) = 1/4
    chosen = torch.tensor([LN7, 0.0, 1.0, 2.0 + LN3], requires_grad=True)
    rejected = torch.tensor([0.0, LN3, 1.0, 2.0], requires_grad=True)
    margin = torch.tensor([0.0, 0.0, LN3, NAN])
    tie = torch.tensor([False, False, False, True])
    output = bradley_terry_loss(chosen, rejected, margin, tie)
    assert_close(output.loss, torch.tensor((math.log(8 / 7) + 2 * math.log(4) + 0.5 * math.log(16 / 3)) / 4))
    # Of the three that are no tie: right, wrong, equal -> (1 + 0 + 1/2) / 3; mean d (ln 7 - ln 3 + 0) / 3
    assert_close(output.metrics[reward_losses.ACCURACY], torch.tensor(0.5))
    assert_close(output.metrics[reward_losses.MARGIN], torch.tensor((LN7 - LN3) / 3))
    output.loss.backward()
    assert_close(chosen.grad, torch.tensor([-1 / 32, -3 / 16, -3 / 16, 1 / 16]))
    assert_close(rejected.grad, -chosen.grad)


def test_bradley_terry_without_margins_or_ties():
    output = bradley_terry_loss(torch.tensor([LN3, LN3]), torch.tensor([0.0, 0.0]))
    assert_close(output.loss, torch.tensor(math.log(4 / 3)))
    assert output.metrics[reward_losses.ACCURACY].item() == 1.0


def test_bradley_terry_weights_by_hand():
    # losses [ln 4/3, ln 4], weights [3, 1]: (3 ln 4/3 + ln 4) / 4. Accuracy counts pairs, not weights.
    weight = torch.tensor([3.0, 1.0])
    output = bradley_terry_loss(torch.tensor([LN3, 0.0]), torch.tensor([0.0, LN3]), weight_B=weight)
    assert_close(output.loss, torch.tensor((3 * math.log(4 / 3) + math.log(4)) / 4))
    assert output.metrics[reward_losses.ACCURACY].item() == 0.5


def test_a_tie_has_no_direction():
    a, b, tie = torch.tensor([1.0]), torch.tensor([-0.5]), torch.tensor([True])
    assert_close(bradley_terry_loss(a, b, tie_mask_B=tie).loss, bradley_terry_loss(b, a, tie_mask_B=tie).loss)
    # Least at equal scores: ln 2.
    assert_close(bradley_terry_loss(a, a, tie_mask_B=tie).loss, torch.tensor(LN2))
    assert bradley_terry_loss(a, b, tie_mask_B=tie).metrics == {}


def test_bradley_terry_far_from_zero():
    # sigmoid(-200) is 0 in fp32, its log -inf; the loss is 200 all the same, and its gradient 1.
    chosen = torch.tensor([-100.0], requires_grad=True)
    output = bradley_terry_loss(chosen, torch.tensor([100.0]))
    assert_close(output.loss, torch.tensor(200.0))
    output.loss.backward()
    assert_close(chosen.grad, torch.tensor([-1.0]))


@pytest.mark.parametrize("weight", [[0.0, 0.0], [1.0, -1.0], [2.0, -1.0], [NAN, 1.0]])
def test_weights_that_weigh_nothing(weight):
    with pytest.raises(ValueError, match="weights must not be negative"):
        bradley_terry_loss(torch.zeros(2), torch.zeros(2), weight_B=torch.tensor(weight))


def test_aleatoric_loss_by_hand():
    # y - y_hat [2, -1, 0], s [ln 4, 0, 0] -> sigma [2, 1, 1]
    #   1/2 exp(-s) e^2 + 1/2 s = [1/2 4/4 + ln 2, 1/2, 0], mean (1 + ln 2) / 3
    #   dL/dy_hat = -exp(-s) e / 3 = [-1/6, 1/3, 0]
    #   dL/ds = (1/2 - 1/2 exp(-s) e^2) / 3 = [0, 0, 1/6]: no pull where sigma is the error, down where there is none
    mean = torch.tensor([0.0, 1.0, 5.0], requires_grad=True)
    log_variance = torch.tensor([math.log(4), 0.0, 0.0], requires_grad=True)
    output = aleatoric_loss(mean, log_variance, torch.tensor([2.0, 0.0, 5.0]))
    assert_close(output.loss, torch.tensor((1 + LN2) / 3))
    assert_close(output.metrics[reward_losses.RMSE], torch.tensor(math.sqrt(5 / 3)))
    assert_close(output.metrics[reward_losses.SIGMA], torch.tensor(4 / 3))
    assert_close(output.metrics[reward_losses.STANDARDIZED_RMSE], torch.tensor(math.sqrt(2 / 3)))
    output.loss.backward()
    assert_close(mean.grad, torch.tensor([-1 / 6, 1 / 3, 0.0]))
    assert_close(log_variance.grad, torch.tensor([0.0, 0.0, 1 / 6]))


@pytest.mark.parametrize(
    "loss",
    [
        lambda: mse_loss(torch.zeros(2), torch.zeros(3)),
        lambda: mse_loss(torch.zeros(2, 1), torch.zeros(2)),
        lambda: mse_loss(torch.zeros(0), torch.zeros(0)),
        lambda: bradley_terry_loss(torch.zeros(2), torch.zeros(2), margin_B=torch.zeros(1)),
        lambda: bradley_terry_loss(torch.zeros(2), torch.zeros(2), tie_mask_B=torch.zeros(1, dtype=torch.bool)),
        lambda: aleatoric_loss(torch.zeros(2), torch.zeros(1), torch.zeros(2)),
    ],
)
def test_shapes_are_checked(loss):
    with pytest.raises(ValueError, match="one number a row"):
        loss()
