"""Each distinct picture once, and never another picture's features."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmft.models import encode_once
from mmft.models.encode_once import (
    FeatureStore,
    _equal_batches,
    _tensors,
    merge_outputs,
    output_of,
    pinned,
    split_output,
    vision_tower,
)
from mmft.models.interface import Interface
from mmft.models.prompts import Prompt, stack_pictures
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


def test_features_do_not_depend_on_what_is_known() -> None:
    """In bf16 a CPU computes batches of other sizes otherwise, so each goes alone: a resumed run knows no picture."""
    interface, prompts, passes = made()
    interface.base.to(torch.bfloat16)
    together = features(interface.features, prompts)
    interface.features.clear()
    alone = [features(interface.features, [p])[0] for p in prompts]
    assert passes == [1] * 8
    assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))


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


def test_what_asks_for_a_gradient_without_weights_behind_it_is_kept() -> None:
    """As `enable_input_require_grads` has it, which recomputed activations need: no weight of the tower trains."""
    interface, prompts, _ = made()
    interface.base.enable_input_require_grads()
    check(interface, prompts)
    assert interface.features.way == "outputs"


@pytest.mark.parametrize("way", ["outputs", "tower"])
def test_features_carry_no_gradient(way: str) -> None:
    """Even of a tower that trains, and while a graph is recorded."""
    interface, prompts, _ = made()
    interface.base.requires_grad_(True)
    interface.features.ways = [way, "off"]
    given = interface.features.inputs(prompts)
    output = given.pinned if way == "tower" else given.inputs["mm_encoder_outputs"]["image"]
    tensors = list(_tensors(output))
    assert tensors and not any(tensor.requires_grad for tensor in tensors)


def test_a_connector_learns_from_kept_outputs_of_the_tower_as_from_pixels() -> None:
    interface, prompts, _ = made()
    connector = interface.base.model.multi_modal_projector.requires_grad_(True)
    check(interface, prompts)
    assert interface.features.way == "tower"
    pixels = Interface(interface.model, interface.builder, encode_once="off")
    tokens = tiny.answers(4, 3)
    gradients = []
    for feeds in (interface, pixels):
        packed = feeds.pack(prompts, tokens, torch.ones_like(tokens, dtype=torch.bool), share=False)
        with pinned(feeds.features.tower, packed.pinned):
            interface.model(**packed.inputs).logits.square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in connector.parameters()])
        interface.model.zero_grad()
    assert min(float(gradient.abs().max()) for gradient in gradients[1]) > 1e-4
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_tower_is_whole_again_after_an_error() -> None:
    interface, _, _ = made()
    tower = vision_tower(interface.base)
    with pytest.raises(RuntimeError, match="within"), pinned(tower, "pinned"):
        assert tower() == "pinned"
        raise RuntimeError("within")
    assert "forward" not in tower.__dict__


def test_a_forward_that_was_replaced_before_comes_back() -> None:
    """Others put their own in place as well: offloading hooks, packed weights."""
    part = torch.nn.Linear(2, 2)
    part.forward = replaced = lambda x: x
    with pinned(part, "outer"):
        with pinned(part, "inner"):
            assert part(1) == "inner"
        assert part(1) == "outer"
    assert part.forward is replaced
    with pinned(part, None), pinned(None, "anything"):
        assert part(1) == 1


def test_a_forward_that_is_looked_into_leaves_no_hook() -> None:
    """After the part's answer, and after an error."""
    interface, prompts, passes = made()
    inputs = interface.features._to_model(prompts[0].pictures)
    tower = vision_tower(interface.base)
    with torch.no_grad():
        assert output_of(tower, tower, inputs).last_hidden_state.shape[0] == 1
        with pytest.raises(ValueError, match="input_ids"):
            output_of(tower, interface.base, inputs)
    assert len(tower._forward_hooks) == 1, "the one that counts"
    assert sum(passes) == 1


def test_weights_that_change_need_a_clear() -> None:
    """Features are found by the pictures' content alone."""
    interface, prompts, passes = made()
    before = features(interface.features, prompts[:1])[0]
    with torch.no_grad():
        for weight in interface.base.model.multi_modal_projector.parameters():
            weight.mul_(2)
    assert torch.equal(features(interface.features, prompts[:1])[0], before)
    interface.features.clear()
    assert not torch.allclose(features(interface.features, prompts[:1])[0], before)
    assert sum(passes) == 2 == interface.features.misses


