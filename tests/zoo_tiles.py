"""Idefics' kind, Gemma's and Ovis 2: tiles with marks around them, and prompts that see themselves both ways."""

from __future__ import annotations

from pathlib import Path

from transformers import (
    Gemma3Processor,
    Gemma4AudioFeatureExtractor,
    Gemma4Processor,
    Idefics2Processor,
    Idefics3Processor,
    Ovis2Processor,
    PaliGemmaProcessor,
    SmolVLMProcessor,
)
from zoo_llava import TILES, qwen_words
from zoo_parts import (
    HIDDEN,
    SIDE,
    chatml,
    family,
    ids_of,
    image_processor,
    language,
    save,
    square,
    template,
    tokenizer,
    video_processor,
    vision,
)

TILE_MARKS = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
MARKS = ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]


@family("idefics2", "a perceiver's latents for every picture, seen at its own shape under a mask of pixels", chat=True)
def idefics2(folder: Path) -> None:
    words = tokenizer(
        ["<unk>", "<s>", "</s>"], MARKS, single="<s> $A", bos_token="<s>", eos_token="</s>", pad_token="<unk>",
        unk_token="<unk>",
    )  # fmt: skip
    picture = image_processor("Idefics2", size={"shortest_edge": 24, "longest_edge": SIDE}, do_image_splitting=False)
    chat = template("<image>", "User:", "Assistant:", "<end_of_utterance>\n")
    processor = Idefics2Processor(picture, words, image_seq_len=4, chat_template=chat)
    latents = {
        "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4, "resampler_head_dim": 8,
        "num_key_value_heads": 2, "hidden_size": HIDDEN,
    }  # fmt: skip
    ids = ids_of(words)
    save(
        folder, "idefics2", processor, ids, vision_config=vision("idefics2_vision"), perceiver_config=latents,
        text_config=language(words, "mistral"),
        image_token_id=words.convert_tokens_to_ids("<image>"), **ids,
    )  # fmt: skip


