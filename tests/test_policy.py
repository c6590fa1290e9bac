"""The policy as the trainer and evaluation read it: rows, padding, adapters, placeholders, targets, loading, saving."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GPT2Config,
    VisionEncoderDecoderConfig,
    ViTConfig,
    ViTImageProcessorPil,
)

from mmft.config import LoraConfig, ModelConfig
from mmft.models.adapter_io import save_adapter
from mmft.models.critic import ValueHead
from mmft.models.decoding import Sampling, sample_responses
from mmft.models.generation import caption
from mmft.models.interface import Interface
from mmft.models.packing import pack_apart, response_rows
from mmft.models.policy import (
    Policy,
    eos_ids,
    language_model,
    load_adapter,
    load_policy,
    load_pretrained,
    lora_targets,
    picture_token_ids,
)
from mmft.models.processors import ProcessorPair, load_processor
from mmft.models.prompts import (
    Prompt,
    PromptBuilder,
    pad_prompts,
    prompts_of,
    special_tokens,
    stack_pictures,
    without_special,
)
from mmft.models.scoring import PolicyWithCritic, TokenScores
from mmft.train import rollout as rollouts
from mmft.types import Row, UserError

B, T = 6, 7
PAD = 0


def scorer(model: Any, banned: tuple[int, ...] = ()) -> PolicyWithCritic:
    """The model with a critic that is not zero."""
    return PolicyWithCritic(model, tiny.stirred(ValueHead(32), 0.3), banned, 0.8)


def responses() -> tuple[torch.Tensor, torch.Tensor]:
    """Random answers of 1 to T tokens."""
    generator = torch.Generator().manual_seed(4)
    lengths = torch.tensor([7, 1, 3, 6, 2, 5])
    mask = torch.arange(T)[None, :] < lengths[:, None]
    return torch.randint(4, 900, (B, T), generator=generator).masked_fill(~mask, PAD), mask


def prompts() -> list[Prompt]:
    builder = PromptBuilder(tiny.processor())
    return [builder(row) for row in tiny.rows(B)]


def score(model: Any, asked: list[Prompt], batches: list[list[int]]) -> TokenScores:
    tokens, mask = responses()
    interface = Interface(model, tiny.processor())
    return rollouts.score(scorer(model), interface, asked, tokens, mask, [torch.tensor(b) for b in batches])


def scored(model: Any, batches: list[list[int]]) -> TokenScores:
    return score(model, prompts(), batches)


def assert_close(a: TokenScores, b: TokenScores, tolerance: float) -> None:
    _, mask = responses()
    for name in ("logprobs_BT", "value_BT"):
        torch.testing.assert_close(getattr(a, name)[mask], getattr(b, name)[mask], atol=tolerance, rtol=0)


def test_pictures_follow_their_rows() -> None:
    """In any order and company a row's numbers are those it has alone; and the picture matters to them."""
    model = tiny.llava()
    alone = scored(model, [[i] for i in range(B)])
    assert_close(scored(model, [list(range(B))]), alone, 1e-5)
    assert_close(scored(model, [[3, 0, 5], [4, 1, 2]]), alone, 1e-5)
    swapped = prompts()
    swapped[0] = Prompt(swapped[0].input_ids, swapped[1].pictures)
    other = score(model, swapped, [list(range(B))])
    assert (other.logprobs_BT - alone.logprobs_BT)[0].abs().max() > 1e-2
    assert (other.logprobs_BT - alone.logprobs_BT)[1:].abs().max() < 1e-5


def test_rows_with_and_without_pictures_mix() -> None:
    model = tiny.llava()
    mixed = prompts()
    words = tiny.processor().tokenizer
    mixed[1] = Prompt(words("Describe.", return_tensors="pt")["input_ids"][0])
    assert_close(score(model, mixed, [list(range(B))]), score(model, mixed, [[i] for i in range(B)]), 1e-5)


