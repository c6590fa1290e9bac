"""The start-up check takes the first way that changes nothing, says what it gave up, and refuses what cannot be."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

import mmft.models.packing as packing
from mmft.models import decoding, selfcheck
from mmft.models import interface as interfaces
from mmft.models.interface import Interface
from mmft.models.packing import additive
from mmft.models.prompts import Prompt
from mmft.models.selfcheck import _answers, _two_prompts, check
from mmft.types import UserError


def made() -> tuple[Interface, list[Any]]:
    interface = Interface(tiny.vision_policy().model, tiny.processor())
    tiny.stirred(interface.model, 0.3)
    return interface, [interface.builder(row) for row in tiny.rows(4)]


def test_a_sound_model_keeps_every_way() -> None:
    interface, prompts = made()
    assert check(interface, prompts) == []
    assert (interface.features.way, interface.decoder, interface.share_prompts) == ("outputs", "cached", True)


def test_features_of_another_picture_are_given_up(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    interface, prompts = made()
    honest = interface.features.features
    monkeypatch.setattr(interface.features, "features", lambda pixel_values, **k: honest(pixel_values.flip(-1), **k))
    check(interface, prompts)
    assert interface.features.way == "tower"


def test_a_decoder_that_draws_from_elsewhere_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    interface, prompts = made()
    honest = decoding.decode_cached

    def off(feeds: Interface, rows: Any, responses: Any) -> None:
        honest(feeds, rows, responses)
        responses.logprobs[-1] = responses.logprobs[-1] + 0.5

    monkeypatch.setitem(decoding.DECODERS, "cached", off)
    check(interface, prompts)
    assert interface.decoder == "cached without positions"


def test_answers_that_see_their_siblings_are_not_shared(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    interface, prompts = made()
    causal = lambda segment, *rest: torch.ones(*segment.shape, segment.shape[1]).bool().tril()[:, None]  # noqa: E731
    monkeypatch.setattr(interfaces, "tree_mask", causal)
    check(interface, prompts)
    assert not interface.share_prompts
    assert "each response computes its prompt anew" in caplog.text


def test_answers_at_their_siblings_end_are_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions that run on from one answer to the next."""
    interface, prompts = made()
    honest = packing.pack_together

    def running(*args: Any, **options: Any) -> Any:
        packed = honest(*args, **options)
        packed.inputs["position_ids"] = torch.arange(packed.width).expand(len(packed.inputs["input_ids"]), -1)
        return packed

    monkeypatch.setattr(interfaces, "pack_together", running)
    check(interface, prompts)
    assert not interface.share_prompts


def test_pictures_in_another_order_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right in each row alone, wrong in a batch."""
    interface, prompts = made()
    honest = interface.pack

    def turned(*args: Any, **options: Any) -> Any:
        packed = honest(*args, **options)
        image = packed.inputs["mm_encoder_outputs"]["image"] if "mm_encoder_outputs" in packed.inputs else {}
        if image:
            image["pooler_output"] = image.pooler_output[::-1]
        return packed

    monkeypatch.setattr(interface, "pack", turned)
    with pytest.raises(UserError):
        check(interface, prompts)


def test_where_no_decoder_is_left_the_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    interface, prompts = made()
    monkeypatch.setattr(selfcheck, "DECODERS", {"generate": lambda *_: 1 / 0})
    monkeypatch.setattr(selfcheck, "_FAILURES", (ZeroDivisionError,))
    with pytest.raises(UserError, match="sampling and scoring disagree"):
        check(interface, prompts)


# Models that do it wrong themselves.


class Blind(LlamaForCausalLM):
    """Reads neither mask nor positions: padding on the left, and a tree of answers, are one text to it."""

    def forward(self, input_ids: Any, attention_mask: Any = None, position_ids: Any = None, **options: Any) -> Any:
        return super().forward(input_ids=input_ids, **options)


class Counting(GPT2LMHeadModel):
    """Attends as it should, but its learned positions count padding, whatever they are told."""

    def forward(self, input_ids: Any, attention_mask: Any = None, position_ids: Any = None, **options: Any) -> Any:
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **options)


class Typed(LlamaForCausalLM):
    """As PaliGemma: tokens of type 0, and all without types, see one another; those of type 1 what precedes them."""

    sees_all = (0,)

    def forward(
        self, input_ids: Any, attention_mask: Any = None, position_ids: Any = None, token_type_ids: Any = None,
        **options: Any,
    ) -> Any:  # fmt: skip
        if attention_mask is not None and attention_mask.dim() == 2 and input_ids.shape[1] == attention_mask.shape[1]:
            types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            before = torch.ones(input_ids.shape[1], input_ids.shape[1], dtype=torch.bool).tril()
            open_to_all = torch.isin(types, torch.tensor(self.sees_all))
            seen = before | (open_to_all[:, :, None] & open_to_all[:, None, :])
            seen = seen & attention_mask[:, None, :].bool() | torch.eye(input_ids.shape[1], dtype=torch.bool)
            attention_mask = additive(seen[:, None], self.dtype)
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **options
        )  # fmt: skip


class AllSeeing(Typed):
    """Whatever the types, the future is seen."""

    sees_all = (0, 1)


def text(kind: type[Any], typed: bool = False) -> tuple[Interface, list[Prompt]]:
    """A random text model, and prompts of three lengths."""
    ids = {"pad_token_id": tiny.PAD, "eos_token_id": tiny.EOS, "bos_token_id": None}
    gpt2 = GPT2Config(vocab_size=len(tiny.WORDS), n_embd=32, n_layer=2, n_head=4, n_positions=64, **ids)
    model = tiny.stirred(kind(gpt2 if kind is Counting else tiny.llama_config()), 0.2).eval()
    asked = [torch.tensor(i) for i in ([5, 6, 7, 8], [9, 4], [3, 8, 8, 10, 4, 6])]
    prompts = [Prompt(i, {}, {"token_type_ids": torch.zeros_like(i)} if typed else {}) for i in asked]
    return Interface(model, tiny.tokenizer()), prompts


def test_a_model_blind_to_masks_is_fed_so_that_it_does_not_matter(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing on the left, and each answer in a row of its own: the scoring pass alone is left to draw from."""
    interface, prompts = text(Blind)
    notes = check(interface, prompts)
    assert interface.decoder == "scoring" and not interface.share_prompts
    assert len(notes) == 2 and all(note in caplog.text for note in notes)
    assert "'scoring': not by cached (off by" in notes[0] and "each response computes its prompt anew" in notes[1]


