"""Build mmft/assets/tiny-vlm: the bundled vision-language model, pretrained on EmojiScenes from nothing.

    python scripts/build_tiny_vlm.py --out mmft/assets/tiny-vlm            # about 45 minutes on two CPU cores
    python scripts/build_tiny_vlm.py --out /tmp/vlm --tower-steps 20 --steps 20   # does the script run?

An ordinary Llava checkpoint: SigLIP-style tower (5 x 192, 96 px, patch 12), Llama (4 x 256), a byte-level BPE
tokenizer of its own. Two stages, both on fresh scenes at every step:

1. the tower alone learns which object covers each patch (a linear head, thrown away afterwards): dense labels teach
   it to see in a fraction of the time that captions need;
2. the whole model learns the noisy captions of `scene_text.noisy_caption` (four a picture, packed) and, one in six, a
   question; the patch head stays on with a small weight.

The captions are right but terse, so greedy decoding leaves objects out that the model does see: room for
reinforcement learning. Writes the checkpoint in bfloat16, training_log.jsonl (a line every 50 steps) and quality.json
(the held-out figures).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional as F
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from mmft.data import scene_text
from mmft.data.scenes import SIDE, EmojiScenes, Scene, make_scene, render, score_caption, sprites

PATCH = 12
GRID = SIDE // PATCH
PROMPT = "Describe the picture."
CAPTIONS = 4  # captions a picture and step
TEXT = 96  # packed text positions behind a picture
TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
)


def build_processor() -> LlavaProcessor:
    """A byte-level BPE (no unknown words) trained on what scenes say, and a PIL picture processor."""
    corpus = []
    for index in range(6000):
        scene = make_scene(index)
        rng = random.Random(index)
        question, answer = scene_text.question(scene, rng)
        corpus += [
            *scene_text.references(scene, rng),
            scene_text.noisy_caption(scene, rng),
            PROMPT,
            f"{question}\n{answer}",
        ]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<image>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        corpus,
        trainers.BpeTrainer(vocab_size=1024, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left",
        extra_special_tokens={"image_token": "<image>"}, model_max_length=512, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    pictures = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    return LlavaProcessor(
        pictures, tokenizer, patch_size=PATCH, vision_feature_select_strategy="full", chat_template=TEMPLATE
    )


def build_model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    tokenizer = processor.tokenizer
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = SiglipVisionConfig(
        hidden_size=192, intermediate_size=768, num_hidden_layers=5, num_attention_heads=3, image_size=SIDE,
        patch_size=PATCH, vision_use_head=False,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True, **ids,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1, vision_feature_select_strategy="full", image_seq_length=GRID * GRID,
        tie_word_embeddings=True, **ids,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.generation_config.update(**ids)
    return model


class Scenes:
    """Fresh training scenes as tensors: pictures, patch labels, token rows."""

    def __init__(self, processor: LlavaProcessor, seed: int):
        self.tokenizer, self.rng, self.next = processor.tokenizer, random.Random(seed), 0
        self.prompt = self.encode(PROMPT + "\n")

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def scenes(self, count: int) -> list[Scene]:
        self.next += count
        # Far beyond the indices that the data set's users draw from.
        return [make_scene(10_000_000 + i) for i in range(self.next - count, self.next)]

    def row(self, scene: Scene) -> tuple[list[int], list[int]]:
        """(tokens before the answer, answer tokens)."""
        if self.rng.random() < 1 / 6:
            question, answer = scene_text.question(scene, self.rng)
            return self.encode(question + "\n"), [*self.encode(answer), self.tokenizer.eos_token_id]
        caption = scene_text.noisy_caption(scene, self.rng)
        return self.prompt, [*self.encode(caption), self.tokenizer.eos_token_id]

    def text(self, scenes: list[Scene]) -> dict[str, torch.Tensor]:
        """CAPTIONS rows of text a scene, packed behind one picture, TEXT positions together.

        Each segment sees the picture and itself, never another segment, at the positions it would have alone.
        labels[i, t] is the token that position t should predict, -100 where nothing is to be learned.
        """
        size = (len(scenes), TEXT)
        tokens, labels = torch.full(size, self.tokenizer.pad_token_id), torch.full(size, -100)
        positions, segment = torch.zeros(size, dtype=torch.long), torch.full(size, -1)
        for i, scene in enumerate(scenes):
            at = 0
            for k in range(CAPTIONS):
                before, answer = self.row(scene)
                row, end = before + answer, at + len(before) + len(answer)
                if end > TEXT:
                    break
                tokens[i, at:end] = torch.tensor(row)
                labels[i, at + len(before) - 1 : end - 1] = torch.tensor(answer)
                positions[i, at:end] = torch.arange(len(row)) + GRID * GRID
                segment[i, at:end] = k
                at = end
        same = (segment[:, :, None] == segment[:, None, :]).tril()
        return {"tokens": tokens, "labels": labels, "positions": positions, "same": same}


def attention_mask(same: torch.Tensor) -> torch.Tensor:
    """Additive mask (scenes, 1, L, L) over [picture | packed text] from the text's own block mask."""
    pictures, count = GRID * GRID, len(same)
    keep = torch.zeros(count, 1, pictures + TEXT, pictures + TEXT, dtype=torch.bool)
    keep[:, :, :, :pictures] = True
    keep[:, :, :pictures] = torch.ones(pictures, pictures + TEXT, dtype=torch.bool).tril()
    keep[:, 0, pictures:, pictures:] = same
    return torch.zeros(keep.shape).masked_fill(~keep, -1e9)


