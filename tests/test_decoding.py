"""Sampling: what is drawn, from which distribution, and that every decoder draws the same."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from transformers import (
    GenerationConfig,
    MinNewTokensLengthLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mmft.models.decoding import DECODERS, Responses, Sampling, cache_of, equal_groups, sample_responses
from mmft.models.interface import Interface
from mmft.models.prompts import Prompt, pad_prompts
from mmft.models.scoring import PolicyWithCritic


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


@pytest.mark.parametrize("name", ["cached", "cached without positions", "cached apart", "generate"])
def test_greedy_is_what_the_models_own_generate_finds(name: str) -> None:
    """From pixels and left-padded ids alone, token by token, for prompts of three lengths with two rows each."""
    interface, prompts = made(eos_bias=-50.0)
    tiny.stirred(interface.model, 1.0)
    interface.decoder = name
    ours, mask, _ = sample_responses(interface, prompts, Sampling(8, greedy=True), 8)
    inputs = pad_prompts(prompts, interface.pad_id, "left")
    config = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=interface.pad_id)
    theirs = interface.model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(ours, theirs) and mask.all()
    assert len({len(p) for p in prompts}) == 3 and len({tuple(row) for row in ours.tolist()}) > 2


def test_batches_do_not_change_what_is_found() -> None:
    """Of any size, groups cut across or not."""
    interface, prompts = made()
    whole = sample_responses(interface, prompts, Sampling(5, greedy=True), len(prompts))
    for batch in (1, 3):
        part = sample_responses(interface, prompts, Sampling(5, greedy=True), batch)
        assert torch.equal(part[0], whole[0]) and torch.equal(part[1], whole[1])
        torch.testing.assert_close(part[2], whole[2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["cached", "scoring"])
def test_tokens_are_drawn_from_the_distribution_that_is_scored(name: str) -> None:
    """Temperature, banned tokens and a minimum of tokens are part of the policy, in both."""
    interface, prompts = made()
    stop, banned = interface.builder.tokenizer.eos_token_id, tuple(tiny.answers(1, 2, seed=5)[0].tolist())
    sampling = Sampling(5, 0.7, min_new_tokens=2, stops=(stop,), banned=banned)
    tokens = tiny.answers(len(prompts), 5)
    tokens[1, 1], tokens[2, 4] = banned
    tokens[0, 3] = stop  # an end where it may be; nothing counts behind it
    counts = torch.ones_like(tokens, dtype=torch.bool)
    counts[0, 4] = False
    impossible = counts & torch.isin(tokens, torch.tensor(banned))
    responses = Responses(len(prompts), sampling, interface.pad_id, interface.device, tokens)
    scorer = PolicyWithCritic(interface.model, torch.nn.Identity(), banned, 0.7, (stop,), 2)
    with torch.no_grad():
        DECODERS[name](interface, prompts, responses)
        mask = torch.ones_like(tokens, dtype=torch.bool)
        scored = scorer(interface.pack(prompts, tokens, mask), tokens, values=False).logprobs_BT
    drawn = responses.stacked()[1]
    assert torch.isinf(drawn[impossible]).all() and impossible[1, 1] and impossible[2, 4]
    torch.testing.assert_close(drawn[counts], scored[counts], atol=1e-4, rtol=1e-4)
    early = torch.full_like(tokens, stop)
    with torch.no_grad():
        scored = scorer(interface.pack(prompts, early, mask), early, values=False).logprobs_BT
    assert torch.isinf(scored).tolist() == [[True, True, False, False, False]] * len(prompts)


def test_generate_leaves_the_checkpoints_settings_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beams and bans of a checkpoint are not the policy's; they are back when it is done, or has failed."""
    interface, prompts = made()
    interface.decoder = "generate"
    theirs = interface.base.generation_config
    theirs.update(num_beams=2, repetition_penalty=3.0, suppress_tokens=[7])
    tokens, mask, logprobs = sample_responses(interface, prompts, Sampling(3, 0.8), 8)
    assert interface.base.generation_config is theirs
    scorer = PolicyWithCritic(interface.model, torch.nn.Identity(), (), 0.8)
    with torch.no_grad():
        scored = scorer(interface.pack(prompts, tokens, mask), tokens, values=False).logprobs_BT
    torch.testing.assert_close(logprobs, scored, atol=1e-4, rtol=1e-4)

    def failing(**inputs: Any) -> Any:
        raise ValueError("within")

    monkeypatch.setattr(interface.model, "generate", failing)
    with pytest.raises(ValueError, match="within"):
        sample_responses(interface, prompts, Sampling(3), 8)
    assert interface.base.generation_config is theirs


