"""Frozen towers: which part of a checkpoint is taken, and that features are those of a plain forward pass."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_towers
import torch
from PIL import Image
from transformers import (
    ConvNextConfig,
    ConvNextModel,
    LlavaModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5Model,
    ViTConfig,
    ViTModel,
)

from mmft.data.scenes import EmojiScenes
from mmft.models.features import FeatureStore
from mmft.models.prompts import PromptBuilder
from mmft.models.towers import (
    GroundedTextTower,
    TextTower,
    Tokens,
    VisionTower,
    find_vision_tower,
    load_tower,
    pool_patches,
)
from mmft.types import Row, UserError

CAPTIONS = ["a dog", "two owls and a big cat on a green background", "a", "", "some corn next to a dog , with an owl"]
LOGPROB_SCALE = 0.25


def scenes(count: int) -> list[Row]:
    """Pictures, asked in prompts of two lengths."""
    asked = [tiny_towers.PROMPT, "what is in the picture ?"]
    return [Row(row.id, row.image, asked[i % 2]) for i, row in enumerate(EmojiScenes(count))]


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def rows_of(tokens: Tokens) -> list[torch.Tensor]:
    """Each row's features without its padding."""
    return [features[mask] for features, mask in zip(tokens.features_BND, tokens.mask_BN, strict=True)]


class TestFinding:
    @pytest.mark.parametrize(
        ("build", "expected"),
        [
            (tiny_towers.llava, "SiglipVisionModel"),
            (lambda: tiny_towers.llava().model, "SiglipVisionModel"),
            (tiny_towers.clip, "CLIPVisionModel"),
            (tiny_towers.siglip, "SiglipVisionModel"),
        ],
    )
    def test_the_vision_side_of_a_model_of_both(self, build: Any, expected: str) -> None:
        tower = find_vision_tower(build())
        assert type(tower).__name__ == expected
        assert tower.config.hidden_size in (16, 24)

    def test_a_model_of_pictures_alone_is_its_own_tower(self) -> None:
        sides = {**tiny_towers.sides(8), "image_size": 16, "patch_size": 8}
        for model in (ViTModel(ViTConfig(**sides)), SiglipVisionModel(SiglipVisionConfig(**sides))):
            assert find_vision_tower(model) is model

    def test_no_vision_tower_is_one_clear_line(self) -> None:
        with pytest.raises(UserError, match="^reward model: BertModel has no vision tower$"):
            find_vision_tower(tiny_towers.bert())

    def test_a_tower_that_gives_no_sequence_is_refused(self) -> None:
        net = ConvNextModel(ConvNextConfig(hidden_sizes=[4, 4, 4, 4], depths=[1, 1, 1, 1]))
        with pytest.raises(UserError, match="ConvNextModel gives no sequence of features"):
            VisionTower(net, tiny_towers.image_processor())

    @pytest.mark.parametrize("grounded", [False, True])
    def test_a_checkpoint_that_is_none(self, grounded: bool, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="the tower '.*' cannot be loaded: ") as caught:
            load_tower(str(tmp_path), grounded, torch.float32)
        assert "\n" not in str(caught.value)

    def test_a_damaged_checkpoint(self, tmp_path: Path) -> None:
        path = tiny_towers.saved(tiny_towers.bert(), tiny_towers.word_tokenizer(sentence=True), tmp_path)
        (tmp_path / "model.safetensors").write_bytes(b"not weights")
        with pytest.raises(UserError, match="cannot be loaded: "):
            load_tower(path, False, torch.float32)

    def test_a_sentence_encoder_cannot_be_grounded(self, tmp_path: Path) -> None:
        path = tiny_towers.saved(tiny_towers.bert(), tiny_towers.word_tokenizer(sentence=True), tmp_path)
        with pytest.raises(UserError, match="cannot be loaded: "):
            load_tower(path, True, torch.float32)

    def test_towers_are_frozen_and_evaluate(self, tmp_path: Path) -> None:
        path = tiny_towers.saved(tiny_towers.bert(), tiny_towers.word_tokenizer(sentence=True), tmp_path)
        tower = load_tower(path, False, torch.bfloat16)
        assert not tower.training and not any(p.requires_grad for p in tower.parameters())
        assert {p.dtype for p in tower.parameters()} == {torch.bfloat16}