def pixels(scenes: list[Scene]) -> torch.Tensor:
    """What the picture processor makes of these pictures (scaled to -1..1), without its per-picture cost."""
    stack = torch.from_numpy(np.stack([np.asarray(render(scene)) for scene in scenes]))
    return stack.permute(0, 3, 1, 2).float() / 127.5 - 1


def patch_labels(scenes: list[Scene]) -> torch.Tensor:
    """Which sprite covers the middle of each patch: 0 = background, 1 + cell otherwise. Shape (scenes, GRID * GRID)."""
    labels = torch.zeros(len(scenes), GRID, GRID, dtype=torch.long)
    centre = (torch.arange(GRID) + 0.5) * PATCH
    for i, scene in enumerate(scenes):
        for obj in scene.objects:
            for x, y, side in obj.boxes:
                across = (centre > x - 2) & (centre < x + side + 2)
                down = (centre > y - 2) & (centre < y + side + 2)
                labels[i][down[:, None] & across[None, :]] = obj.sprite.cell + 1
    return labels.flatten(1)


def learning_rate(step: int, total: int, peak: float) -> float:
    warm = min(1.0, (step + 1) / 100)
    return peak * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / total)))


def train(parameters, loss_of, steps: int, peak: float, stage: str, log, save=lambda: None) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), weight_decay=0.05)
    start, running = time.time(), {}
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        with torch.autocast("cpu", torch.bfloat16):
            parts = loss_of()
        sum(parts.values()).backward()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        if not torch.isfinite(norm):
            raise SystemExit(f"{stage} step {step}: the gradient is not finite")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for name, value in parts.items():
            running.setdefault(name, []).append(value.item())
        if (step + 1) % 50 == 0 or step + 1 == steps:
            means = {name: round(sum(v) / len(v), 4) for name, v in running.items()}
            line = {"stage": stage, "step": step + 1, **means, "seconds": round(time.time() - start, 1)}
            print(json.dumps(line), flush=True)
            log.write(json.dumps(line) + "\n")
            log.flush()
            running = {}
        if (step + 1) % 1000 == 0:
            save()  # a build that is cut short leaves something to use


@torch.no_grad()
def caption(model, processor, scenes: list[Scene], sample: bool = False) -> list[str]:
    texts, out = ["<image>" + PROMPT + "\n"], []
    for i in range(0, len(scenes), 128):
        pictures = [render(scene) for scene in scenes[i : i + 128]]
        inputs = processor(images=pictures, text=texts * len(pictures), return_tensors="pt", padding=True)
        tokens = model.generate(**inputs, max_new_tokens=40, do_sample=sample, top_k=0)
        out += processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in out]