OPTIONS = {
    "plain": {},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.7},
    "a minimum": {"min_new_tokens": 3},
    "banned": {"banned": (5, 6)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_one_seed_draws_what_generate_draws(options: dict[str, Any]) -> None:
    model = tiny.text_policy(eos_bias=1.0)
    interface = Interface(model, tiny.tokenizer())
    prompts = [Prompt(torch.tensor(ids)) for ids in ([5, 6, 7], [8], [9, 4], [8])]
    sampling = Sampling(9, 0.9, stops=(tiny.EOS,), as_transformers=True, **options)
    torch.manual_seed(3)
    ours, _, _ = sample_responses(interface, prompts, sampling, 4)
    inputs = pad_prompts(prompts, tiny.PAD, "left")
    torch.manual_seed(3)
    config = GenerationConfig(
        max_new_tokens=9, do_sample=True, temperature=0.9, top_k=sampling.top_k, top_p=sampling.top_p,
        min_new_tokens=sampling.min_new_tokens or None, suppress_tokens=list(sampling.banned) or None,
        pad_token_id=tiny.PAD, eos_token_id=tiny.EOS,
    )  # fmt: skip
    theirs = model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(ours, theirs)
    assert len(set(ours.flatten().tolist())) > 4


def test_frequencies_are_the_probabilities() -> None:
    """A token of probability 0 is never drawn; 0.01 is 3 standard errors of 20,000 draws."""
    probs = torch.tensor([0.5, 0.0, 0.2, 0.3, 0.0])
    torch.manual_seed(0)
    drawn = Sampling(1).choose(probs.log().expand(20_000, -1))
    shares = torch.bincount(drawn, minlength=5) / 20_000
    assert shares[1] == shares[4] == 0
    torch.testing.assert_close(shares, probs, atol=0.011, rtol=0)


@pytest.mark.parametrize(
    ("point", "token"), [(0.0, 1), (0.2499, 1), (0.25, 3), (0.7499, 3), (0.75, 4), (1 - 2**-53, 4)]
)
def test_a_point_falls_in_one_tokens_share(point: float, token: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares [0, 1/4, 0, 1/2, 1/4, 0]: the ends of the interval never reach a token of probability 0."""
    monkeypatch.setattr(torch, "rand", lambda *size, dtype, device: torch.full(size, point, dtype=dtype))
    scores = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]]).log()
    assert Sampling(1).choose(scores).tolist() == [token]


WARPED = {
    "top_k": ({"top_k": 3}, [TopKLogitsWarper(3)]),
    "top_k of all": ({"top_k": 50}, []),
    "top_p": ({"top_p": 0.6}, [TopPLogitsWarper(0.6)]),
    "top_p of little": ({"top_p": 1e-6}, [TopPLogitsWarper(1e-6)]),
    "both": ({"top_k": 5, "top_p": 0.6}, [TopKLogitsWarper(5), TopPLogitsWarper(0.6)]),
}


@pytest.mark.parametrize(("options", "warpers"), WARPED.values(), ids=WARPED.keys())
def test_top_k_and_top_p_are_transformers(
    options: dict[str, Any], warpers: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The very probabilities, as they are handed to `multinomial`; two tokens are equal, one is banned in some rows."""
    scores = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    scores[:2, 2], scores[:, 5] = float("-inf"), scores[:, 4]
    given: list[torch.Tensor] = []
    monkeypatch.setattr(torch, "multinomial", lambda probs, n: (given.append(probs), probs.argmax(-1, keepdim=True))[1])
    Sampling(1, as_transformers=True, **options).choose(scores.clone())
    for warper in warpers:
        scores = warper(None, scores)
    torch.testing.assert_close(given[0], scores.softmax(-1))


def test_scores_are_those_of_transformers_processors() -> None:
    logits = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(4, 0.6, min_new_tokens=2, stops=(1, 2), banned=(3,))
    for step in range(4):
        ids = torch.zeros(3, 5 + step, dtype=torch.long)
        expected = MinNewTokensLengthLogitsProcessor(5, 2, [1, 2])(ids, logits.clone())
        expected = SuppressTokensLogitsProcessor([3])(ids, expected)
        expected = TemperatureLogitsWarper(0.6)(ids, expected)
        torch.testing.assert_close(sampling.scores(logits, step), expected)


def test_banned_and_early_stops_have_no_probability() -> None:
    sampling = Sampling(4, 0.5, min_new_tokens=2, stops=(1,), banned=(3,))
    logits = torch.zeros(2, 5)
    early, late = sampling.scores(logits, 1), sampling.scores(logits, 2)
    assert early.isinf().tolist() == [[False, True, False, True, False]] * 2
    assert late.isinf().tolist() == [[False, False, False, True, False]] * 2
    assert logits.abs().sum() == 0, "the model's own logits are left alone"


@pytest.mark.parametrize("name", ["cached", "generate", "scoring"])
def test_nothing_counts_after_the_stop(name: str) -> None:
    interface, prompts = made(eos_bias=4.0)
    interface.decoder = name
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


def test_a_row_that_has_ended_draws_padding() -> None:
    """Step by step: token 2 ends a response, and 0 is padding. log p = z - logsumexp(z)."""
    logits = torch.tensor([[0.0, 1.0, 3.0, 2.0], [0.0, 5.0, 3.0, 2.0]])
    responses = Responses(2, Sampling(4, greedy=True, stops=(2,)), 0, torch.device("cpu"))
    assert responses.draw(logits).tolist() == [2, 1] and not responses.done
    assert responses.draw(logits).tolist() == [0, 1] and not responses.done
    assert responses.draw(logits.flip(0)).tolist() == [0, 2], "row 0 has ended, whatever it would draw"
    assert responses.done, "every row has ended"
    tokens, logprobs = responses.stacked()
    assert tokens.tolist() == [[2, 0, 0], [1, 1, 2]]
    lse = logits.logsumexp(-1)
    expected = torch.stack([5 - lse[1], 5 - lse[1], 3 - lse[0]])
    torch.testing.assert_close(logprobs[1], expected)
    torch.testing.assert_close(logprobs[0, 0], 3 - lse[0])


def test_forced_tokens_end_as_drawn_ones_do() -> None:
    forced = torch.tensor([[2, 3, 3], [1, 1, 3]])
    responses = Responses(2, Sampling(9, stops=(2,)), 0, torch.device("cpu"), forced)
    for _ in range(3):
        assert not responses.done
        responses.draw(torch.zeros(2, 4))
    assert responses.done, "so many were forced"
    assert responses.stacked()[0].tolist() == [[2, 0, 0], [1, 1, 3]]


def test_a_model_without_a_cache_is_no_model_for_a_cached_loop() -> None:
    with pytest.raises(ValueError, match="keeps no cache"):
        cache_of({"logits": torch.zeros(1)})
    inner = {"language_model_outputs": {"past_key_values": "kept"}}
    assert cache_of(inner) == "kept"


def test_neighbours_with_one_prompt_are_a_group() -> None:
    a, b = Prompt(torch.tensor([5])), Prompt(torch.tensor([6]))
    assert equal_groups([a, a, b, b])[1] == 2
    assert equal_groups([a, a, a])[1] == 3
    for apart in ([a, b], [a, b, a, b], [a, a, b], [a, a, b, b, b, b, a]):
        assert equal_groups(apart) == (apart, 1)


def test_logits_that_are_no_numbers_are_not_sampled() -> None:
    """Each row's first token comes from a NaN: another draw would be the last word of the vocabulary."""
    responses = Responses(2, Sampling(3), 0, torch.device("cpu"))
    with pytest.raises(FloatingPointError, match="not finite"):
        responses.draw(torch.tensor([[0.0, 1.0], [float("nan"), 1.0]]))