class TestPooling:
    def test_a_grid_is_averaged_over_squares(self) -> None:
        """Patches 0..15 in reading order; the upper left square holds 0, 1, 4, 5: mean 2.5."""
        patches = torch.arange(16.0).view(1, 16, 1)
        assert pool_patches(patches, 4).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]

    def test_feature_by_feature(self) -> None:
        patches = torch.stack([torch.arange(16.0), -10 * torch.arange(16.0)], -1)[None]
        assert pool_patches(patches, 4)[0].tolist() == [[2.5, -25], [4.5, -45], [10.5, -105], [12.5, -125]]
        assert pool_patches(patches, 1)[0].tolist() == [[7.5, -75]]

    @pytest.mark.parametrize(
        ("count", "most", "expected"),
        [
            (4, 4, [0, 1, 2, 3]),  # few enough
            (3, 16, [0, 1, 2]),
            (5, 2, [1, 3]),  # a class token and 4 patches: runs 0..2 and 2..4, which share the middle one
            (6, 3, [0.5, 2.5, 4.5]),
            (9, 4, [2, 3, 5, 6]),  # 3 x 3 into 2 x 2: squares that share the middle, (0 + 1 + 3 + 4) / 4 = 2 and so on
            (16, 5, [2.5, 4.5, 10.5, 12.5]),  # 2 x 2 squares are the most that fit
        ],
    )
    def test_other_counts(self, count: int, most: int, expected: list[float]) -> None:
        pooled = pool_patches(torch.arange(float(count)).view(1, count, 1), most)
        assert pooled.flatten().tolist() == expected

    def test_the_type_stays(self) -> None:
        assert pool_patches(torch.ones(2, 16, 3, dtype=torch.bfloat16), 4).dtype == torch.bfloat16


class TestVision:
    @pytest.mark.parametrize("build", [tiny_towers.llava, tiny_towers.clip, tiny_towers.siglip])
    def test_features_are_the_last_hidden_states(self, build: Any) -> None:
        model, pictures = build(), [row.image for row in scenes(3)]
        tower = VisionTower(model, tiny_towers.image_processor(), 64)
        found = tower(pictures)
        for i, picture in enumerate(pictures):
            pixels = tiny_towers.image_processor()([picture], return_tensors="pt")["pixel_values"]
            with torch.no_grad():
                close(found.features_BND[i], find_vision_tower(model)(pixel_values=pixels).last_hidden_state[0])
        assert found.mask_BN.all() and found.features_BND.shape[2] == tower.dim

    def test_rows_without_a_picture_keep_no_token(self) -> None:
        tower = VisionTower(tiny_towers.llava(), tiny_towers.image_processor(), 4)
        first, second = (row.image for row in scenes(2))
        found = tower([None, first, None, None, second], batch=2)
        assert found.mask_BN.tolist() == [[False] * 4, [True] * 4, [False] * 4, [False] * 4, [True] * 4]
        alone = tower([first, second])
        close(found.features_BND[[1, 4]], alone.features_BND)
        assert tower([None, None]).mask_BN.tolist() == [[False], [False]]

    def test_any_size_and_mode_of_picture(self) -> None:
        tower = VisionTower(tiny_towers.llava(), tiny_towers.image_processor(), 4)
        found = tower([Image.new("RGB", (7, 50), "red"), Image.new("RGB", (32, 32), "red")])
        close(found.features_BND[0], found.features_BND[1])


