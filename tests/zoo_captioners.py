"""Families that show the decoder its picture some other way: by cross-attention, through a query former, as a prefix,
from an encoder, or without any tower.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    Blip2Processor,
    BlipProcessor,
    ChameleonProcessor,
    Emu3Processor,
    Florence2Processor,
    FuyuProcessor,
    GitProcessor,
    IdeficsProcessor,
    InstructBlipProcessor,
    Kosmos2Processor,
    MllamaProcessor,
    Pix2StructProcessor,
    PreTrainedTokenizerFast,
    VisionEncoderDecoderConfig,
)
from zoo_parts import (
    HIDDEN,
    PATCH,
    SIDE,
    family,
    ids_of,
    image_processor,
    language,
    save,
    save_parts,
    sentence_pieces,
    square,
    template,
    tokenizer,
    vision,
    word_pieces,
)

BART = {
    "d_model": HIDDEN, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 512,
}  # fmt: skip
QFORMER = {
    "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "encoder_hidden_size": 24, "cross_attention_frequency": 2,
}  # fmt: skip
OPT = {
    "model_type": "opt", "hidden_size": HIDDEN, "word_embed_proj_dim": HIDDEN, "ffn_dim": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 512,
}  # fmt: skip
QUERIES = 4


@family("mllama", "cross-attention; up to 4 tiles; the placeholder's id lies outside the output vocabulary", chat=True)
def mllama(folder: Path) -> None:
    start, turn = "<|begin_of_text|>", "<|eot_id|>"
    special = [start, "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|start_header_id|>", "<|end_header_id|>", turn]
    words = tokenizer(
        [*special, "<|python_tag|>"], ["<|image|>"], single=f"{start} $A", bos_token=start, eos_token=turn,
        pad_token="<|finetune_right_pad_id|>",
    )  # fmt: skip
    roles = [f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("user", "assistant")]
    picture = image_processor("Mllama", size=square(), max_image_tiles=4)
    processor = MllamaProcessor(picture, words, chat_template=template("<|image|>", *roles, turn, start))
    size = len(words) - 1
    tower = {
        "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_global_layers": 1,
        "attention_heads": 2, "vision_output_dim": 24 * 2, "intermediate_layers_indices": [0], "image_size": SIDE,
        "patch_size": PATCH, "max_num_tiles": 4,
        "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    text = language(
        words, "mllama_text_model", vocab_size=size, num_hidden_layers=3, cross_attention_layers=[1],
        rope_parameters=rope,
    )  # fmt: skip
    ends = words.convert_tokens_to_ids(["<|end_of_text|>", turn])
    save(
        folder, "mllama", processor, ids_of(words) | {"eos_token_id": ends}, vision_config=tower, text_config=text,
        image_token_index=size,
    )  # fmt: skip


@family("blip", "BERT decoder with cross-attention; generates after a start token that its tokenizer lacks")
def blip(folder: Path) -> None:
    words = word_pieces()
    ids = {"pad_token_id": 0, "bos_token_id": len(words), "eos_token_id": 2, "sep_token_id": words.sep_token_id}
    text = {
        "vocab_size": len(words) + 2, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 512,
    }  # fmt: skip
    picture = image_processor("Blip", size=square())
    save(
        folder, "blip", BlipProcessor(picture, words), ids, vision_config=vision("blip_vision_model"),
        text_config=text | ids,
    )  # fmt: skip


@family("git", "the picture is a prefix: logits cover its positions too")
def git(folder: Path) -> None:
    words = word_pieces()
    ids = {"pad_token_id": 0, "bos_token_id": words.cls_token_id, "eos_token_id": words.sep_token_id}
    sizes = {
        "vocab_size": len(words), "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 512,
    }  # fmt: skip
    picture = image_processor("CLIP", size={"shortest_edge": SIDE}, crop_size=square())
    save(folder, "git", GitProcessor(picture, words), ids, vision_config=vision("git_vision_model"), **sizes, **ids)


def _opt_words() -> PreTrainedTokenizerFast:
    return tokenizer(
        ["<s>", "<pad>", "</s>", "<unk>"], ["<image>"], single="</s> $A", side="right", bos_token="</s>",
        eos_token="</s>", pad_token="<pad>",
    )  # fmt: skip


def _blip2(folder: Path, words: Any, ids: dict[str, int], text: dict[str, Any]) -> None:
    processor = Blip2Processor(image_processor("Blip", size=square()), words, num_query_tokens=QUERIES)
    text = text | {"vocab_size": len(words)}
    save(
        folder, "blip-2", processor, ids, vision_config=vision("blip_2_vision_model"),
        qformer_config=QFORMER | {"vocab_size": 8}, text_config=text | ids, num_query_tokens=QUERIES,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )  # fmt: skip


@family("blip-2", "query former before OPT; picture tokens before the start token; a line end ends an answer")
def blip2_opt(folder: Path) -> None:
    words = _opt_words()
    newline = words.encode("\n", add_special_tokens=False)[0]
    _blip2(folder, words, ids_of(words) | {"eos_token_id": newline}, OPT)


@family("blip-2-t5", "query former before T5, an encoder-decoder")
def blip2_t5(folder: Path) -> None:
    words = tokenizer(
        ["<pad>", "</s>", "<unk>"], ["<image>"], single="$A </s>", side="right", eos_token="</s>", pad_token="<pad>",
    )  # fmt: skip
    text = {
        "model_type": "t5", "d_model": HIDDEN, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2,
        "num_heads": 4, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
    }  # fmt: skip
    _blip2(folder, words, ids_of(words, "pad", "eos") | {"decoder_start_token_id": 0}, text)


@family("instructblip", "a query former that reads the prompt too, with its own tokenizer and ids")
def instructblip(folder: Path) -> None:
    words = _opt_words()
    own = word_pieces()
    processor = InstructBlipProcessor(image_processor("Blip", size=square()), words, own, num_query_tokens=QUERIES)
    ids = ids_of(words)
    save(
        folder, "instructblip", processor, ids, vision_config=vision("instructblip_vision_model"),
        qformer_config=QFORMER | {"vocab_size": len(own)}, text_config=OPT | {"vocab_size": len(words), **ids},
        num_query_tokens=QUERIES, image_token_index=words.convert_tokens_to_ids("<image>"),
    )  # fmt: skip


@family("florence2", "DaViT tower before BART, an encoder-decoder; every prompt holds its picture's tokens")
def florence2(folder: Path) -> None:
    words = tokenizer(
        ["<s>", "<pad>", "</s>", "<unk>"], ["<image>"], single="<s> $A </s>", side="right", bos_token="<s>",
        eos_token="</s>", pad_token="<pad>", unk_token="<unk>", extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    tower = {
        "depths": [1, 1], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1],
        "patch_prenorm": [False, True], "embed_dim": [16, 32], "num_heads": [2, 4], "num_groups": [2, 4],
        "window_size": 4, "drop_path_rate": 0.0, "projection_dim": HIDDEN,
    }  # fmt: skip
    tokens = (SIDE // 8) ** 2 + 1  # and their mean
    picture = image_processor("CLIP", size=square(), do_center_crop=False, image_seq_length=tokens)
    ids = ids_of(words) | {"decoder_start_token_id": words.eos_token_id}
    save(
        folder, "florence2", Florence2Processor(picture, words), ids, vision_config=tower,
        text_config={"model_type": "bart", "vocab_size": len(words), **BART, **ids},
        image_token_id=words.image_token_id, **ids,
    )  # fmt: skip


@family("vision-encoder-decoder", "ViT and GPT-2; the folder has a tokenizer and an image processor, no processor")
def vision_encoder_decoder(folder: Path) -> None:
    end = "<|endoftext|>"
    words = tokenizer([end], side="right", bos_token=end, eos_token=end, pad_token=end)
    ids = ids_of(words) | {"decoder_start_token_id": words.bos_token_id}
    decoder = AutoConfig.for_model(
        "gpt2", vocab_size=len(words), n_positions=512, n_embd=HIDDEN, n_layer=2, n_head=4, add_cross_attention=True,
        is_decoder=True, **ids_of(words, "bos", "eos"),
    )  # fmt: skip
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(AutoConfig.for_model(**vision("vit")), decoder)
    config.update(ids)
    save_parts(folder, config, [words, image_processor("ViT", size=square())], ids)


@family("kosmos-2", "the picture's place is a mask, `image_embeds_position_mask`; its ids there mean nothing")
def kosmos2(folder: Path) -> None:
    words = tokenizer(
        ["<s>", "<pad>", "</s>", "<unk>"], single="<s> $A </s>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>",
    )  # fmt: skip
    picture = image_processor("CLIP", size={"shortest_edge": SIDE}, crop_size=square())
    processor = Kosmos2Processor(picture, words, 16)
    text = {
        "vocab_size": len(words), "embed_dim": HIDDEN, "layers": 2, "ffn_dim": 48, "attention_heads": 4,
        "max_position_embeddings": 512,
    }  # fmt: skip
    ids = ids_of(words)
    save(
        folder, "kosmos-2", processor, ids, vision_config=vision("kosmos_2_vision_model"), text_config=text | ids,
        latent_query_num=64, **ids,
    )  # fmt: skip


@family("pix2struct", "patches with their places for pixels; the prompt opens the decoder's text")
def pix2struct(folder: Path) -> None:
    # The processor's own 2048 patches yield to the tokenizer's arguments, not to the image processor's.
    words = tokenizer(
        ["<pad>", "</s>", "<unk>"], single="$A </s>", side="right", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>", max_patches=24,
    )  # fmt: skip
    picture = image_processor("Pix2Struct", patch_size=square(PATCH), max_patches=16, is_vqa=False)
    tower = {
        "hidden_size": HIDDEN, "patch_embed_hidden_size": 3 * PATCH**2, "d_ff": 48, "d_kv": 8, "num_hidden_layers": 2,
        "num_attention_heads": 4, "seq_len": 64,
    }  # fmt: skip
    ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    text = {
        "vocab_size": len(words), "hidden_size": HIDDEN, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    }  # fmt: skip
    save(
        folder, "pix2struct", Pix2StructProcessor(picture, words), ids, vision_config=tower, text_config=text | ids,
        is_encoder_decoder=True, **ids,
    )  # fmt: skip


# Its PIL image processor fails on every picture.
@family("fuyu", "no tower: patches go through one linear map, a token after each row", torchvision=True)
def fuyu(folder: Path) -> None:
    words = sentence_pieces(
        ["|ENDOFTEXT|", "<s>", "</s>", "<unk>", "|SPEAKER|", "|NEWLINE|", "<0x04>"], bos_token="<s>",
        eos_token="|ENDOFTEXT|", pad_token="|ENDOFTEXT|", unk_token="<unk>",
    )  # fmt: skip
    picture = image_processor("Fuyu", size=square(2 * SIDE), patch_size=square(2 * PATCH))
    ids = ids_of(words)
    save(
        folder, "fuyu", FuyuProcessor(picture, words), ids,
        text_config=language(words, "persimmon", partial_rotary_factor=0.5), image_size=2 * SIDE,
        patch_size=2 * PATCH, image_token_id=words.convert_tokens_to_ids("|SPEAKER|"), **ids,
    )  # fmt: skip


@family("chameleon", "no tower: a picture becomes ids; the head forbids those, as logits of -3e38", marker="<image>")
def chameleon(folder: Path) -> None:
    codes = [f"IMGIMG{'ABCDEFGHIJ'[i // 10]}{'ABCDEFGHIJ'[i % 10]}Z" for i in range(16)]
    words = tokenizer(
        ["<s>", "<pad>", "</s>", "<unk>", *codes], ["<racm3:break>", "<eoss>", "<image>"], single="<s> $A",
        bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
    )  # fmt: skip
    picture = image_processor("Chameleon", size={"shortest_edge": SIDE}, crop_size=square())
    quantiser = {
        "embed_dim": 8, "num_embeddings": 16, "latent_channels": 8, "resolution": SIDE, "base_channels": 32,
        "channel_multiplier": [1, 1, 1, 1], "num_res_blocks": 1,
    }  # fmt: skip
    text = language(words)
    del text["model_type"]
    ids = ids_of(words)
    save(
        folder, "chameleon", ChameleonProcessor(picture, words, image_seq_length=16), ids, vq_config=quantiser,
        vocabulary_map=words.get_vocab(), **text,
    )  # fmt: skip


@family("emu3", "no tower: a picture becomes ids, with a mark at each row's end; padded when sizes differ", chat=True)
def emu3(folder: Path) -> None:
    names = {
        "image_token": "<image>", "boi_token": "<|image start|>", "eoi_token": "<|image end|>",
        "image_wrapper_token": "<|image token|>", "eof_token": "<|extra_201|>",
    }  # fmt: skip
    codes = [f"<|visual token {i:06d}|>" for i in range(64)]
    words = tokenizer(
        ["<pad>", "<s>", "</s>", "<|extra_200|>", *codes], [*names.values()], bos_token="<s>", eos_token="</s>",
        pad_token="<pad>", extra_special_tokens=names,
    )  # fmt: skip
    picture = image_processor("Emu3", min_pixels=SIDE * SIDE, max_pixels=SIDE * SIDE)
    processor = Emu3Processor(picture, words, chat_template=template("<image>", "USER: ", "ASSISTANT: ", " "))
    quantiser = {
        "codebook_size": len(codes), "base_channels": 32, "channel_multiplier": [1, 1, 1, 1], "num_res_blocks": 1,
        "hidden_size": 32,
    }  # fmt: skip
    text = language(words)
    del text["model_type"]
    ids = ids_of(words)
    save(folder, "emu3", processor, ids, vq_config=quantiser, text_config=text, vocabulary_map=words.get_vocab(), **ids)


@family("idefics", "cross-attention between layers; a list of pictures for each prompt")
def idefics(folder: Path) -> None:
    words = tokenizer(
        ["<pad>", "<s>", "</s>", "<unk>"], ["<fake_token_around_image>", "<image>"], bos_token="<s>", eos_token="</s>",
        pad_token="<pad>", unk_token="<unk>",
    )  # fmt: skip
    text = language(words, vocab_size=len(words) - 2)  # placeholders are read, never written
    del text["model_type"], text["num_key_value_heads"]
    ids = ids_of(words)
    tower = {
        "embed_dim": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": SIDE, "patch_size": PATCH,
    }  # fmt: skip
    processor = IdeficsProcessor(image_processor("Idefics", image_size=SIDE), words, image_size=SIDE)
    save(folder, "idefics", processor, ids, vision_config=tower, additional_vocab_size=2, **text)
