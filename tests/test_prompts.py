"""Prompts: what a processor gives, sorted into ids, per-token inputs and pictures, and rows put together from them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from PIL import Image

from mmft.models.prompts import (
    Prompt,
    PromptBuilder,
    cat_padded,
    counted,
    pad_prompts,
    pad_sequences,
    stack_pictures,
    stack_token_inputs,
)
from mmft.types import Row, UserError

PICTURE, OTHER = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")


def prompt(*ids: int, **token_inputs: Any) -> Prompt:
    return Prompt(torch.tensor(ids), {}, {name: torch.tensor(value) for name, value in token_inputs.items()})


class Processor:
    """Words of single letters, "i" for a picture. `gives` is returned beside the ids; `writes` placeholders where a
    text has none; `nested` pictures are asked for; at most `most` of them.
    """

    chat_template = None
    image_token = "i"

    def __init__(self, writes: bool = False, nested: bool = False, most: int = 9, **gives: Any):
        self.tokenizer = tiny.tokenizer()
        self.writes, self.nested, self.most, self.gives = writes, nested, most, gives
        self.seen: list[str] = []

    def __call__(self, text: list[str], images: list[Any], **options: Any) -> dict[str, Any]:
        if isinstance(images[0], list) != self.nested and len(images) > 1:
            raise ValueError("pictures are nested otherwise")
        pictures = images[0] if isinstance(images[0], list) else images
        if len(pictures) > self.most:
            raise ValueError(f"at most {self.most} pictures\nand a second line")
        (own,) = text
        if self.writes:  # more of them to those that are there, as BLIP-2's does
            own = "i " * len(pictures) + own
        elif own.count("i") != len(pictures):
            raise ValueError("a placeholder is wanted for each picture")
        self.seen.append(own)
        ids = self.tokenizer(" ".join(own.replace(" ", "")), return_tensors="pt")["input_ids"]
        pixels = torch.full((len(pictures), 3, 2, 2), float(len(own)))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels} | self.gives


# Who writes the placeholder


def test_a_placeholder_is_written_for_each_picture_that_the_processor_expects_one_for() -> None:
    builder = PromptBuilder(processor := Processor())
    one, two = builder(Row("1", PICTURE, "a b")), builder(Row("2", PICTURE, "a b", more_images=(OTHER,)))
    assert processor.seen[-2:] == ["ia b", "iia b"]
    assert one.picture_count == len(one.pictures["pixel_values"]) == 1
    assert two.picture_count == len(two.pictures["pixel_values"]) == 2
    assert builder(Row("3", None, "a b")).input_ids.tolist() == tiny.tokenizer()("a b")["input_ids"]


def test_none_is_written_where_the_processor_writes_its_own() -> None:
    builder = PromptBuilder(processor := Processor(writes=True))
    builder(Row("1", PICTURE, "a b"))
    builder(Row("2", PICTURE, "c"))
    assert processor.seen[-2:] == ["i a b", "i c"]
    assert len(processor.seen) == 4, "tried out in the first row alone, without and with one"


def test_pictures_are_nested_where_a_list_of_them_is_refused() -> None:
    row = Row("1", PICTURE, "a", more_images=(OTHER,))
    for nested in (False, True):
        assert PromptBuilder(Processor(nested=nested))(row).picture_count == 2


def test_too_many_pictures_are_the_rows_fault() -> None:
    row = Row("r7", PICTURE, "a", more_images=(OTHER, OTHER))
    with pytest.raises(UserError, match=r"^row r7: the processor does not take 3 pictures in a prompt: at most 2 pic"):
        PromptBuilder(Processor(most=2))(row)
    with pytest.raises(UserError) as caught:
        PromptBuilder(Processor(most=0))(Row("r8", PICTURE, "a"))
    assert "one picture" in str(caught.value) and "\n" not in str(caught.value)
    assert counted(0) == "no picture"


@pytest.mark.parametrize("text", ["", "  "])
def test_a_prompt_of_no_token_is_refused(text: str) -> None:
    """An answer's first token is foreseen by the prompt's last."""
    with pytest.raises(UserError, match=r"row r1: the prompt '.*' has no token"):
        PromptBuilder(tiny.tokenizer())(Row("r1", None, text))


# Sorting


def test_what_the_processor_gives_is_sorted() -> None:
    """Ids and masks that are as long as the prompt belong to its tokens, unless they are of another text, or of the
    pictures; labels and what is no tensor are nobody's.
    """
    gives = {
        "token_type_ids": torch.tensor([[1, 0, 0]]),
        "cross_attention_mask": torch.ones(1, 3, 1, 2),
        "qformer_input_ids": torch.tensor([[7, 8, 9]]),
        "qformer_attention_mask": torch.ones(1, 3, dtype=torch.long),
        "pixel_mask": torch.ones(1, 3, 5, dtype=torch.long),  # as high as the prompt is long
        "aspect_ratio_ids": torch.tensor([[1]]),
        "image_sizes": torch.tensor([[4, 4]]),
        "labels": torch.tensor([[1, 2, 3]]),
        "num_crops": [1],
    }
    found = PromptBuilder(Processor(**gives))(Row("1", PICTURE, "a b"))
    assert len(found) == 3
    assert found.token_inputs.keys() == {"token_type_ids", "cross_attention_mask"}
    assert found.token_inputs["token_type_ids"].tolist() == [1, 0, 0]
    assert found.token_inputs["cross_attention_mask"].shape == (3, 1, 2)
    others = {"qformer_input_ids", "qformer_attention_mask", "pixel_mask", "aspect_ratio_ids", "image_sizes"}
    assert found.pictures.keys() == {"pixel_values", *others}
    assert found.pictures["pixel_mask"].shape == (1, 3, 5), "as for a batch of one"


def test_an_encoder_of_pictures_alone_leaves_no_ids() -> None:
    processor = SimpleNamespace(tokenizer=tiny.tokenizer(), chat_template=None)
    builder = PromptBuilder(processor)
    gives = {
        "flattened_patches": torch.ones(1, 2, 3),
        "attention_mask": torch.ones(1, 2),
        "decoder_input_ids": torch.ones(1, 1),
    }
    found = builder._prompt(gives, 1)
    assert len(found) == 0 and found.pictures.keys() == {"flattened_patches", "attention_mask"}


# Content


def test_equal_content_is_one_key() -> None:
    pixels = torch.arange(4.0).view(1, 4)
    one = Prompt(torch.tensor([5, 6]), {"pixel_values": pixels, "image_sizes": torch.tensor([[2, 2]])})
    again = Prompt(torch.tensor([5, 6]), {"image_sizes": torch.tensor([[2, 2]]), "pixel_values": pixels.clone()})
    assert one.key == again.key and one.picture_key == again.picture_key, "whatever the order of names"
    others = [
        Prompt(torch.tensor([5, 7]), one.pictures),
        Prompt(torch.tensor([5, 6])),
        Prompt(torch.tensor([5, 6]), {**one.pictures, "pixel_values": pixels.flip(1)}),
        Prompt(torch.tensor([5, 6]), {**one.pictures, "pixel_values": pixels.view(4, 1)}),
        Prompt(torch.tensor([5, 6]), {**one.pictures, "pixel_values": pixels.half()}),
        Prompt(torch.tensor([5, 6]), {"pixel_values": pixels, "image_grid": torch.tensor([[2, 2]])}),
        Prompt(torch.tensor([5, 6]), one.pictures, {"token_type_ids": torch.tensor([0, 1])}),
    ]
    assert len({one.key, *(other.key for other in others)}) == 1 + len(others)
    assert others[0].picture_key == others[-1].picture_key == one.picture_key, "the same picture, asked otherwise"
    assert len({one.picture_key, *(other.picture_key for other in others[1:-1])}) == 6


def test_keys_of_no_picture_and_of_odd_tensors() -> None:
    assert prompt(5).picture_key == b"" != prompt(5).key
    flags = Prompt(torch.tensor([5]), {"seen": torch.tensor([True, False]), "bf16": torch.ones(2, 2).bfloat16().T})
    assert len(flags.picture_key) == 16


# Rows together


def test_padding_on_either_side() -> None:
    sequences = [torch.tensor([5, 6, 7]), torch.tensor([8])]
    left, right = pad_sequences(sequences, 0, "left"), pad_sequences(sequences, 0, "right")
    assert left["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]
    assert left["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert right["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert right["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert pad_sequences([torch.tensor([0]), torch.tensor([8, 0])], 0, "left")["attention_mask"].tolist() == [
        [0, 1],
        [1, 1],
    ], "a padding token of the text's own is kept"


def test_token_inputs_lie_where_the_tokens_lie() -> None:
    """0 at padding and in rows without; a row's smaller inner shape in the corner of the largest."""
    rows = [prompt(5, 6, types=[1, 2]), prompt(7), prompt(8, types=[3], boxes=[[4]]), prompt(9, 9, boxes=[[5, 6]] * 2)]
    left, right = (stack_token_inputs(rows, 3, side) for side in ("left", "right"))
    assert left["types"].tolist() == [[0, 1, 2], [0, 0, 0], [0, 0, 3], [0, 0, 0]]
    assert right["types"].tolist() == [[1, 2, 0], [0, 0, 0], [3, 0, 0], [0, 0, 0]]
    assert left["boxes"][2].tolist() == [[0, 0], [0, 0], [4, 0]]
    assert right["boxes"][3].tolist() == [[5, 6], [5, 6], [0, 0]]
    assert left["types"].dtype == torch.int64
    assert stack_token_inputs([prompt(5), prompt(6)], 1, "left") == {}