def test_positions_that_count_padding_are_seen() -> None:
    interface, prompts = text(Counting)
    check(interface, prompts)
    assert interface.decoder == "scoring" and not interface.share_prompts


def test_an_answers_types_are_those_under_which_it_sees_no_future() -> None:
    """With 0, as in the prompt, the first token would be foreseen by tokens that have read it."""
    interface, prompts = text(Typed, typed=True)
    assert check(interface, prompts) == []
    assert interface.growth == {"token_type_ids": 1}
    assert (interface.decoder, interface.share_prompts, interface.prompt_sees) == ("cached", True, "pictures")


def test_a_prompt_without_types_gets_those_that_text_has() -> None:
    """Beside one that has them, as a row without a picture lies beside one with."""
    interface, prompts = text(Typed, typed=True)
    check(interface, prompts)
    bare = Prompt(prompts[0].input_ids)
    tokens = torch.tensor([[5, 6], [6, 7]])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    packed = interface.pack([bare, prompts[1]], tokens, mask, share=False)
    assert packed.inputs["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 0, 0]]


def test_a_model_that_always_sees_the_future_is_refused() -> None:
    interface, prompts = text(AllSeeing, typed=True)
    with pytest.raises(UserError, match="see their own future whatever token_type_ids says"):
        check(interface, prompts)
    assert not interface.checked


# The check itself.


def test_a_run_goes_on_as_if_nothing_had_been_tried() -> None:
    """Random numbers of every kind, weights, and modes."""
    interface, prompts = made()
    interface.model.train()
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    before = {name: weight.clone() for name, weight in interface.model.state_dict().items()}
    check(interface, prompts)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert all(torch.equal(weight, before[name]) for name, weight in interface.model.state_dict().items())
    assert interface.model.training and all(p.grad is None for p in interface.model.parameters())


def test_it_is_done_once_and_again_for_another_number_of_pictures() -> None:
    interface, prompts = made()
    passes: list[int] = []
    interface.model.register_forward_hook(lambda *_: passes.append(1))
    check(interface, prompts)
    assert passes
    passes.clear()
    assert check(interface, prompts[::-1]) == [] and passes == []
    text_row = interface.builder(replace(tiny.rows(1)[0], image=None))
    assert check(interface, [*prompts, text_row]) == [] and passes
    passes.clear()
    check(interface, [text_row])
    assert passes == []


def test_a_kind_of_prompt_that_was_refused_is_refused_again(monkeypatch: pytest.MonkeyPatch) -> None:
    interface, prompts = made()
    check(interface, prompts)
    honest = interface.pack

    def needs_a_picture(rows: Any, *args: Any, **options: Any) -> Any:
        if not all(p.pictures for p in rows):
            raise ValueError("no picture")
        return honest(rows, *args, **options)

    monkeypatch.setattr(interface, "pack", needs_a_picture)
    text_row = interface.builder(replace(tiny.rows(1)[0], image=None))
    for _ in range(2):
        with pytest.raises(UserError, match="does not take prompts with no picture: no picture"):
            check(interface, [text_row, *prompts])
    assert check(interface, prompts) == []


def test_two_unlike_prompts_are_compared() -> None:
    """Of the first number of pictures there is; another picture and length, shortened where all are of one length."""
    interface, prompts = made()
    first, other = _two_prompts(interface, prompts)
    assert first is prompts[0] and len(other) != len(first) and other.picture_key != first.picture_key
    equal = [p for p in prompts if len(p) == len(prompts[0])]
    first, other = _two_prompts(interface, equal)
    assert len(equal) == 2 and len(other) == len(first) - 1 and other.picture_key == equal[1].picture_key
    first, other = _two_prompts(interface, equal[:1])
    assert len(other) == len(first) - 1 and other.picture_key == first.picture_key


def test_answers_hold_no_special_token() -> None:
    interface, _ = made()
    answers = _answers(interface).flatten().tolist()
    words = interface.builder.tokenizer
    special = {*words.all_special_ids, interface.pad_id, words.convert_tokens_to_ids("<image>")}
    assert len(set(answers)) == len(answers) and not special & set(answers)
