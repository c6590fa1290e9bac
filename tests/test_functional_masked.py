"""Masked statistics, log-probabilities and response masks against hand arithmetic and TRL."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from mmft.functional import masked
from mmft.functional.masked import (
    entropy,
    last_index,
    masked_mean,
    masked_var,
    masked_whiten,
    response_mask,
    token_logprobs,
)

NAN = float("nan")


def test_masked_mean_by_hand():
    x = torch.tensor([[1.0, 2.0, NAN], [6.0, NAN, NAN]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert_close(masked_mean(x, mask), torch.tensor(3.0))  # (1 + 2 + 6) / 3
    assert_close(masked_mean(x, mask, dim=1), torch.tensor([1.5, 6.0]))


def test_masked_mean_gradient_ignores_what_is_outside():
    x = torch.tensor([1.0, NAN, 3.0], requires_grad=True)
    masked_mean(x, torch.tensor([True, False, True])).backward()
    assert_close(x.grad, torch.tensor([0.5, 0.0, 0.5]))


def test_masked_mean_refuses_to_broadcast():
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(3,\)"):
        masked_mean(torch.zeros(2, 3), torch.ones(3, dtype=torch.bool))


def test_masked_var_by_hand():
    x = torch.tensor([1.0, 2.0, 6.0, 100.0])
    mask = torch.tensor([True, True, True, False])
    # mean 3, squares 4 + 1 + 9 = 14; 14/2 = 7 unbiased, 14/3 biased
    assert_close(masked_var(x, mask), torch.tensor(7.0))
    assert_close(masked_var(x, mask, unbiased=False), torch.tensor(14 / 3))


@pytest.mark.parametrize("shift_mean", [True, False])
def test_masked_whiten_by_hand(shift_mean):
    x = torch.tensor([1.0, 2.0, 6.0, NAN])
    mask = torch.tensor([True, True, True, False])
    shift = 0.0 if shift_mean else 3.0
    expected = [-2 / math.sqrt(7) + shift, -1 / math.sqrt(7) + shift, 3 / math.sqrt(7) + shift, 0.0]
    assert_close(masked_whiten(x, mask, shift_mean), torch.tensor(expected))


@pytest.mark.parametrize("kept", [0, 1])
def test_whitening_fewer_than_two_entries_is_finite(kept):
    mask = torch.zeros(2, 3, dtype=torch.bool)
    mask[0, :kept] = True
    assert_close(masked_whiten(torch.full((2, 3), 5.0), mask), torch.zeros(2, 3))


@pytest.mark.parametrize("shift_mean", [True, False])
def test_statistics_equal_trl(shift_mean):
    from trl.experimental.ppo import ppo_trainer as trl

    torch.manual_seed(0)
    x, mask = torch.randn(6, 9) * 3 + 1, torch.rand(6, 9) > 0.4
    assert_close(masked_mean(x, mask), trl.masked_mean(x, mask), rtol=0, atol=0)
    assert_close(masked_var(x, mask), trl.masked_var(x, mask), rtol=0, atol=0)
    theirs = trl.masked_whiten(x, mask, shift_mean).masked_fill(~mask, 0.0)
    assert_close(masked_whiten(x, mask, shift_mean), theirs, rtol=0, atol=0)


def test_token_logprobs_by_hand():
    # softmax([0, ln 3]) = [1/4, 3/4]; at temperature 1/2 the logits double: softmax([0, ln 9]) = [1/10, 9/10]
    logits = torch.tensor([[[0.0, math.log(3)], [0.0, math.log(3)]]])
    tokens = torch.tensor([[0, 1]])
    assert_close(token_logprobs(logits, tokens), torch.tensor([[0.25, 0.75]]).log())
    assert_close(token_logprobs(logits, tokens, temperature=0.5), torch.tensor([[0.1, 0.9]]).log())


def test_token_logprobs_equal_trl():
    from trl.trainer.utils import selective_log_softmax

    torch.manual_seed(0)
    logits, tokens = torch.randn(3, 5, 50) * 4, torch.randint(50, (3, 5))
    assert_close(token_logprobs(logits, tokens, 0.7), selective_log_softmax(logits / 0.7, tokens), rtol=0, atol=1e-6)


def test_low_precision_logits_are_scored_in_fp32():
    torch.manual_seed(0)
    logits, tokens = torch.randn(2, 4, 30).bfloat16(), torch.randint(30, (2, 4))
    expected = logits.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    assert_close(token_logprobs(logits, tokens), expected)
    assert_close(entropy(logits), torch.distributions.Categorical(logits=logits.float()).entropy())


def test_chunks_change_nothing(monkeypatch):
    torch.manual_seed(0)
    logits, tokens = torch.randn(3, 5, 7), torch.randint(7, (3, 5))
    whole = token_logprobs(logits, tokens), entropy(logits)
    monkeypatch.setattr(masked, "_CHUNK_ELEMENTS", 14)  # two rows a chunk, the last one odd
    assert_close((token_logprobs(logits, tokens), entropy(logits)), whole, rtol=0, atol=0)


def test_empty_batch_is_allowed():
    logits, tokens = torch.zeros(0, 4, 5), torch.zeros(0, 4, dtype=torch.long)
    assert token_logprobs(logits, tokens).shape == entropy(logits).shape == (0, 4)


def test_logprob_and_entropy_gradients():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(5, (2, 3))
    assert torch.autograd.gradcheck(lambda z: (token_logprobs(z, tokens, 0.8), entropy(z, 0.8)), logits)


def test_entropy_by_hand():
    # uniform over 4: ln 4; [1/4, 3/4]: 1/4 ln 4 + 3/4 ln 4/3
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, math.log(3), -math.inf, -math.inf]])
    expected = torch.tensor([math.log(4), 0.25 * math.log(4) + 0.75 * math.log(4 / 3)])
    assert_close(entropy(logits), expected)


def test_banned_tokens_leave_gradients_finite():
    logits = torch.tensor([[[1.0, 2.0, -math.inf]]], requires_grad=True)
    (token_logprobs(logits, torch.tensor([[0]])).sum() + entropy(logits).sum()).backward()
    allowed = torch.tensor([[[1.0, 2.0]]], requires_grad=True)
    (token_logprobs(allowed, torch.tensor([[0]])).sum() + entropy(allowed).sum()).backward()
    assert_close(logits.grad[..., :2], allowed.grad)
    assert logits.grad[..., 2].item() == 0.0


@pytest.mark.parametrize("function", [lambda z, t: token_logprobs(z, t, 0.0), lambda z, t: entropy(z, -1.0)])
def test_temperature_must_be_positive(function):
    with pytest.raises(ValueError, match="temperature must be positive"):
        function(torch.zeros(1, 1, 2), torch.zeros(1, 1, dtype=torch.long))


def test_mismatched_tokens_are_refused():
    with pytest.raises(ValueError, match="do not match"):
        token_logprobs(torch.zeros(1, 3, 2), torch.zeros(1, 2, dtype=torch.long))


EOS, PAD, END = 2, 0, 3


@pytest.mark.parametrize(
    ("tokens", "eos_ids", "pad_id", "kept"),
    [
        ([5, 6, EOS, PAD, PAD], EOS, PAD, 3),
        ([5, 6, EOS, 7, EOS], EOS, PAD, 3),  # text after EOS is not part of the response
        ([5, END, 6, EOS, PAD], [EOS, END], PAD, 2),  # the first of several stop tokens
        ([5, 6, EOS, EOS, EOS], EOS, EOS, 3),  # padded with EOS: only the first one was sampled
        ([EOS, EOS, EOS, EOS, EOS], EOS, EOS, 1),
        ([5, 6, 7, 8, 9], EOS, PAD, 5),  # never stopped
        ([5, 6, 7, 8, 9], EOS, EOS, 5),
        ([5, PAD, 7, EOS, PAD], EOS, PAD, 4),  # padding sampled inside a response stays
        ([5, 6, 7, PAD, PAD], EOS, PAD, 3),  # never stopped, and shorter than its batch
        ([5, EOS, 7, 8, 9], None, None, 5),
        ([5, EOS, 7, PAD, PAD], None, PAD, 3),
    ],
)
def test_response_mask(tokens, eos_ids, pad_id, kept):
    mask = response_mask(torch.tensor([tokens]), eos_ids, pad_id)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[t < kept for t in range(5)]]
    assert last_index(mask).tolist() == [kept - 1]


def test_last_index_of_an_empty_row_can_still_index():
    assert last_index(torch.zeros(2, 3, dtype=torch.bool)).tolist() == [0, 0]
