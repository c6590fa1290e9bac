"""TD errors, GAE and returns against hand arithmetic and TRL's layout."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from mmft.functional.masked import last_index, masked_whiten
from mmft.functional.returns import TD_ERROR_MEAN, credit_score, discounted_return, gae, td_error, td_loss

NAN = float("nan")


def test_td_error_by_hand():
    # 1 + 0.5 * 4 - 2 = 1;  0 + 0.5 * 0 - 4 = -4
    delta = td_error(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 4.0]), torch.tensor([4.0, 0.0]), gamma=0.5)
    assert_close(delta, torch.tensor([1.0, -4.0]))


def test_td_loss_by_hand_and_holds_the_target():
    value = torch.tensor([[2.0, 4.0, NAN]], requires_grad=True)
    next_value = torch.tensor([[4.0, 0.0, NAN]], requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    output = td_loss(torch.tensor([[1.0, 0.0, 9.0]]), value, next_value, mask, gamma=0.5)
    assert_close(output.loss, torch.tensor(8.5))  # (1^2 + 4^2) / 2
    assert_close(output.metrics[TD_ERROR_MEAN], torch.tensor(-1.5))  # (1 - 4) / 2
    output.loss.backward()
    assert_close(value.grad, torch.tensor([[-1.0, 4.0, 0.0]]))  # -delta: 2 delta * (-1) / 2
    assert next_value.grad is None


def test_gae_by_hand():
    # gamma 1/2, lam 1/2. Row 0, all kept: V = [1, 2, 4], R = [0, 0, 8]
    #   delta = [0 + 1 - 1, 0 + 2 - 2, 8 - 4] = [0, 0, 4];  A = [1/4 * 1/4 * 4, 1/4 * 4, 4] = [0.25, 1, 4]
    # Row 1, two kept: V = [2, 6, -], R = [1, 3, 0]
    #   delta = [1 + 3 - 2, 3 + 0 - 6] = [2, -3];  A = [2 - 3/4, -3] = [1.25, -3], then 0
    reward = torch.tensor([[0.0, 0.0, 8.0], [1.0, 3.0, 0.0]])
    value = torch.tensor([[1.0, 2.0, 4.0], [2.0, 6.0, NAN]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    advantage, returns = gae(reward, value, mask, gamma=0.5, lam=0.5)
    assert_close(advantage, torch.tensor([[0.25, 1.0, 4.0], [1.25, -3.0, 0.0]]))
    assert_close(returns, torch.tensor([[1.25, 3.0, 8.0], [3.25, 3.0, 0.0]]))


def test_gae_limits_are_td_and_monte_carlo():
    torch.manual_seed(0)
    reward, value = torch.randn(2, 4), torch.randn(2, 4)
    mask = torch.ones(2, 4, dtype=torch.bool)
    next_value = torch.cat([value[:, 1:], torch.zeros(2, 1)], 1)
    assert_close(gae(reward, value, mask, 0.9, 0.0)[0], td_error(reward, value, next_value, 0.9))
    assert_close(gae(reward, value, mask, 0.9, 1.0)[1][:, 0], discounted_return(reward, mask, 0.9))


def test_gae_needs_no_gradient():
    value = torch.ones(1, 2, requires_grad=True)
    advantage, returns = gae(torch.ones(1, 2), value, torch.ones(1, 2, dtype=torch.bool), 1.0, 1.0)
    assert not advantage.requires_grad and not returns.requires_grad


def trl_advantages(reward, value, mask_p1, mask, gamma, lam):
    """TRL 1.12's recursion, written step by step from its description, scalar by scalar."""
    rows, length = reward.shape
    advantage = torch.zeros_like(reward)
    for b in range(rows):
        running = 0.0
        for t in range(length - 1, -1, -1):
            v = value[b, t].item() if mask_p1[b, t] else 0.0
            following = value[b, t + 1].item() if t + 1 < length and mask_p1[b, t + 1] else 0.0
            running = reward[b, t].item() + gamma * following - v + gamma * lam * running
            advantage[b, t] = running
    return advantage, advantage + value.masked_fill(~mask_p1, 0.0), masked_whiten(advantage, mask)


def test_gae_with_one_more_position_is_the_layout_of_trl():
    torch.manual_seed(0)
    lengths = torch.tensor([2, 4, 6])
    positions = torch.arange(6)
    mask, mask_p1 = positions < lengths[:, None], positions < lengths[:, None] + 1
    kl = (0.1 * torch.randn(3, 6)).masked_fill(~mask, 0.0)
    # TRL pays the score one position after EOS, or at the last position of a full row: the longer mask's last.
    reward = credit_score(-kl, torch.tensor([1.0, -2.0, 3.0]), last_index(mask_p1))
    assert reward[0, 2].item() == 1.0 and reward[1, 4].item() == -2.0
    value = torch.randn(3, 6)
    advantage, returns = gae(reward, value, mask_p1, 0.99, 0.95)
    theirs = trl_advantages(reward, value, mask_p1, mask, 0.99, 0.95)
    assert_close((advantage, returns, masked_whiten(advantage, mask)), theirs)


def test_discounted_return_by_hand():
    reward = torch.tensor([[1.0, 2.0, 4.0], [8.0, NAN, NAN]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert_close(discounted_return(reward, mask, 0.5), torch.tensor([3.0, 8.0]))  # 1 + 1 + 1;  8
    assert_close(discounted_return(reward, mask, 0.0), torch.tensor([1.0, 8.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_credit_score_adds_at_its_own_position_and_copies(dtype):
    reward = torch.full((2, 3), 0.5)
    credited = credit_score(reward, torch.tensor([1.0, -1.0], dtype=dtype), torch.tensor([2, 0]))
    assert_close(credited, torch.tensor([[0.5, 0.5, 1.5], [-0.5, 0.5, 0.5]]))
    assert_close(reward, torch.full((2, 3), 0.5))