def test_left_and_right_padding_agree() -> None:
    """The scores against a plain left-padded forward pass with position ids, written out here."""
    model = tiny.llava()
    ours = scored(model, [list(range(B))])
    tokens, mask = responses()
    whole = [
        Prompt(torch.cat([p.input_ids, r[m]]), p.pictures) for p, r, m in zip(prompts(), tokens, mask, strict=True)
    ]
    inputs = pad_prompts(whole, PAD, "left")
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logprobs = (model(**inputs, position_ids=positions).logits / 0.8).log_softmax(-1)
    for i, length in enumerate(mask.sum(1).tolist()):
        answer = tokens[i, :length]
        expected = logprobs[i, -length - 1 : -1].gather(1, answer[:, None]).squeeze(1)
        torch.testing.assert_close(ours.logprobs_BT[i, :length], expected, atol=1e-4, rtol=0)


def test_positions_of_the_scores() -> None:
    """Prompt of 3 and of 1; answers of 2 and of 3 tokens, width 3. Token t is predicted one position earlier."""
    two = [Prompt(torch.tensor([5, 6, 7])), Prompt(torch.tensor([8]))]
    answers = torch.tensor([[11, 12, 0], [13, 14, 15]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    packed = pack_apart(two, response_rows(answers, mask), 3, PAD, {})
    assert packed.inputs["input_ids"].tolist() == [[5, 6, 7, 11, 12], [8, 13, 14, 15, 0]]
    assert packed.inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert packed.index_BT.tolist() == [[2, 3, 4], [0, 1, 2]]  # row 0 runs on to the state after its last token


def test_adapter_off_is_the_base_to_the_bit(tmp_path: Path) -> None:
    base = scored(tiny.llava().requires_grad_(False), [list(range(B))])  # a head that trains is computed another way
    policy = tiny.vision_policy()
    fresh = scored(policy.model, [list(range(B))])
    assert torch.equal(fresh.logprobs_BT, base.logprobs_BT), "a fresh adapter is the identity"
    tiny.trainer(policy, tmp_path, learning_rate=1e-2).train()
    trained = scored(policy.model, [list(range(B))])
    assert (trained.logprobs_BT - base.logprobs_BT).abs().max() > 1e-3
    with policy.model.disable_adapter():
        off = scored(policy.model, [list(range(B))])
    assert torch.equal(off.logprobs_BT, base.logprobs_BT)


# Placeholders


def biased(token: int) -> Policy:
    model = tiny.llava()
    with torch.no_grad():
        model.lm_head.bias[token] = 1e3
    return Policy(tiny.with_lora(model), tiny.processor())


def test_a_placeholder_is_never_sampled(tmp_path: Path) -> None:
    """Its logit is by far the highest, and still it does not come, has no probability and breaks no gradient."""
    image = tiny.processor().tokenizer.convert_tokens_to_ids("<image>")
    policy = biased(image)
    trainer = tiny.trainer(policy, tmp_path, entropy_coef=0.1)
    assert trainer.banned == [image]
    seen = []
    trainer.on_rollout = lambda step, rollout: seen.append(rollout)
    trainer.train()
    assert not (seen[0].responses_BT == image).any()
    assert torch.isfinite(seen[0].logprobs_BT).all()
    assert tiny.logs_of(trainer)[0]["policy/grad_norm"] > 0
    tokens, mask = responses()
    tokens[1, 1] = image  # beyond the row's end, so that only its score is asked for
    scores = rollouts.forward(
        trainer.model, trainer.interface, prompts(), tokens, mask, torch.arange(B), entropy_grad=True
    )
    assert scores.logprobs_BT[1, 1] == float("-inf")
    assert torch.isfinite(scores.entropy_BT).all()
    scores.entropy_BT.sum().backward()
    gradients = [p.grad for p in policy.model.parameters() if p.grad is not None]
    assert gradients and all(torch.isfinite(g).all() for g in gradients)


def test_greedy_captions_leave_the_placeholder_out_too() -> None:
    image = tiny.processor().tokenizer.convert_tokens_to_ids("<image>")
    texts, ended = caption(biased(image), tiny.rows(3), max_new_tokens=5)
    assert len(texts) == len(ended) == 3
    assert not any("<image>" in text for text in texts)
    assert all(texts), "something else was said in its place"


def test_placeholder_ids_are_found_wherever_they_are_written() -> None:
    words = SimpleNamespace(
        get_vocab=lambda: {"<img>": 7}, convert_tokens_to_ids=lambda text: 7, boi_token="<img>", image_token_id=8
    )
    text = SimpleNamespace(video_token_id=3)
    config = SimpleNamespace(
        image_token_index=2, vision_start_token_id=4, image_token_ids=[5, 6], image_size=9, eos_token_id=1,
        get_text_config=lambda decoder: text,
    )  # fmt: skip
    head = SimpleNamespace(weight=torch.zeros(8, 4))
    model = SimpleNamespace(config=config, get_output_embeddings=lambda: head)
    holder = SimpleNamespace(tokenizer=words, use_image_token=True)
    assert picture_token_ids(model, holder) == [2, 3, 4, 5, 6, 7], "8 is no output, 1 and 9 are no placeholders"


def test_boundaries_count_and_rates_do_not() -> None:
    """Names that configs and processors of several families really have."""
    vocabulary = {"<boi>": 1, "<tile>": 2, "<frame>": 3, "<vis>": 4, "</br>": 5, "<img>": 6, "<row>": 7, "<pad>": 8}
    words = SimpleNamespace(
        get_vocab=lambda: vocabulary, convert_tokens_to_ids=vocabulary.__getitem__,
        special_tokens_map={"pad_token": "<pad>", "image_token": AddedToken("<img>")},
    )  # fmt: skip
    part = SimpleNamespace(visual_indicator_token_ids=[4], num_image_tokens=9)
    config = SimpleNamespace(
        frame_start_token_id=3, audio_ms_per_token=10, mm_tokens_per_image=11, image_token_embed_dim=12,
        media_placeholder_token_id=13, sub_configs={"vision_config": None}, vision_config=part, mask_token_id=14,
        get_text_config=lambda decoder: SimpleNamespace(),
    )  # fmt: skip
    model = SimpleNamespace(config=config, get_output_embeddings=lambda: SimpleNamespace(weight=torch.zeros(20, 4)))
    holder = SimpleNamespace(
        tokenizer=words, boi_token="<boi>", tile_token="<tile>", img_line_break_token=AddedToken("</br>"),
        end_of_row_token="<row>",
    )  # fmt: skip
    assert picture_token_ids(model, holder) == [1, 2, 3, 4, 5, 6, 13]


@pytest.mark.parametrize("spelled", ["<image>", "<IMAGE>", "<ima<image>ge>", "</s>", "<pad><image><image>"])
def test_a_special_token_in_a_row_s_text_stays_text(spelled: str) -> None:
    """Or a question could stand for a picture that is not there, or end the prompt."""
    builder, picture = PromptBuilder(tiny.processor()), tiny.rows(1)[0].image
    special = set(builder.tokenizer.all_special_ids) | {builder.tokenizer.convert_tokens_to_ids("<image>")}

    def specials(prompt: str) -> list[int]:
        ids = builder(Row("r1", picture, prompt)).input_ids.tolist()
        return [i for i in ids if i in special and i != builder.tokenizer.unk_token_id]

    assert specials(f"an {spelled} here") == specials("an here") != []


def test_text_without_special_tokens_is_left_as_it_is() -> None:
    special = special_tokens(tiny.tokenizer(), "<image>")
    for text in ("a < b > c", "image", "s", "", "<b>bold</b>", "\u202eright to left"):
        assert without_special(text, special) == text
    assert without_special("<image>", None) == "<image>"
    assert without_special("see <image>!", special) == "see < image>!"


# Prompts


def test_one_bos_and_one_pad() -> None:
    words = tiny.tokenizer()
    words.bos_token = "a"
    words.chat_template = "{{ bos_token }} b"
    builder = PromptBuilder(words)
    assert builder(Row("1", None, "c")).input_ids.tolist() == words("a b", add_special_tokens=False)["input_ids"]
    words.pad_token = None
    assert PromptBuilder(words).pad_id == words.eos_token_id


def test_tokenized_prompts_lose_their_padding() -> None:
    batch = {"input_ids": torch.tensor([[0, 0, 5], [6, 7, 8]]), "attention_mask": torch.tensor([[0, 0, 1], [1, 1, 1]])}
    assert [p.input_ids.tolist() for p in prompts_of(batch)] == [[5], [6, 7, 8]]


def test_pictures_are_stacked_in_the_order_of_rows() -> None:
    one, two = ({"pixel_values": torch.full((n, 1), float(n))} for n in (1, 2))
    ids = torch.tensor([1])
    stacked = stack_pictures([Prompt(ids, two), Prompt(ids), Prompt(ids, one)])
    assert stacked["pixel_values"].flatten().tolist() == [2.0, 2.0, 1.0]


# Targets


def lora_layers(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if hasattr(module, "lora_A")]


def test_language_targets_never_touch_the_tower() -> None:
    found = lora_layers(tiny.with_lora(tiny.llava()))
    assert len(found) == 2 * 7  # q k v o gate up down, two layers
    assert not any("vision" in name or "projector" in name or "lm_head" in name for name in found)
    assert any("vision" in name for name in lora_layers(tiny.with_lora(tiny.llava(), "all-linear")))


def test_listed_targets_are_confined_to_the_language_model() -> None:
    found = lora_layers(tiny.with_lora(tiny.llava(), ("q_proj",)))
    assert len(found) == 2 and all("language_model" in name for name in found)
    with pytest.raises(UserError, match="no linear layer named 'qproj'; there are down_proj, gate_proj"):
        lora_targets(tiny.llava(), ("qproj",))


def test_language_model_is_the_decoder_that_owns_the_embedding() -> None:
    model = tiny.llava()
    name, module = language_model(model)
    assert name == "model.language_model" and module is model.model.language_model
    text = tiny.text_policy()
    assert language_model(text) == ("model", text.model)


@pytest.mark.parametrize(("written", "expected"), [(5, (5,)), ([5, 6], (5, 6)), (None, (1,))])
def test_every_end_token_counts(written: Any, expected: tuple[int, ...]) -> None:
    model = tiny.text_policy()
    model.generation_config.eos_token_id = written
    assert eos_ids(model, tiny.tokenizer()) == expected


def test_generation_stops_at_any_of_several_ends() -> None:
    """All probability on one token: whether generation stops there depends on the list alone."""
    model = tiny.text_policy()
    with torch.no_grad():
        model.lm_head.bias[9] = 1e4
    prompt = [Prompt(torch.tensor([3, 4]))]
    for ends, length in (([1, 9], 1), ([1], 4)):
        sampling = Sampling(4, stops=tuple(ends))
        tokens, mask, logprobs = sample_responses(Interface(model, tiny.tokenizer()), prompt, sampling, 1)
        assert tokens.tolist() == [[9] * length] and mask.all()
        assert logprobs.abs().max() < 1e-5


# Loading and saving


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A small complete Llava folder; weights in one safetensors file."""
    folder = tmp_path / "checkpoint"
    model = tiny.llava()
    model.lm_head = nn.Linear(32, len(tiny.processor().tokenizer), bias=False)
    model.save_pretrained(folder)
    tiny.processor().save_pretrained(folder)
    return folder


def test_a_checkpoint_loads_and_a_fresh_adapter_is_the_identity(checkpoint: Path) -> None:
    bare, _ = load_pretrained(ModelConfig(path=str(checkpoint)))
    policy = load_policy(ModelConfig(path=str(checkpoint), lora=LoraConfig(r=2)))
    trainable = [name for name, p in policy.model.named_parameters() if p.requires_grad]
    assert trainable and all("lora_" in name for name in trainable)
    inputs = pad_prompts(prompts(), PAD, "left")
    with torch.no_grad():
        assert torch.equal(policy.model(**inputs).logits, bare(**inputs).logits)
    full = load_policy(ModelConfig(path=str(checkpoint), lora=None))
    assert all(p.requires_grad for p in full.model.parameters())


def change_weights(folder: Path, change: Any) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def spoil_missing(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.pop(next(n for n in tensors if "q_proj" in n and "language" in n)))


def spoil_nan(folder: Path) -> None:
    change_weights(folder, lambda tensors: next(iter(tensors.values())).fill_(float("nan")))


def spoil_torn(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def spoil_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 40
    (folder / "config.json").write_text(json.dumps(config))


def spoil_gone(folder: Path) -> None:
    shutil.rmtree(folder)


def spoil_config(folder: Path) -> None:
    (folder / "config.json").write_text("{not json")


SPOILED = {
    "missing": (spoil_missing, "lacks 1 weights, the first is"),
    "nan": (spoil_nan, "holds weights that are not finite in"),
    "torn": (spoil_torn, "cannot be loaded"),
    "shape": (spoil_shape, "cannot be loaded"),
    "gone": (spoil_gone, "no such folder"),
    "config": (spoil_config, "cannot be loaded"),
}


@pytest.mark.parametrize("fault", SPOILED)
def test_spoiled_checkpoints_are_named(fault: str, checkpoint: Path) -> None:
    spoil, message = SPOILED[fault]
    spoil(checkpoint)
    with pytest.raises(UserError, match=message) as error:
        load_policy(ModelConfig(path=str(checkpoint)))
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"model.path: {str(checkpoint)!r}")


def moved_policy(checkpoint: Path) -> Policy:
    policy = load_policy(ModelConfig(path=str(checkpoint), lora=LoraConfig(r=2)))
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return policy


def test_a_saved_adapter_reads_back_to_the_same_logits(checkpoint: Path, tmp_path: Path) -> None:
    policy = moved_policy(checkpoint)
    inputs = pad_prompts(prompts(), PAD, "left")
    folder = save_adapter(policy.model, tmp_path / "adapter", inputs)
    with torch.no_grad():
        trained = policy.model(**inputs).logits
        base = AutoModelForImageTextToText.from_pretrained(checkpoint)
        plain = PeftModel.from_pretrained(base, folder).eval()
        assert torch.equal(plain(**inputs).logits, trained)
        ours = load_adapter(ModelConfig(path=str(checkpoint)), folder)
        assert torch.equal(ours.model(**inputs).logits, trained)
    assert list(policy.model.peft_config) == ["default"], "the copy read back is gone again"
    assert any(p.requires_grad for p in policy.model.parameters())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "checkpoint"]


def test_an_altered_file_fails_the_save(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = moved_policy(checkpoint)
    inputs = pad_prompts(prompts(), PAD, "left")
    good = save_adapter(policy.model, tmp_path / "adapter", inputs)
    kept = (good / "adapter_model.safetensors").read_bytes()
    original = type(policy.model).save_pretrained

    def altered(self: Any, folder: str, **options: Any) -> None:
        original(self, folder, **options)
        file = Path(folder) / "adapter_model.safetensors"
        tensors = load_file(file)
        next(tensor for name, tensor in tensors.items() if "lora_B" in name)[0, 0] += 1e-3
        save_file(tensors, file, {"format": "pt"})

    monkeypatch.setattr(type(policy.model), "save_pretrained", altered)
    with pytest.raises(RuntimeError, match="gives other logits than the trained one"):
        save_adapter(policy.model, tmp_path / "adapter", inputs)
    assert (good / "adapter_model.safetensors").read_bytes() == kept, "what was saved before is still there"


def test_a_folder_that_cannot_be_written_is_the_users(checkpoint: Path, tmp_path: Path) -> None:
    policy = moved_policy(checkpoint)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        save_adapter(policy.model, tmp_path / "file" / "adapter", pad_prompts(prompts(), PAD, "left"))


# Loading what is incomplete


@pytest.fixture
def separate(tmp_path: Path) -> Path:
    """A tokenizer and an image processor side by side, as vision-encoder-decoder folders have them."""
    folder = tmp_path / "separate"
    VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(), GPT2Config()).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def test_tokenizer_and_image_processor_are_paired(separate: Path, tmp_path: Path) -> None:
    assert not hasattr(AutoProcessor.from_pretrained(separate), "tokenizer"), "transformers does it by now"
    pair = load_processor(str(separate))
    assert isinstance(pair, ProcessorPair)
    pictures = [row.image for row in tiny.rows(2)]
    both = pair(text=["a b", "c"], images=pictures, return_tensors="pt", padding=True, add_special_tokens=False)
    assert both["pixel_values"].shape == (2, 3, 16, 16)
    assert both["input_ids"].tolist() == [[2, 3], [PAD, 4]] and both["attention_mask"].tolist() == [[1, 1], [0, 1]]
    assert set(pair(images=pictures, return_tensors="pt")) == {"pixel_values"}
    assert set(pair(text=["a"], return_tensors="pt")) == {"input_ids", "attention_mask"}
    assert pair.batch_decode([[2, 3]]) == ["a b"] and pair.decode([2]) == "a"
    with pytest.raises(ValueError, match="text, images, or both"):
        pair()
    pair.save_pretrained(tmp_path / "copy")
    separate.joinpath("config.json").rename(tmp_path / "copy" / "config.json")
    again = load_processor(str(tmp_path / "copy"))
    assert torch.equal(again(images=pictures, return_tensors="pt")["pixel_values"], both["pixel_values"])
    assert again.tokenizer.get_vocab() == pair.tokenizer.get_vocab()


def test_a_tokenizer_alone_stays_one(tmp_path: Path) -> None:
    tiny.text_policy().config.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    assert not isinstance(load_processor(str(tmp_path)), ProcessorPair)


def test_a_processor_that_needs_torchvision_says_so(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def needs(*_: Any, **__: Any) -> None:
        raise ImportError("Qwen2VLVideoProcessor requires the Torchvision library but it was not found")

    monkeypatch.setattr(AutoProcessor, "from_pretrained", needs)
    with pytest.raises(UserError, match=r"needs torchvision: pip install 'mmft\[torchvision\]'$"):
        load_policy(ModelConfig(path=str(checkpoint)))


# In fewer bits


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_quantisation_without_its_library_says_what_to_install(
    bits: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=f"^model.quantization: {bits} needs bitsandbytes.*pip install bitsandbytes$"):
        load_policy(ModelConfig(path=str(checkpoint), quantization=bits))


@pytest.mark.parametrize(
    ("bits", "dora", "words"),
    [
        ("4bit", False, "4bit needs a GPU; on a CPU use 8bit"),
        ("8bit", True, "8bit with model.lora.use_dora needs a GPU"),
    ],
)
def test_what_a_cpu_cannot_hold_is_refused(
    bits: Any, dora: bool, words: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmft.models.policy.importlib.util.find_spec", lambda name: name)
    with pytest.raises(UserError, match=f"^model.quantization: {words}"):
        load_policy(ModelConfig(path=str(checkpoint), quantization=bits, lora=LoraConfig(use_dora=dora)))


def test_eight_bits(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    config = ModelConfig(path=str(checkpoint), quantization="8bit", lora=LoraConfig(r=2))
    policy = load_policy(config)
    inputs = pad_prompts(prompts(), PAD, "left")
    with torch.no_grad():
        fresh = policy.model(**inputs).logits
        full = load_pretrained(ModelConfig(path=str(checkpoint)))[0](**inputs).logits
        with policy.model.disable_adapter():
            assert torch.equal(policy.model(**inputs).logits, fresh)
    assert 0 < (fresh - full).abs().mean() < 0.05 * full.abs().mean()
    tiny.stirred(policy.model, 0.1)
    trained = policy.model(**inputs).logits
    trained.square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in policy.model.parameters() if p.requires_grad)
    folder = save_adapter(policy.model, tmp_path / "adapter", inputs)
    with torch.no_grad():
        assert torch.equal(load_adapter(config, folder).model(**inputs).logits, policy.model(**inputs).logits)
