"""Checkpoints with random weights and real shapes for the benchmarks: an ordinary Idefics3 folder, built offline.

    python scripts/bench/checkpoint.py --preset 256m --folder /tmp/bench

What a step costs depends on shapes alone, so random weights serve as well as trained ones. `256m` has the shape of
SmolVLM-256M, `2b` that of SmolVLM-2.2B; `tiny` runs in seconds and tests the scripts themselves. Pictures go through
the PIL image processor and are never split into tiles: no torchvision, and each is `Shape.picture_tokens` tokens.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    PreTrainedTokenizerFast,
)

PROMPT = "Describe the picture."
BOS, EOS, PAD = "<|im_start|>", "<end_of_utterance>", "<|im_end|>"
PICTURE, FAKE, GLOBAL = "<image>", "<fake_token_around_image>", "<global-img>"
SPECIAL = (PAD, BOS, EOS, PICTURE, FAKE, GLOBAL)
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """Sizes of a SigLIP-like tower and a Llama; `scale` squared patches become one token of the language model."""

    picture_side: int
    patch: int
    scale: int
    vision_layers: int
    vision_width: int
    vision_heads: int
    vision_mlp: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int

    @property
    def patches(self) -> int:
        return (self.picture_side // self.patch) ** 2

    @property
    def picture_tokens(self) -> int:
        return self.patches // self.scale**2

    @property
    def kv_width(self) -> int:
        return self.width // self.heads * self.kv_heads


PRESETS = {
    "256m": Shape(512, 16, 4, 12, 768, 12, 3072, 30, 576, 9, 3, 1536, 49280),
    "2b": Shape(378, 14, 3, 27, 1152, 16, 4304, 24, 2048, 32, 32, 8192, 49280),
    "tiny": Shape(64, 16, 2, 2, 32, 2, 64, 2, 48, 3, 1, 96, 1024),
}


def build_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of exactly `vocabulary` entries: it knows the prompt's words, the rest is filler that only
    sampling finds.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([f"User:{PROMPT}\nAssistant:", PROMPT], trainer)
    state = json.loads(bpe.to_str())
    words = state["model"]["vocab"]
    if len(words) > vocabulary:
        raise ValueError(f"a byte-level vocabulary needs at least {len(words)} entries, not {vocabulary}")
    words |= {f"Ġfiller{i}": i for i in range(len(words), vocabulary)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        bos_token=BOS, eos_token=EOS, pad_token=PAD, padding_side="left", additional_special_tokens=list(SPECIAL[3:]),
    )  # fmt: skip


def build_processor(shape: Shape) -> Idefics3Processor:
    side = {"longest_edge": shape.picture_side}
    pictures = Idefics3ImageProcessorPil(do_image_splitting=False, size=side, max_image_size=side)
    return Idefics3Processor(
        pictures, build_tokenizer(shape.vocabulary), image_seq_len=shape.picture_tokens, chat_template=TEMPLATE
    )


def build_config(shape: Shape, tokenizer: PreTrainedTokenizerFast) -> Idefics3Config:
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {
        "hidden_size": shape.vision_width, "intermediate_size": shape.vision_mlp, "image_size": shape.picture_side,
        "num_hidden_layers": shape.vision_layers, "num_attention_heads": shape.vision_heads, "patch_size": shape.patch,
    }  # fmt: skip
    text = {
        "model_type": "llama", "vocab_size": shape.vocabulary, "hidden_size": shape.width,
        "intermediate_size": shape.mlp, "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0}, "tie_word_embeddings": True, **ids,
    }  # fmt: skip
    return Idefics3Config(
        vision_config=vision, text_config=text, scale_factor=shape.scale, tie_word_embeddings=True,
        image_token_id=tokenizer.convert_tokens_to_ids(PICTURE), **ids,
    )  # fmt: skip


def build(shape: Shape, folder: Path, seed: int = 0) -> Path:
    """The checkpoint's folder under `folder`, built in bfloat16 unless it is there."""
    name = hashlib.sha256(json.dumps([asdict(shape), TEMPLATE, seed]).encode()).hexdigest()[:12]
    target = folder / f"idefics3-{name}"
    if target.is_dir():
        return target
    processor = build_processor(shape)
    torch.manual_seed(seed)
    config = build_config(shape, processor.tokenizer)
    model = Idefics3ForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    model.generation_config.update(
        pad_token_id=config.text_config.pad_token_id,
        bos_token_id=config.text_config.bos_token_id,
        eos_token_id=config.text_config.eos_token_id,
    )
    partial = target.with_suffix(".partial")  # a build that is killed must not pass for a checkpoint
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    partial.rename(target)
    return target


def prompt_tokens(processor: Any, side: int) -> int:
    """Length of the benchmark's prompt, its picture included."""
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    picture = Image.new("RGB", (side, side), (127, 0, 0))
    return len(processor(text=[text], images=[picture], add_special_tokens=False)["input_ids"][0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="256m")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"), help="where checkpoints are kept")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    print(build(PRESETS[arguments.preset], arguments.folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