@family("idefics3", "tiles of a picture and the whole of it, each framed by its place; 4 tokens a tile", chat=True)
def idefics3(folder: Path) -> None:
    start = "<|begin_of_text|>"
    words = tokenizer(
        [start, "<|end_of_text|>", "<|finetune_right_pad_id|>"], [*MARKS, "<global-img>", *TILE_MARKS],
        single=f"{start} $A", bos_token=start, eos_token="<end_of_utterance>", pad_token="<|finetune_right_pad_id|>",
    )  # fmt: skip
    picture = image_processor("Idefics3", size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
    chat = template("<image>", "User:", "Assistant:", "<end_of_utterance>\n", start)
    processor = Idefics3Processor(picture, words, image_seq_len=4, chat_template=chat)
    ids = ids_of(words)
    save(
        folder, "idefics3", processor, ids, vision_config=vision("idefics3_vision"), text_config=language(words),
        scale_factor=2, image_token_id=words.convert_tokens_to_ids("<image>"), **ids,
    )  # fmt: skip


@family("smolvlm", "Idefics 3's tiles and prompt; no start token", torchvision=True, chat=True, packages=("num2words",))
def smolvlm(folder: Path) -> None:
    start = "<|im_start|>"
    words = tokenizer(
        ["<|endoftext|>", start, "<|im_end|>"], ["<video>", "<global-img>", *TILE_MARKS, *MARKS], bos_token=start,
        eos_token="<end_of_utterance>", pad_token="<|im_end|>",
        extra_special_tokens={
            "image_token": "<image>", "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>",
        },
    )  # fmt: skip
    sizes = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
    chat = template("<image>", "User:", "Assistant:", "<end_of_utterance>\n", start)
    processor = SmolVLMProcessor(
        image_processor("SmolVLM", **sizes), words, video_processor("SmolVLM", **sizes), 4, chat
    )
    ids = ids_of(words)
    save(
        folder, "smolvlm", processor, ids, vision_config=vision("smolvlm_vision"), text_config=language(words),
        scale_factor=2, image_token_id=words.image_token_id, **ids,
    )  # fmt: skip


@family("paligemma", "Gemma 2 with soft caps; the prompt sees itself both ways, by `token_type_ids`; unasked `labels`")
def paligemma(folder: Path) -> None:
    words = tokenizer(
        ["<pad>", "<eos>", "<bos>", "<unk>"], ["<image>"], pad_token="<pad>", eos_token="<eos>", bos_token="<bos>",
        unk_token="<unk>", extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    picture = image_processor("Siglip", size=square(), image_seq_length=16)
    processor = PaliGemmaProcessor(picture, words)  # adds 1152 tokens for places
    ids = ids_of(words)
    text = language(words, "gemma2", head_dim=8, query_pre_attn_scalar=8)
    save(
        folder, "paligemma", processor, ids, vision_config=vision("siglip_vision_model", vision_use_head=False),
        text_config=text, image_token_index=words.image_token_id, projection_dim=HIDDEN, hidden_size=HIDDEN, **ids,
    )  # fmt: skip


@family("gemma3", "pictures see themselves both ways, by `token_type_ids`; a window shorter than the prompt", chat=True)
def gemma3(folder: Path) -> None:
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    words = tokenizer(
        ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", *names.values()], single="<bos> $A",
        pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>", extra_special_tokens=names,
    )  # fmt: skip
    roles = [f"<start_of_turn>{role}\n" for role in ("user", "model")]
    chat = template("<start_of_image>", *roles, "<end_of_turn>\n", "<bos>")
    processor = Gemma3Processor(image_processor("Gemma3", size=square()), words, chat_template=chat, image_seq_length=4)
    text = language(
        words, "gemma3_text", head_dim=8, query_pre_attn_scalar=8, sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    ends = words.convert_tokens_to_ids(["<eos>", "<end_of_turn>"])
    save(
        folder, "gemma3", processor, ids_of(words) | {"eos_token_id": ends}, text_config=text,
        vision_config=vision("siglip_vision_model", vision_use_head=False), mm_tokens_per_image=4,
        boi_token_index=words.boi_token_id, eoi_token_index=words.eoi_token_id,
        image_token_index=words.image_token_id,
    )  # fmt: skip


@family(
    "gemma4",
    "patches with their places; embeddings for each layer; shared keys; soft caps",
    torchvision=True,
    chat=True,
)
def gemma4(folder: Path) -> None:
    names = {
        "boi_token": "<|image>", "image_token": "<|image|>", "eoi_token": "<image|>", "boa_token": "<|audio>",
        "audio_token": "<|audio|>", "eoa_token": "<audio|>",
    }  # fmt: skip
    words = tokenizer(
        ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", *names.values(), "<|video|>"], single="<bos> $A",
        pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>", extra_special_tokens=names,
    )  # fmt: skip
    chat = template("<|image|>", "<|turn>user\n", "<|turn>model\n", "<turn|>\n", "<bos>")
    patches = {"patch_size": 4, "pooling_kernel_size": 3, "max_soft_tokens": 70}
    processor = Gemma4Processor(
        Gemma4AudioFeatureExtractor(), image_processor("Gemma4", **patches), words,
        video_processor("Gemma4", **patches), chat, image_seq_length=70,
    )  # fmt: skip
    text = language(
        words, "gemma4_text", num_hidden_layers=3, head_dim=8, global_head_dim=8, sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "full_attention"], num_kv_shared_layers=1,
        hidden_size_per_layer_input=8, vocab_size_per_layer_input=len(words), final_logit_softcapping=30.0,
    )  # fmt: skip
    tower = {
        "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 12, "patch_size": 4, "pooling_kernel_size": 3,
        "position_embedding_size": 64,
    }  # fmt: skip
    ends = words.convert_tokens_to_ids(["<eos>", "<turn|>"])
    save(
        folder, "gemma4", processor, ids_of(words) | {"eos_token_id": ends}, vision_config=tower, text_config=text,
        audio_config=None, boi_token_id=words.boi_token_id, eoi_token_id=words.eoi_token_id,
        image_token_id=words.image_token_id, video_token_id=words.convert_tokens_to_ids("<|video|>"),
        boa_token_id=words.boa_token_id, eoa_token_index=words.eoa_token_id, audio_token_id=words.audio_token_id,
    )  # fmt: skip


@family(
    "ovis2", "tiles; the tower's features are odds over a vocabulary of pictures; marks that are pictures", chat=True
)
def ovis2(folder: Path) -> None:
    marks = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
    words = qwen_words(image_token="<image>", atom="<IMG_ATOM>", **{f"mark_{i}": mark for i, mark in enumerate(marks)})
    picture = image_processor("Ovis2", **TILES | {"max_patches": 2})
    processor = Ovis2Processor(picture, words, chatml("<image>\n"), image_seq_length=16)
    tower = vision("ovis2_vision", vocab_size=64, hidden_stride=1)
    del tower["model_type"]
    ids = ids_of(words, "pad", "eos")
    save(
        folder, "ovis2", processor, ids, vision_config=tower, text_config=language(words, "qwen2"),
        image_token_id=words.convert_tokens_to_ids("<IMG_ATOM>"), hidden_size=HIDDEN, vocab_size=len(words),
        visual_indicator_token_ids=words.convert_tokens_to_ids(marks), **ids,
    )  # fmt: skip