def test_prompts_alone_as_a_batch() -> None:
    pixels = [torch.full((n, 1, 2), float(n)) for n in (1, 2)]
    rows = [
        Prompt(torch.tensor([5, 6]), {"pixel_values": pixels[1]}, {"types": torch.tensor([1, 2])}),
        prompt(7),
        Prompt(torch.tensor([8]), {"pixel_values": pixels[0]}, {"types": torch.tensor([3])}),
    ]
    inputs = pad_prompts(rows, 0, "left")
    assert inputs["input_ids"].tolist() == [[5, 6], [0, 7], [0, 8]]
    assert inputs["types"].tolist() == [[1, 2], [0, 0], [0, 3]]
    assert inputs["pixel_values"][:, 0, 0].tolist() == [2, 2, 1]


def test_pictures_of_other_sizes_are_filled_up() -> None:
    """Rows (1, 2 tiles, 2 x 1) and (2, 1 tile, 1 x 2) -> (3, 2 tiles, 2 x 2), zeros behind and below."""
    small, large = torch.full((1, 2, 2, 1), 1.0), torch.full((2, 1, 1, 2), 2.0)
    out = cat_padded([small, large])
    assert out.shape == (3, 2, 2, 2)
    assert out[0].tolist() == [[[1, 0], [1, 0]], [[1, 0], [1, 0]]]
    assert out[1].tolist() == out[2].tolist() == [[[2, 2], [0, 0]], [[0, 0], [0, 0]]]
    assert torch.equal(cat_padded([small, small]), torch.ones(2, 2, 2, 1))


def test_rows_that_lack_an_input_add_nothing_to_it() -> None:
    first = {"pixel_values": torch.ones(1, 1), "image_sizes": torch.tensor([[4, 4]])}
    stacked = stack_pictures(
        [Prompt(torch.tensor([1]), first), prompt(2), Prompt(torch.tensor([3]), {"pixel_values": torch.zeros(2, 1)})]
    )
    assert stacked["pixel_values"].flatten().tolist() == [1, 0, 0]
    assert stacked["image_sizes"].tolist() == [[4, 4]]
    assert stack_pictures([prompt(1), prompt(2)]) == {}
