"""Families that see a picture at its own shape: rows of patches with a grid or sizes beside them, and, in Qwen's and
GLM's kind, positions in three parts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    Glm4vProcessor,
    Lfm2VlProcessor,
    LightOnOcrProcessor,
    PixtralProcessor,
    Qwen2_5_VLProcessor,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
)
from zoo_llava import qwen_words
from zoo_parts import (
    HIDDEN,
    SIDE,
    chatml,
    family,
    ids_of,
    image_processor,
    language,
    save,
    template,
    tokenizer,
    video_processor,
    vision,
)

PIXELS = {"shortest_edge": 16 * 16, "longest_edge": SIDE * SIDE}
PATCHES = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = ROPE | {"mrope_section": [2, 1, 1]}
QWEN = {
    "vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>", "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
}  # fmt: skip
TOWER = {"depth": 2, "hidden_size": 24, "intermediate_size": 32, "num_heads": 2, "patch_size": 4}


def _qwen(folder: Path, kind: str, processor: Any, tower: dict[str, Any], text: dict[str, Any], video: str) -> None:
    words = qwen_words(**QWEN)
    processor = processor(
        image_processor("Qwen2VL", size=PIXELS, **PATCHES), words, video_processor(video, size=PIXELS, **PATCHES),
        chat_template=chatml("<|vision_start|><|image_pad|><|vision_end|>"),
    )  # fmt: skip
    ids = ids_of(words, "pad", "eos")
    save(
        folder, kind, processor, ids | {"eos_token_id": [words.eos_token_id, words.pad_token_id]},
        vision_config=tower, text_config=language(words, f"{kind}_text", **text),
        image_token_id=words.image_token_id, video_token_id=words.video_token_id,
        vision_start_token_id=words.vision_start_token_id, vision_end_token_id=words.vision_end_token_id, **ids,
    )  # fmt: skip


@family("qwen2_vl", "rows of patches; mrope; `mm_token_type_ids`", torchvision=True, chat=True)
def qwen2_vl(folder: Path) -> None:
    tower = {"depth": 2, "embed_dim": 24, "hidden_size": HIDDEN, "mlp_ratio": 2, "num_heads": 2, "patch_size": 4}
    _qwen(folder, "qwen2_vl", Qwen2VLProcessor, tower, {"rope_parameters": MROPE}, "Qwen2VL")


@family("qwen2_5_vl", "rows of patches; window attention in the tower; mrope", torchvision=True, chat=True)
def qwen2_5_vl(folder: Path) -> None:
    tower = TOWER | {"window_size": 16, "fullatt_block_indexes": [1], "out_hidden_size": HIDDEN}
    _qwen(folder, "qwen2_5_vl", Qwen2_5_VLProcessor, tower, {"rope_parameters": MROPE}, "Qwen2VL")


@family("qwen3_vl", "rows of patches; interleaved mrope; the tower feeds later layers too", torchvision=True, chat=True)
def qwen3_vl(folder: Path) -> None:
    tower = TOWER | {"out_hidden_size": HIDDEN, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    text = {"rope_parameters": MROPE, "head_dim": 8}
    _qwen(folder, "qwen3_vl", Qwen3VLProcessor, tower, text, "Qwen3VL")


@family("qwen3_5", "linear attention in one layer, gated attention in the other", torchvision=True, chat=True)
def qwen3_5(folder: Path) -> None:
    tower = TOWER | {"out_hidden_size": HIDDEN, "num_position_embeddings": 64}
    text = {
        "rope_parameters": MROPE | {"partial_rotary_factor": 1.0}, "head_dim": 8, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
    }  # fmt: skip
    _qwen(folder, "qwen3_5", Qwen3VLProcessor, tower, text, "Qwen3VL")


@family("glm4v", "rows of patches; mrope; the next user turn ends an answer", torchvision=True, chat=True)
def glm4v(folder: Path) -> None:
    marks = ["<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"]
    names = {"image_token": "<|image|>", "video_token": "<|video|>"}
    words = tokenizer(
        [], ["<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>", *marks, *names.values()],
        eos_token="<|endoftext|>", pad_token="<|endoftext|>", extra_special_tokens=names,
    )  # fmt: skip
    chat = template("<|begin_of_image|><|image|><|end_of_image|>", "<|user|>\n", "<|assistant|>\n", "", "[gMASK]<sop>")
    processor = Glm4vProcessor(
        image_processor("Glm4v", size=PIXELS, **PATCHES), words, video_processor("Glm4v", size=PIXELS, **PATCHES), chat
    )
    tower = TOWER | {"out_hidden_size": HIDDEN, "image_size": SIDE}
    text = language(words, "glm4v_text", rope_parameters=MROPE | {"partial_rotary_factor": 1.0})
    ids = ids_of(words, "pad", "eos")
    ends = words.convert_tokens_to_ids(["<|endoftext|>", "<|user|>"])
    begin, end, begin_video, end_video = words.convert_tokens_to_ids(marks)
    save(
        folder, "glm4v", processor, ids | {"eos_token_id": ends}, vision_config=tower, text_config=text,
        image_token_id=words.image_token_id, video_token_id=words.video_token_id, image_start_token_id=begin,
        image_end_token_id=end, video_start_token_id=begin_video, video_end_token_id=end_video, **ids,
    )  # fmt: skip


@family("mistral3", "Pixtral's tower; a token after each row of patches; `image_sizes`", torchvision=True, chat=True)
def mistral3(folder: Path) -> None:
    words = tokenizer(
        ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]"], single="<s> $A",
        bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
    )  # fmt: skip
    processor = PixtralProcessor(
        image_processor("Pixtral", size={"longest_edge": SIDE}, patch_size={"height": 4, "width": 4}), words,
        patch_size=4, spatial_merge_size=2, chat_template=template("[IMG]", "[INST]", "[/INST]", "", "<s>"),
    )  # fmt: skip
    ids = ids_of(words)
    tower = vision("pixtral", patch_size=4, head_dim=12)
    save(
        folder, "mistral3", processor, ids, vision_config=tower, spatial_merge_size=2,
        text_config=language(words, "mistral", sliding_window=None, head_dim=8),
        image_token_index=words.convert_tokens_to_ids("[IMG]"), **ids,
    )  # fmt: skip


@family("lighton_ocr", "Pixtral's tower before Qwen 3", chat=True)
def lighton_ocr(folder: Path) -> None:
    words = qwen_words(
        image_token="<|image_pad|>", image_break_token="<|vision_pad|>", image_end_token="<|vision_end|>"
    )
    processor = LightOnOcrProcessor(
        image_processor("Pixtral", size={"longest_edge": SIDE}, patch_size={"height": 4, "width": 4}), words,
        patch_size=4, spatial_merge_size=2, chat_template=chatml("<|image_pad|>"),
    )  # fmt: skip
    ids = ids_of(words, "pad", "eos")
    save(
        folder, "lighton_ocr", processor, ids, vision_config=vision("pixtral", patch_size=4, head_dim=12),
        text_config=language(words, "qwen3", head_dim=8), spatial_merge_size=2, image_token_id=words.image_token_id,
        **ids,
    )  # fmt: skip


@family("lfm2_vl", "short convolutions in one layer; tiles, patches padded to one length", torchvision=True, chat=True)
def lfm2_vl(folder: Path) -> None:
    names = {
        "image_token": "<image>", "image_start_token": "<|image_start|>", "image_end_token": "<|image_end|>",
        "image_thumbnail_token": "<|img_thumbnail|>",
    }  # fmt: skip
    rows = [f"<|img_row_{row}_col_{column}|>" for row in (1, 2) for column in (1, 2)]
    words = tokenizer(
        ["<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", *names.values(), *rows],
        single="<|startoftext|> $A", pad_token="<|pad|>", bos_token="<|startoftext|>", eos_token="<|im_end|>",
        extra_special_tokens=names,
    )  # fmt: skip
    picture = image_processor(
        "Lfm2Vl", tile_size=SIDE, min_tiles=2, max_tiles=4, min_image_tokens=4, max_image_tokens=4,
        encoder_patch_size=8, downsample_factor=2, max_num_patches=16,
    )  # fmt: skip
    processor = Lfm2VlProcessor(picture, words, chatml("<image>", "<|startoftext|>"))
    tower = {
        "model_type": "siglip2_vision_model", "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "patch_size": 8, "num_patches": 16, "vision_use_head": False,
    }  # fmt: skip
    text = language(
        words, "lfm2", layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False, rope_parameters=ROPE
    )
    ids = ids_of(words)
    save(
        folder, "lfm2_vl", processor, ids, vision_config=tower, text_config=text, image_token_id=words.image_token_id,
        projector_hidden_size=48, downsample_factor=2, **ids,
    )  # fmt: skip