class TestText:
    @pytest.mark.parametrize("build", [tiny_towers.bert, tiny_towers.clip, lambda: tiny_towers.llava().model])
    def test_each_caption_as_if_it_were_alone(self, build: Any) -> None:
        model = build()
        tokenizer = tiny_towers.word_tokenizer(sentence=not isinstance(model, LlavaModel))
        tower = TextTower(model, tokenizer, 96)
        assert type(tower.model).__name__ in ("BertModel", "CLIPTextModel", "LlamaModel")
        found = rows_of(tower(CAPTIONS, scenes(len(CAPTIONS)), batch=2))
        for caption, features in zip(CAPTIONS, found, strict=True):
            ids = torch.tensor([tokenizer(caption)["input_ids"]])
            if not ids.numel():  # nothing is said, and this tokenizer adds nothing
                assert features.shape == (0, tower.dim)
                continue
            with torch.no_grad():
                close(features, tower.model(input_ids=ids.long()).last_hidden_state[0])

    def test_nothing_but_empty_captions(self) -> None:
        """What an untrained policy may well say; no token is kept."""
        tower = TextTower(tiny_towers.llava().model, tiny_towers.word_tokenizer(), 96)
        found = tower(["", " ", ""], scenes(3))
        assert not found.mask_BN.any() and found.features_BND.shape[::2] == (3, tower.dim)

    def test_no_more_words_than_the_model_has_positions(self) -> None:
        tower = TextTower(tiny_towers.clip(), tiny_towers.word_tokenizer(sentence=True), 96)
        assert tower(["dog " * 200], scenes(1)).mask_BN.sum() == 32

    def test_a_model_without_a_padding_token(self) -> None:
        tokenizer = tiny_towers.word_tokenizer()
        tokenizer.pad_token = None
        assert TextTower(tiny_towers.llava().model, tokenizer, 96).tokenizer.pad_token == "<eos>"

    def test_the_encoder_of_an_encoder_and_decoder(self) -> None:
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
        model = T5Model(T5Config(**sizes, vocab_size=len(tiny_towers.words()), pad_token_id=0)).eval()
        tower = TextTower(model, tiny_towers.word_tokenizer(sentence=True), 96)
        found = tower(["a dog"], scenes(1))
        assert found.features_BND.shape == (1, 4, 16)


def by_hand(model: Any, processor: Any, row: Row, caption: str) -> torch.Tensor:
    """One row alone, picture, prompt, caption and EOS in one pass without a cache; token by token."""
    prompt = PromptBuilder(processor)(row)
    said = processor.tokenizer(caption, add_special_tokens=False)["input_ids"] + [processor.tokenizer.eos_token_id]
    ids = torch.tensor([[*prompt.input_ids.tolist(), *said]])
    with torch.no_grad():
        output = model(input_ids=ids, **prompt.pictures, output_hidden_states=True, use_cache=False)
    hidden, logits = output.hidden_states[-1][0], output.logits[0].double()
    features = []
    for t in range(len(prompt), ids.shape[1]):
        chances = logits[t - 1].softmax(-1)  # what stands at t was foreseen at t - 1
        likely, best = chances[ids[0, t]].log(), chances.max().log()
        evidence = LOGPROB_SCALE * torch.stack([likely, likely - best]).float()
        features.append(torch.cat([hidden[t - 1], hidden[t], evidence]))
    return torch.stack(features)


