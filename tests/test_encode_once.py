"""Each distinct picture once, and never another picture's features."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

from mmft.models.encode_once import FeatureStore, merge_outputs, output_of, pinned, split_output, vision_tower
from mmft.models.interface import Interface
from mmft.models.prompts import Prompt
from mmft.models.selfcheck import check
from mmft.types import Row


def made(budget: int = 2**30, **options: Any) -> tuple[Interface, list[Prompt], list[int]]:
    """An interface, prompts of four scenes, and the number of pictures in each of the tower's passes."""
    model = tiny.vision_policy().model
    interface = Interface(model, tiny.processor(), feature_budget=budget, **options)
    passes: list[int] = []
    tower = vision_tower(interface.base)
    tower.register_forward_hook(lambda _, args, out: passes.append(len(getattr(out, "last_hidden_state", ()))))
    return interface, [interface.builder(row) for row in tiny.rows(4)], passes


def features(store: FeatureStore, prompts: list[Prompt]) -> list[torch.Tensor]:
    """The features that each row's placeholders would be filled with."""
    output = store.inputs(prompts).inputs["mm_encoder_outputs"]["image"].pooler_output
    return list(output)


def test_once_for_each_content() -> None:
    interface, prompts, passes = made()
    again = interface.builder(tiny.rows(4)[0])  # the same picture, made anew
    features(interface.features, [*prompts, again, prompts[1]])
    features(interface.features, prompts[::-1])
    assert sum(passes) == 4 == interface.features.misses
    assert interface.features.hits == 6


def test_features_follow_their_rows() -> None:
    interface, prompts, _ = made()
    text = Prompt(prompts[0].input_ids[:3])
    alone = {id(p): features(interface.features, [p])[0] for p in prompts}
    order = [prompts[i] for i in (2, 0, 2, 3)]
    mixed = features(interface.features, [order[0], text, *order[1:]])
    assert len(mixed) == 4
    assert all(torch.equal(alone[id(p)], found) for p, found in zip(order, mixed, strict=True))
    assert not torch.equal(mixed[0], mixed[1])


def test_equal_to_pixels() -> None:
    """Logits of one row to the bit; of a shuffled batch within rounding."""
    interface, prompts, _ = made()
    answers = torch.tensor([[7, 8], [9, 7], [8, 8]])
    mask = torch.ones_like(answers, dtype=torch.bool)
    pixels = Interface(interface.model, interface.builder, encode_once="off")
    with torch.no_grad():
        for rows, exact in (([1], True), ([3, 1, 3], False)):
            asked, n = [prompts[i] for i in rows], len(rows)
            ours, theirs = (
                interface.model(**feeds.pack(asked, answers[:n], mask[:n]).inputs).logits
                for feeds in (interface, pixels)
            )
            assert torch.equal(ours, theirs) if exact else torch.allclose(ours, theirs, atol=1e-5)


def test_the_least_recently_used_go() -> None:
    one = made()[0]
    features(one.features, [made()[1][0]])
    size = one.features._bytes
    interface, prompts, passes = made(budget=2 * size)
    store = interface.features
    for i in (0, 1, 0, 2):  # 1 is dropped for 2
        features(store, [prompts[i]])
    assert (sum(passes), store._bytes) == (3, 2 * size)
    features(store, [prompts[0]])
    assert sum(passes) == 3
    features(store, [prompts[1]])
    assert sum(passes) == 4


def test_a_batch_larger_than_the_budget_is_served() -> None:
    interface, prompts, passes = made(budget=0)
    assert len(features(interface.features, prompts)) == 4
    features(interface.features, prompts)
    assert sum(passes) == 8


@pytest.mark.parametrize(("trains", "way"), [("vision_tower", "off"), ("multi_modal_projector", "tower")])
def test_nothing_that_trains_is_kept(trains: str, way: str, caplog: pytest.LogCaptureFixture) -> None:
    """Where the connector trains, the tower's output is still kept."""
    interface, prompts, _ = made()
    getattr(interface.base.model, trains).requires_grad_(True)
    check(interface, prompts)
    assert interface.features.way == way
    assert ("the vision tower trains" in caplog.text) == (way == "off")
    read_only = Interface(interface.model, interface.builder, trains=False)
    check(read_only, prompts)
    assert read_only.features.way == "outputs"


def test_a_tower_is_whole_again_after_an_error() -> None:
    interface, _, _ = made()
    tower = vision_tower(interface.base)
    with pytest.raises(RuntimeError, match="within"), pinned(tower, "pinned"):
        assert tower() == "pinned"
        raise RuntimeError("within")
    assert "forward" not in tower.__dict__


def test_a_towers_output_in_its_place_is_pixels() -> None:
    """The way of families without `mm_encoder_outputs`, here forced on one that has them."""
    interface, prompts, _ = made()
    interface.features.ways = ["tower", "off"]
    answers = torch.tensor([[7, 8]])
    packed = interface.pack(prompts[:1], answers, torch.ones_like(answers, dtype=torch.bool))
    with torch.no_grad():
        plain = interface.model(**packed.inputs).logits
        other = output_of(vision_tower(interface.base), interface.base, packed.inputs)
        with pinned(vision_tower(interface.base), packed.pinned):
            assert torch.equal(interface.model(**packed.inputs).logits, plain)
    assert torch.equal(other.last_hidden_state, packed.pinned.last_hidden_state)


def test_outputs_split_and_merge() -> None:
    interface, prompts, _ = made()
    with torch.no_grad():
        whole = interface.features._run(prompts)
    parts = split_output(whole, 4)
    assert parts is not None
    back = merge_outputs(parts)
    assert all(torch.equal(a, b) for a, b in zip(back.pooler_output, whole.pooler_output, strict=True))


def test_a_row_without_pictures_costs_nothing() -> None:
    interface, _, passes = made()
    row = Row("t", None, "Describe.")
    assert interface.features.inputs([interface.builder(row)]).inputs == {}
    assert passes == []