def quality(model, processor, count: int) -> dict[str, float]:
    """Held-out figures: greedy, with shuffled pictures, and the best of 16 samples by recall."""
    model.eval()
    scenes = [row.scene for row in EmojiScenes(count, "heldout")]
    greedy = caption(model, processor, scenes)
    for scene, text in list(zip(scenes, greedy, strict=True))[:12]:
        print(f"  {scene_text.full(scene, scene.objects)}  ->  {text}")
    figures = {f"greedy_{k}": v for k, v in mean_scores(greedy, scenes).items()}
    figures |= {f"shuffled_{k}": v for k, v in mean_scores(greedy[1:] + greedy[:1], scenes).items()}
    draws = [caption(model, processor, scenes, sample=True) for _ in range(16)]
    figures |= {f"sample_{k}": v for k, v in mean_scores(draws[0], scenes).items()}
    best = [max(score_caption(d[i], s)["object_recall"] for d in draws) for i, s in enumerate(scenes)]
    figures["best_of_16_object_recall"] = float(np.mean(best))
    return {k: round(v, 4) for k, v in figures.items()}


def mean_scores(captions: list[str], scenes: list[Scene]) -> dict[str, float]:
    scores = [score_caption(text, scene) for text, scene in zip(captions, scenes, strict=True)]
    return {name: float(np.nanmean([s[name] for s in scores])) for name in scores[0]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("mmft/assets/tiny-vlm"))
    parser.add_argument("--tower-steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--pictures", type=int, default=64, help="pictures a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 = torch's own choice")
    parser.add_argument("--scenes", type=int, default=512, help="held-out scenes for the final figures")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    processor = build_processor()
    model = build_model(processor)
    data = Scenes(processor, args.seed)
    patch_head = nn.Linear(model.config.vision_config.hidden_size, len(sprites()) + 1)
    count = sum(p.numel() for p in model.parameters())
    print(f"{count / 1e6:.2f}M parameters, {len(processor.tokenizer)} tokens, {CAPTIONS} captions a picture")
    args.out.mkdir(parents=True, exist_ok=True)
    # Eager attention compiles into something twice as fast as the CPU's own kernels at these sizes.
    model.set_attn_implementation("eager")
    tower, language = model.model.vision_tower, model.model.language_model
    tower.compile()
    language.compile()

    def see(scenes):
        hidden = tower(pixels(scenes)).last_hidden_state
        logits = patch_head(hidden).flatten(0, 1).float()
        return hidden, F.cross_entropy(logits, patch_labels(scenes).flatten())

    def tower_loss():
        return {"patch": see(data.scenes(2 * args.pictures))[1]}

    def full_loss():
        scenes = data.scenes(args.pictures)
        hidden, patch = see(scenes)
        text = data.text(scenes)
        features = model.model.multi_modal_projector(hidden)
        embeds = torch.cat([features, model.get_input_embeddings()(text["tokens"])], 1)
        positions = torch.cat([torch.arange(features.shape[1]).expand(len(scenes), -1), text["positions"]], 1)
        states = language(
            inputs_embeds=embeds, attention_mask=attention_mask(text["same"]), position_ids=positions, use_cache=False
        ).last_hidden_state[:, features.shape[1] :]
        keep = text["labels"] != -100
        logits = model.lm_head(states[keep]).float()
        return {"caption": F.cross_entropy(logits, text["labels"][keep]), "patch": 0.3 * patch}

    def save():
        state = {k: v.to(torch.bfloat16) for k, v in model.state_dict().items()}
        model.save_pretrained(args.out, state_dict=state)
        processor.save_pretrained(args.out)

    with open(args.out / "training_log.jsonl", "w", encoding="utf-8") as log:
        stage1 = [*tower.parameters(), *patch_head.parameters()]
        train(stage1, tower_loss, args.tower_steps, 1e-3, "tower", log)
        stage2 = [*model.parameters(), *patch_head.parameters()]
        train(stage2, full_loss, args.steps, 1e-3, "captions", log, save)

    model.to(torch.bfloat16)
    save()
    # What is judged is what is shipped: loaded again, in float32, uncompiled.
    model = LlavaForConditionalGeneration.from_pretrained(args.out, dtype=torch.float32)
    figures = quality(model, processor, args.scenes)
    print(json.dumps(figures, indent=1))
    (args.out / "quality.json").write_text(
        json.dumps({"seed": args.seed, "scenes": args.scenes, **figures}, indent=1) + "\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
