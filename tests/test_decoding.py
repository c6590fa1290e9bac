"""Sampling: what is drawn, from which distribution, and that every decoder draws the same."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from transformers import GenerationConfig, TopKLogitsWarper, TopPLogitsWarper

from mmft.models.decoding import DECODERS, Responses, Sampling, equal_groups, sample_responses
from mmft.models.interface import Interface
from mmft.models.prompts import Prompt


def made(eos_bias: float = 3.0) -> tuple[Interface, list[Prompt]]:
    """Prompts of three lengths, two answers to each."""
    interface = Interface(tiny.vision_policy(eos_bias=eos_bias).model, tiny.processor())
    return interface, [p for p in (interface.builder(row) for row in tiny.rows(4)) for _ in range(2)]


@pytest.mark.parametrize("name", ["cached", "cached without positions", "cached apart", "scoring"])
def test_decoders_agree(name: str) -> None:
    """The same forced tokens have the same log-probabilities, left-padded and from a cache or scored anew."""
    interface, prompts = made()
    forced = tiny.answers(len(prompts), 5)
    drawn = []
    for decoder in (name, "scoring"):
        responses = Responses(len(prompts), Sampling(5), interface.pad_id, interface.device, forced)
        with torch.no_grad():
            DECODERS[decoder](interface, prompts, responses)
        drawn.append(responses.stacked()[1])
    torch.testing.assert_close(*drawn, atol=1e-4, rtol=1e-4)


def test_greedy_is_what_generate_finds() -> None:
    interface, prompts = made(eos_bias=-50.0)
    ours, _, _ = sample_responses(interface, prompts, Sampling(6, greedy=True), 8)
    interface.decoder = "generate"
    theirs, _, _ = sample_responses(interface, prompts, Sampling(6, greedy=True), 8)
    assert torch.equal(ours, theirs)


def test_as_transformers_draws_what_generate_draws() -> None:
    model = tiny.text_policy()
    interface = Interface(model, tiny.tokenizer())
    prompts = [Prompt(torch.tensor(ids)) for ids in ([5, 6, 7], [8], [9, 4])]
    torch.manual_seed(3)
    ours, _, _ = sample_responses(interface, prompts, Sampling(7, 0.9, as_transformers=True), 3)
    inputs, _ = interface.prompt_inputs(prompts)
    torch.manual_seed(3)
    config = GenerationConfig(
        max_new_tokens=7, do_sample=True, temperature=0.9, top_k=0, pad_token_id=0, eos_token_id=None
    )
    theirs = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], generation_config=config
    )
    assert torch.equal(ours, theirs[:, inputs["input_ids"].shape[1] :])


def test_frequencies_are_the_probabilities() -> None:
    """A token of probability 0 is never drawn; 0.01 is 3 standard errors of 20,000 draws."""
    probs = torch.tensor([0.5, 0.0, 0.2, 0.3, 0.0])
    torch.manual_seed(0)
    drawn = Sampling(1).choose(probs.log().expand(20_000, -1))
    shares = torch.bincount(drawn, minlength=5) / 20_000
    assert shares[1] == shares[4] == 0
    torch.testing.assert_close(shares, probs, atol=0.011, rtol=0)


@pytest.mark.parametrize(
    ("options", "warper"), [({"top_k": 3}, TopKLogitsWarper(3)), ({"top_p": 0.6}, TopPLogitsWarper(0.6))]
)
def test_top_k_and_top_p_are_transformers(options: dict[str, Any], warper: Any) -> None:
    torch.manual_seed(0)
    scores = torch.randn(4, 12)
    allowed = torch.isfinite(warper(None, scores.clone()))
    seen = torch.zeros(4, 12, dtype=torch.bool)
    for _ in range(400):
        seen[torch.arange(4), Sampling(1, **options).choose(scores.clone())] = True
    assert not (seen & ~allowed).any()
    assert (seen & allowed).sum() >= 0.9 * allowed.sum()


def test_banned_and_early_stops_have_no_probability() -> None:
    sampling = Sampling(4, 0.5, min_new_tokens=2, stops=(1,), banned=(3,))
    logits = torch.zeros(2, 5)
    early, late = sampling.scores(logits, 1), sampling.scores(logits, 2)
    assert early.isinf().tolist() == [[False, True, False, True, False]] * 2
    assert late.isinf().tolist() == [[False, False, False, True, False]] * 2
    assert logits.abs().sum() == 0, "the model's own logits are left alone"


def test_nothing_counts_after_the_stop() -> None:
    interface, prompts = made(eos_bias=4.0)
    stop = interface.builder.tokenizer.eos_token_id
    torch.manual_seed(0)
    tokens, mask, logprobs = sample_responses(interface, prompts, Sampling(8, stops=(stop,)), 3)
    ends = (tokens == stop).int().argmax(1)
    assert (mask.sum(1) < mask.shape[1]).sum() > 0
    for row, keep, end in zip(tokens, mask, ends, strict=True):
        if keep.sum() < len(keep):
            assert keep.sum() == end + 1, "the stop itself is kept"
            assert (row[end + 1 :] == interface.pad_id).all()
    assert (logprobs[~mask] == 0).all() and (logprobs[mask] < 0).all()


def test_neighbours_with_one_prompt_are_a_group() -> None:
    a, b = Prompt(torch.tensor([5])), Prompt(torch.tensor([6]))
    assert equal_groups([a, a, b, b])[1] == 2
    assert equal_groups([a, a, a])[1] == 3
    for apart in ([a, b], [a, b, a, b], [a, a, b], [a, a, b, b, b, b, a]):
        assert equal_groups(apart) == (apart, 1)
