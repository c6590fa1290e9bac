"""The start-up check takes the first way that changes nothing, says what it gave up, and refuses what cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

import mmft.models.packing as packing
from mmft.models import decoding, selfcheck
from mmft.models import interface as interfaces
from mmft.models.interface import Interface
from mmft.models.selfcheck import check
from mmft.types import UserError


def made() -> tuple[Interface, list[Any]]:
    interface = Interface(tiny.vision_policy().model, tiny.processor())
    tiny.stirred(interface.model, 0.3)
    return interface, [interface.builder(row) for row in tiny.rows(4)]


def test_a_sound_model_keeps_every_way() -> None:
    interface, prompts = made()
    before = torch.get_rng_state()
    assert check(interface, prompts) == []
    assert torch.equal(torch.get_rng_state(), before), "a run's random numbers go on where they were"
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
