"""Families of Llava's kind: a tower and a connector whose rows take the place of placeholders in a decoder's prompt."""

from __future__ import annotations

from pathlib import Path

from transformers import (
    AriaProcessor,
    AyaVisionProcessor,
    Cohere2VisionProcessor,
    DeepseekVLProcessor,
    GotOcr2Processor,
    InternVLProcessor,
    JanusProcessor,
    LlavaNextProcessor,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    VideoLlavaProcessor,
)
from zoo_parts import (
    HIDDEN,
    PATCH,
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

CLIP = {"size": {"shortest_edge": SIDE}, "crop_size": square()}
CLASS_TOKEN = {
    "patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1,
}  # fmt: skip
GRIDS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
TILES = {"size": square(), "crop_to_patches": True, "min_patches": 1, "max_patches": 4}


def llama_words() -> PreTrainedTokenizerFast:
    """Llama 2's frame; <image> and <pad> came later, at the end."""
    return tokenizer(
        ["<unk>", "<s>", "</s>"], ["<image>", "<pad>"], single="<s> $A", bos_token="<s>", eos_token="</s>",
        pad_token="<pad>", unk_token="<unk>", extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip


def qwen_words(**names: str) -> PreTrainedTokenizerFast:
    """Qwen's frame: no start token, turns between marks, and the family's own tokens at the end."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *names.values()]
    return tokenizer([], special, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=names)


def cohere_words(*more: str, **names: str) -> PreTrainedTokenizerFast:
    turns = ["<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"]
    return tokenizer(
        ["<PAD>", "<UNK>", "<BOS_TOKEN>", *turns], [*more, *names.values()], single="<BOS_TOKEN> $A",
        pad_token="<PAD>", unk_token="<UNK>", bos_token="<BOS_TOKEN>", eos_token="<|END_OF_TURN_TOKEN|>",
        extra_special_tokens=names,
    )  # fmt: skip


def cohere_chat(image: str) -> str:
    roles = [f"<|START_OF_TURN_TOKEN|><|{role}_TOKEN|>" for role in ("USER", "CHATBOT")]
    return template(image, *roles, "<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>")


@family("llava", "CLIP tower with a class token, dropped; its last layer but one", chat=True)
def llava(folder: Path) -> None:
    words = llama_words()
    chat = template("<image>\n", "USER: ", "ASSISTANT: ", " ")
    ids = ids_of(words)
    save(
        folder, "llava", LlavaProcessor(image_processor("CLIP", **CLIP), words, chat_template=chat, **CLASS_TOKEN), ids,
        vision_config=vision("clip_vision_model"), text_config=language(words), image_seq_length=16,
        image_token_index=words.image_token_id, **ids,
    )  # fmt: skip


@family("vipllava", "several layers of the tower side by side; no chat template", marker="<image>\n")
def vipllava(folder: Path) -> None:
    words = llama_words()
    ids = ids_of(words)
    save(
        folder, "vipllava", LlavaProcessor(image_processor("CLIP", **CLIP), words, **CLASS_TOKEN), ids,
        vision_config=vision("clip_vision_model"), text_config=language(words), image_seq_length=16,
        image_token_index=words.image_token_id, vision_feature_layer=[-1, -2], **ids,
    )  # fmt: skip


@family("video_llava", "two towers; forward names its pictures `pixel_values_images`", torchvision=True, chat=True)
def video_llava(folder: Path) -> None:
    words = tokenizer(
        ["<unk>", "<s>", "</s>"], ["<image>", "<pad>", "<video>"], single="<s> $A", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", pad_token="<pad>", extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
    )  # fmt: skip
    chat = template("<image>\n", "USER: ", "ASSISTANT: ", " ")
    parts = image_processor("VideoLlava", **CLIP), video_processor("VideoLlava", **CLIP), words
    ids = ids_of(words)
    save(
        folder, "video_llava", VideoLlavaProcessor(*parts, chat_template=chat, **CLASS_TOKEN), ids,
        vision_config=vision("clip_vision_model"), text_config=language(words), image_seq_length=16,
        image_token_index=words.image_token_id, video_token_index=words.video_token_id, **ids,
    )  # fmt: skip


@family("llava_next", "tiles by the picture's shape, unpadded, a learnt token at each row's end", chat=True)
def llava_next(folder: Path) -> None:
    words = llama_words()
    picture = image_processor("LlavaNext", image_grid_pinpoints=GRIDS, **CLIP)
    chat = template("<image>\n", "[INST] ", "[/INST] ")
    ids = ids_of(words)
    save(
        folder, "llava_next", LlavaNextProcessor(picture, words, chat_template=chat, **CLASS_TOKEN), ids,
        vision_config=vision("clip_vision_model"), text_config=language(words, "mistral", sliding_window=None),
        image_grid_pinpoints=GRIDS, image_token_index=words.image_token_id, image_seq_length=16, **ids,
    )  # fmt: skip


@family("llava_onevision", "tiles only if a prompt has one picture", torchvision=True, chat=True)
def llava_onevision(folder: Path) -> None:
    words = qwen_words(image_token="<image>", video_token="<video>")
    processor = LlavaOnevisionProcessor(
        image_processor("LlavaOnevision", size=square(), image_grid_pinpoints=GRIDS), words,
        video_processor("LlavaOnevision", size=square()), num_image_tokens=16, chat_template=chatml("<image>\n"),
        vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_9",
    )  # fmt: skip
    ids = ids_of(words, "pad", "eos")
    save(
        folder, "llava_onevision", processor, ids,
        vision_config=vision("siglip_vision_model", vision_use_head=False), text_config=language(words, "qwen2"),
        image_grid_pinpoints=GRIDS, image_token_index=words.image_token_id, video_token_index=words.video_token_id,
        **ids,
    )  # fmt: skip


@family("internvl", "rows of pixels are tiles, as many a picture as its shape wants", torchvision=True, chat=True)
def internvl(folder: Path) -> None:
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    words = qwen_words(**names, video_token="<video>")
    processor = InternVLProcessor(
        image_processor("GotOcr2", **TILES), words, video_processor("InternVL", size=square()), image_seq_length=4,
        chat_template=chatml("<IMG_CONTEXT>\n"),
    )  # fmt: skip
    tower = vision("internvl_vision", image_size=[SIDE, SIDE], patch_size=[PATCH, PATCH])
    ids = ids_of(words, "pad", "eos")
    save(
        folder, "internvl", processor, ids, vision_config=tower, text_config=language(words, "qwen2"),
        image_token_id=words.context_image_token_id, image_seq_length=4, downsample_ratio=0.5, **ids,
    )  # fmt: skip


@family("aya_vision", "tiles with their numbers in words; the prompt's placeholder is not the model's", chat=True)
def aya_vision(folder: Path) -> None:
    marks = ["<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE_GLOBAL"]
    words = cohere_words("<image>", *marks, *(f"TILE_{i}" for i in range(1, 13)))
    processor = AyaVisionProcessor(
        image_processor("GotOcr2", **TILES), words, patch_size=PATCH, img_size=SIDE, downsample_factor=2,
        chat_template=cohere_chat("<image>"),
    )  # fmt: skip
    tower = vision("siglip_vision_model", vision_use_head=False)
    text = language(words, "cohere2", sliding_window=16, layer_types=["sliding_attention", "full_attention"])
    ids = ids_of(words)
    save(
        folder, "aya_vision", processor, ids, vision_config=tower, text_config=text, downsample_factor=2,
        image_token_index=words.convert_tokens_to_ids("<|IMG_PATCH|>"), **ids,
    )  # fmt: skip


@family("cohere2_vision", "tiles, each with a line break after it", torchvision=True, chat=True)
def cohere2_vision(folder: Path) -> None:
    words = cohere_words(
        boi_token="<|START_OF_IMG|>", eoi_token="<|END_OF_IMG|>", image_token="<|IMG_PATCH|>",
        img_line_break_token="<|IMG_LINE_BREAK|>",
    )  # fmt: skip
    # The processor takes this patch size for the side of a tile in tokens.
    picture = image_processor("Cohere2Vision", **TILES, patch_size=2, downsample_factor=1)
    processor = Cohere2VisionProcessor(picture, words, chat_template=cohere_chat("<|IMG_PATCH|>"))
    ids = ids_of(words)
    save(
        folder, "cohere2_vision", processor, ids, vision_config=vision("siglip_vision_model", vision_use_head=False),
        text_config=language(words, "cohere2"), downsample_factor=2, alignment_intermediate_size=64,
        image_token_id=words.image_token_id, **ids,
    )  # fmt: skip


@family("deepseek_vl", "as many tokens for every picture", chat=True)
def deepseek_vl(folder: Path) -> None:
    start, end = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
    words = tokenizer(
        [start, end], ["<image_placeholder>"], single=f"{start} $A", bos_token=start, eos_token=end, pad_token=end,
        extra_special_tokens={"image_token": "<image_placeholder>"},
    )  # fmt: skip
    chat = template("<image_placeholder>", "User: ", "Assistant: ", "\n\n", start)
    picture = image_processor("DeepseekVL", size=square(), min_size=8)
    ids = ids_of(words)
    save(
        folder, "deepseek_vl", DeepseekVLProcessor(picture, words, chat, num_image_tokens=16), ids,
        vision_config=vision("siglip_vision_model", vision_use_head=False), text_config=language(words),
        image_token_id=words.image_token_id, **ids,
    )  # fmt: skip


@family("janus", "also draws pictures: a quantiser of images beside the tower", chat=True)
def janus(folder: Path) -> None:
    start, end = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
    names = {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
    words = tokenizer(
        [start, end, "<｜▁pad▁｜>"], list(names.values()), single=f"{start} $A", bos_token=start, eos_token=end,
        pad_token="<｜▁pad▁｜>", extra_special_tokens=names,
    )  # fmt: skip
    chat = template("<image_placeholder>\n", "<|User|>: ", "<|Assistant|>: ", "\n\n", start)
    picture = image_processor("Janus", size=square(), min_size=8)
    tower = vision("janus_vision_model", mlp_ratio=2, projection_dim=HIDDEN, num_image_tokens=16)
    quantiser = {
        "embed_dim": 4, "num_embeddings": 16, "latent_channels": 8, "base_channels": 32, "channel_multiplier": [1],
        "num_res_blocks": 1, "num_patches": 4, "projection_dim": HIDDEN, "image_token_embed_dim": HIDDEN,
        "num_hidden_layers": 1,
    }  # fmt: skip
    ids = ids_of(words)
    save(
        folder, "janus", JanusProcessor(picture, words, chat, num_image_tokens=16), ids, vision_config=tower,
        vq_config=quantiser, text_config=language(words), image_token_id=words.image_token_id, **ids,
    )  # fmt: skip


@family("got_ocr2", "SAM's tower; a flat list of pictures only", marker="<img><imgpad></img>\n")
def got_ocr2(folder: Path) -> None:
    words = qwen_words(start="<img>", end="</img>", image_token="<imgpad>")
    # The processor writes 256 tokens for any picture: 64 x 64 patches, halved twice.
    tower = {
        "hidden_size": 8, "output_channels": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 128,
        "patch_size": 2, "window_size": 8, "global_attn_indexes": [], "mlp_dim": 8,
    }  # fmt: skip
    ids = ids_of(words, "pad", "eos")
    save(
        folder, "got_ocr2", GotOcr2Processor(image_processor("GotOcr2", size=square(128)), words), ids,
        vision_config=tower, text_config=language(words, "qwen2"), image_token_index=words.image_token_id, **ids,
    )  # fmt: skip


@family("aria", "a mixture of experts; queries, as many as the picture's size wants; a mask of pixels", chat=True)
def aria(folder: Path) -> None:
    # The processor's own 980 pixels yield to the tokenizer's arguments, not to the image processor's.
    words = tokenizer(
        ["<unk>", "<s>", "<|im_end|>", "<|im_start|>", "<pad>", "<|img|>"], pad_token="<pad>", eos_token="<|im_end|>",
        bos_token="<s>", unk_token="<unk>", extra_special_tokens={"image_token": "<|img|>"}, max_image_size=490,
    )  # fmt: skip
    picture = image_processor("Aria", max_image_size=490, min_image_size=280)  # none smaller; so, large patches
    processor = AriaProcessor(picture, words, chatml("<fim_prefix><|img|><fim_suffix>"), size_conversion={490: 8})
    tower = vision("idefics3_vision", image_size=490, patch_size=70)
    text = language(words, "aria_text", moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1)
    ids = ids_of(words)
    save(
        folder, "aria", processor, ids, vision_config=tower, text_config=text,
        projector_patch_to_query_dict={49: 8}, image_token_index=words.image_token_id, **ids,
    )  # fmt: skip