class TestGrounded:
    @pytest.fixture(scope="class")
    def parts(self) -> tuple[Any, Any]:
        return tiny_towers.llava(), tiny_towers.processor()

    def test_features_are_those_of_a_plain_pass(self, parts: tuple[Any, Any]) -> None:
        """Several captions a picture, of several lengths, in any order, about pictures with several prompts."""
        tower = GroundedTextTower(*parts, 96)
        judged = [(row, caption) for row in scenes(4) for caption in CAPTIONS]
        judged.append((Row("other", judged[0][0].image, "what ?"), "a dog"))  # the same picture, asked otherwise
        random.Random(0).shuffle(judged)
        found = rows_of(tower([caption for _, caption in judged], [row for row, _ in judged], batch=3))
        for (row, caption), features in zip(judged, found, strict=True):
            expected = by_hand(*parts, row, caption)
            assert features.shape == expected.shape == (len(caption.split()) + 1, tower.dim)
            close(features, expected)

    def test_the_bundled_model(self) -> None:
        model, processor = tiny.llava(), tiny.processor()
        tower = GroundedTextTower(model, processor, 96)
        judged = [(row, caption) for row in tiny.rows(3) for caption in ("a dog", "two owls on a green background")]
        found = rows_of(tower([caption for _, caption in judged], [row for row, _ in judged]))
        for (row, caption), features in zip(judged, found, strict=True):
            close(features, by_hand(model, processor, row, caption))

    def test_rows_without_a_picture(self, parts: tuple[Any, Any]) -> None:
        """Beside rows with one, whose prompt has as many tokens."""
        seen = scenes(1)[0]
        long = Row("long", None, " ".join(["what"] * len(PromptBuilder(parts[1])(seen))))
        rows = [Row("blind", None, tiny_towers.PROMPT), seen, long]
        found = rows_of(GroundedTextTower(*parts, 96)(["a dog", "an owl", "a cat"], rows))
        for row, caption, features in zip(rows, ["a dog", "an owl", "a cat"], found, strict=True):
            close(features, by_hand(*parts, row, caption))

    def test_the_last_token_is_the_end(self, parts: tuple[Any, Any]) -> None:
        """A caption that goes on has the same tokens up to there, but not the same end."""
        row = scenes(1)[0]
        tower = GroundedTextTower(*parts, 96)
        short, long = rows_of(tower(["a dog", "a dog and an owl"], [row, row]))
        close(short[:2], long[:2])
        close(short[2, :32], long[2, :32])  # foreseen in the same state
        assert (short[2, 32:] - long[2, 32:]).abs().max() > 0.01
        assert (long[:, -2:] < 0).any() and (long[:, -2:] <= 0).all()

    def test_the_picture_and_the_prompt_count(self, parts: tuple[Any, Any]) -> None:
        first, second = scenes(3)[::2]
        rows = [first, second, Row("", first.image, "what ?"), Row("", None, first.prompt)]
        found = rows_of(GroundedTextTower(*parts, 96)(["a dog"] * 4, rows))
        for other in found[1:]:
            assert (found[0] - other).abs().max() > 0.01

    def test_long_captions_are_cut_and_ended(self, parts: tuple[Any, Any]) -> None:
        row = scenes(1)[0]
        (found,) = rows_of(GroundedTextTower(*parts, 4)(["a dog and an owl"], [row]))
        close(found, by_hand(*parts, row, "a dog and"))

    def test_each_picture_is_read_once(self, parts: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        """4 pictures of 5 captions, 2 pictures a pass: 2 passes over pictures, 2 over captions."""
        model, processor = parts
        seen: list[int] = []
        original = model.forward

        def forward(*args: Any, **options: Any) -> Any:
            seen.append(len(options["pixel_values"]) if "pixel_values" in options else 0)
            return original(*args, **options)

        monkeypatch.setattr(model, "forward", forward)
        tower = GroundedTextTower(model, processor, 96)
        tower.cache_name = "past_key_values"  # `forward` hides its argument
        rows = [Row(row.id, row.image, tiny_towers.PROMPT) for row in scenes(4)]
        tower(CAPTIONS * 4, [row for row in rows for _ in CAPTIONS], batch=2)
        assert seen == [2, 0, 2, 0]


def test_tokens_are_cut_to_the_longest_kept() -> None:
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]]).bool()
    tokens = Tokens(torch.arange(9.0).view(3, 3, 1), mask)
    assert tokens[torch.tensor([1, 2])].features_BND.flatten().tolist() == [3.0, 6.0]
    assert tokens[torch.tensor([2])].mask_BN.tolist() == [[False]]
    joined = Tokens.cat([tokens[torch.tensor([1])], tokens])
    assert joined.mask_BN.int().tolist() == [[1, 0, 0], [1, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert joined.features_BND[0].flatten().tolist() == [3.0, 0.0, 0.0]


class Counted:
    """An encoder that counts what it is given; a picture's feature is its level, a word's its length."""

    def __init__(self) -> None:
        self.captions: list[str] = []

    def __call__(self, captions: list[str], rows: list[Row]) -> tuple[Tokens, Tokens]:
        self.captions += captions
        image = torch.tensor([[[float(row.image.getpixel((0, 0)))]] for row in rows])
        width = max(len(caption.split()) for caption in captions)
        lengths = [[float(len(w)) for w in c.split()] + [99.0] * (width - len(c.split())) for c in captions]
        text = torch.tensor(lengths)[..., None]
        return Tokens(image, torch.ones(len(rows), 1).bool()), Tokens(text, text[..., 0] != 99.0)


def level(value: int, prompt: str = "p") -> Row:
    return Row(str(value), Image.new("L", (2, 2), value), prompt)


class TestFeatureStore:
    def test_each_caption_is_encoded_once(self) -> None:
        encode = Counted()
        store = FeatureStore(encode)
        store.add([("one", level(1), ["a dog", "an owl", "a dog"]), ("two", level(2), ["a dog"])])
        store.add([("one", level(1), ["an owl", "a big cat"]), ("two", level(2), ["a dog"])])
        store.add([("one", level(1, "q"), ["a dog"])])  # another prompt is another input
        assert encode.captions == ["a dog", "an owl", "a dog", "a big cat", "a dog"]
        assert len(store) == 5 and len(store.pictures) == 2

    def test_batches_in_any_order_padded_to_their_own_longest(self) -> None:
        store = FeatureStore(Counted())
        store.add([("one", level(1), ["a dog", "x"]), ("two", level(2), ["a big cat"])])
        store.add([("two", level(2), ["two owls"])])
        image, text = store.batch(torch.tensor([1, 3, 0]))
        assert image.features_BND.flatten().tolist() == [1.0, 2.0, 1.0]
        assert text.mask_BN.int().tolist() == [[1, 0], [1, 1], [1, 1]]
        assert text.features_BND[..., 0].tolist() == [[1.0, 0.0], [3.0, 4.0], [1.0, 3.0]]
        _, text = store.batch(torch.tensor([2]))
        assert text.features_BND.flatten().tolist() == [1.0, 3.0, 3.0]

    def test_one_caption_for_each_picture(self) -> None:
        store = FeatureStore(Counted())
        store.add([("one", level(1), ["a", "b"]), ("two", level(2), ["c"]), ("three", level(3), ["d", "e"])])
        assert store.one_per_picture(torch.tensor([4, 1, 0, 3, 1])).tolist() == [1, 4]

    def test_the_same_as_encoding_at_once(self, tmp_path: Path) -> None:
        path = tiny_towers.saved(tiny_towers.llava(), tiny_towers.processor(), tmp_path)
        model = tiny_towers.reward_model(path, "sum", "mse")
        rows, store = scenes(3), FeatureStore(model.encode)
        store.add((row.id, row, CAPTIONS) for row in rows)
        judged = [(row, caption) for row in rows for caption in CAPTIONS][::-1]
        index = torch.tensor([store.index[row.id, row.prompt, caption] for row, caption in judged])
        stored = store.batch(index)
        direct = model.encode([caption for _, caption in judged], [row for row, _ in judged])
        for mine, theirs in zip(stored, direct, strict=True):
            for one, other in zip(rows_of(mine), rows_of(theirs), strict=True):
                close(one, other)

    def test_captions_without_a_token(self, tmp_path: Path) -> None:
        """A language model's side, and nothing said at all."""
        path = tiny_towers.saved(tiny_towers.llava(), tiny_towers.processor(), tmp_path)
        model = tiny_towers.reward_model(path, "cross_attention", "mse", grounded=False)
        store, row = FeatureStore(model.encode), scenes(1)[0]
        store.add([("one", row, ["", "a dog"])])
        assert store.batch(torch.tensor([0]))[1].mask_BN.shape == (1, 0)
        assert store.batch(torch.tensor([0, 1]))[1].mask_BN.sum(1).tolist() == [0, 2]
        assert torch.isfinite(model.predict_features(*store.batch(torch.tensor([0]))).mean_B).all()
        alone = model.predict(["", ""], [row, row])
        together = model.predict(["", "a dog"], [row, row])
        assert alone.mean_B[0].item() == pytest.approx(together.mean_B[0].item(), abs=1e-5)