def test_a_way_that_is_given_up_leaves_nothing() -> None:
    interface, prompts, _ = made()
    store = interface.features
    features(store, prompts)
    store.give_up_way()
    assert (store.way, store._bytes, len(store._known)) == ("tower", 0, 0)
    store.give_up_way()
    store.give_up_way()
    assert store.way == "off", "pixels are always left"
    assert torch.equal(store.inputs(prompts).inputs["pixel_values"], stack_pictures(prompts)["pixel_values"])


def shaped(*sizes: int) -> list[Prompt]:
    """A picture of each width."""
    return [Prompt(torch.tensor([5]), {"pixel_values": torch.full((1, 3, 4, size), float(size))}) for size in sizes]


def test_pictures_of_other_shapes_go_through_the_tower_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of one shape, at most so many pictures and pixels at once; padding would change what a tower sees."""
    cut = [
        [p.pictures["pixel_values"].shape[-1] for p in batch] for batch in _equal_batches(shaped(4, 4, 6, 4, 4, 4), 16)
    ]
    assert cut == [[4, 4], [6], [4, 4, 4]]
    assert [len(batch) for batch in _equal_batches(shaped(4, 4, 4), 2)] == [2, 1]
    monkeypatch.setattr(encode_once, "_BATCH_ELEMENTS", 3 * 4 * 4)
    assert [len(batch) for batch in _equal_batches(shaped(4, 4, 8), 16)] == [1, 1, 1]


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


def test_pictures_padded_to_one_shape_go_through_the_tower_apart() -> None:
    """Two pictures in a prompt, one of them padded: what is real gives no even share of a batch's output."""
    one, same, other = (
        Prompt(torch.tensor([5]), {"pixel_values": torch.full((2, 4), float(seed)), "image_sizes": torch.tensor(sizes)})
        for seed, sizes in ((1, [[4, 4], [4, 2]]), (2, [[4, 4], [4, 2]]), (3, [[4, 4], [2, 2]]))
    )
    assert [len(batch) for batch in _equal_batches([one, same, other], 16)] == [2, 1]


def layered(rows: int, layers: int) -> BaseModelOutputWithPooling:
    """A tower's output whose numbers tell the row. Of the layers only the last was asked for."""
    row = torch.arange(float(rows))[:, None]
    states = (*(None for _ in range(layers - 1)), 10 + row)
    return BaseModelOutputWithPooling(last_hidden_state=row, hidden_states=states, pooler_output=list(20 + row))


@pytest.mark.parametrize(("rows", "layers"), [(2, 2), (2, 4), (4, 2), (3, 3)])
def test_layers_are_not_taken_for_rows(rows: int, layers: int) -> None:
    """A tuple of as many layers as there are pictures, or of a multiple of them."""
    parts = split_output(layered(rows, layers), rows)
    assert parts is not None
    for i, part in enumerate(parts):
        assert part.last_hidden_state.tolist() == [[i]]
        assert part.hidden_states[:-1] == (None,) * (layers - 1) and part.hidden_states[-1].tolist() == [[10 + i]]
        assert [picture.tolist() for picture in part.pooler_output] == [[20 + i]]
    back = merge_outputs([parts[-1], parts[0]])
    assert back.last_hidden_state.tolist() == [[rows - 1], [0]]
    assert back.hidden_states[-1].tolist() == [[9 + rows], [10]] and back.hidden_states[0] is None
    assert [picture.tolist() for picture in back.pooler_output] == [[19 + rows], [20]]


def test_what_does_not_divide_plainly_is_encoded_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    uneven = BaseModelOutputWithPooling(last_hidden_state=torch.zeros(3, 1))
    assert split_output(uneven, 2) is None
    assert split_output(torch.zeros(4, 1), 2) is None
    assert split_output(BaseModelOutputWithPooling(hidden_states=(torch.zeros(3, 1),)), 2) is None
    interface, prompts, passes = made(trains=False)
    together = features(interface.features, prompts)
    interface.features.clear()
    monkeypatch.setattr(encode_once, "split_output", lambda *_: None)
    apart = features(interface.features, prompts)
    assert passes == [4, 4, 1, 1, 1, 1]
    torch.testing.assert_close(together, apart)


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
