"""Small untrained models, data and rewards that many tests share: fp32, built from configs in moments."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

from mmft.config import ModelConfig
from mmft.data.scenes import EmojiScenes
from mmft.models.policy import Policy, lora_targets
from mmft.train.ppo import VisionPPOTrainer
from mmft.train.ppo_config import VisionPPOConfig
from mmft.types import RewardOutput, Row

WORDS = ["<pad>", "<eos>", *"abcdefghijklmnop"]
PAD, EOS = 0, 1
IMPOSSIBLE = -1e4  # a logit bias under which a softmax gives exactly 0


def tokenizer() -> PreTrainedTokenizerFast:
    """Single letters; pads on the left."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def llama_config(**changes: Any) -> LlamaConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None}
    return LlamaConfig(**{"vocab_size": len(WORDS), "max_position_embeddings": 512, **sizes, **ids, **changes})


def text_policy(eos_bias: float = 0.0, seed: int = 0) -> LlamaForCausalLM:
    """A random Llama whose output layer has a bias: padding is never sampled, EOS as likely as asked."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(llama_config())
    head = torch.nn.Linear(32, len(WORDS))
    torch.nn.init.normal_(head.weight, std=0.3)
    torch.nn.init.zeros_(head.bias)
    with torch.no_grad():
        head.bias[PAD], head.bias[EOS] = IMPOSSIBLE, eos_bias
    model.lm_head = head
    return model.eval()


def classifier(seed: int) -> LlamaForSequenceClassification:
    """TRL's kind of reward or value model, with outputs large enough to matter."""
    torch.manual_seed(seed)
    model = LlamaForSequenceClassification(llama_config(num_labels=1))
    torch.nn.init.normal_(model.score.weight, std=0.2)
    return model.eval()


@lru_cache(maxsize=1)
def processor() -> Any:
    """The bundled model's."""
    return AutoProcessor.from_pretrained(ModelConfig().resolved_path())


def llava(seed: int = 0, eos_bias: float = 0.0) -> LlavaForConditionalGeneration:
    """A random Llava of the bundled model's kind, whose logits depend strongly on the picture."""
    torch.manual_seed(seed)
    words = processor().tokenizer
    ids = {"pad_token_id": words.pad_token_id, "bos_token_id": None, "eos_token_id": words.eos_token_id}
    vision = SiglipVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=96, patch_size=12,
        vision_use_head=False,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=llama_config(vocab_size=len(words), **ids), image_seq_length=64,
        image_token_index=words.convert_tokens_to_ids("<image>"), vision_feature_layer=-1,
        vision_feature_select_strategy="full", **ids,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.generation_config.update(**ids)
    head = torch.nn.Linear(32, len(words))
    torch.nn.init.normal_(head.weight, std=0.1)
    torch.nn.init.zeros_(head.bias)
    with torch.no_grad():
        head.bias[words.eos_token_id] = eos_bias
        for weight in model.model.multi_modal_projector.parameters():
            weight.normal_(std=0.3)
    model.lm_head = head
    return model.eval()


def with_lora(model: Any, targets: Any = "language", r: int = 4) -> Any:
    model.requires_grad_(False)
    names = lora_targets(model, targets)
    return get_peft_model(model, LoraConfig(r=r, lora_alpha=2 * r, target_modules=names))


def vision_policy(seed: int = 0, eos_bias: float = 0.0) -> Policy:
    return Policy(with_lora(llava(seed, eos_bias)), processor())


def stirred(module: torch.nn.Module, std: float, seed: int = 1) -> torch.nn.Module:
    """The module with every weight drawn anew: heads and adapters start at 0, which hides what depends on them."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=std, generator=generator)
    return module


def answers(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """(rows, tokens) ordinary tokens of the bundled tokenizer: no placeholder, no end."""
    words = processor().tokenizer
    special = {*words.all_special_ids, words.convert_tokens_to_ids("<image>")}
    ordinary = torch.tensor([i for i in range(60) if i not in special])
    generator = torch.Generator().manual_seed(seed)
    return ordinary[torch.randint(len(ordinary), (rows, tokens), generator=generator)]


def rows(count: int = 8) -> list[Row]:
    """Scenes asked in prompts of different lengths."""
    scenes = EmojiScenes(count)
    asked = ["Describe.", "Describe the picture.", "What is on the left of the big picture?"]
    return [Row(scene.id, scene.image, asked[i % 3], scene.references) for i, scene in enumerate(scenes)]


def letters_reward(captions: list[str], rows: list[Row], finished: list[bool]) -> RewardOutput:
    """Something to learn that any caption has: its share of the letter e, and one reward in two for a vowel start."""
    raw = [text.count("e") / (1 + len(text)) + (text[:1] in "aeiou") for text in captions]
    return RewardOutput(raw, {"letters": raw}, {"letters": raw}, {"letters": raw})


def trainer(policy: Policy, folder: Path, data: list[Row] | None = None, **changes: Any) -> VisionPPOTrainer:
    """A trainer of one micro-batch a minibatch, 8 rows a step, on CPU."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_mini_batches": 2, "num_ppo_epochs": 2,
        "total_episodes": 8, "response_length": 6, "learning_rate": 1e-3, "schedule": "constant", "seed": 0,
    }  # fmt: skip
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "logging_steps": 1}
    reward = changes.pop("reward", letters_reward)
    args = VisionPPOConfig(output_dir=str(folder), **quiet, **settings | changes)
    data = rows(args.per_device_train_batch_size * args.gradient_accumulation_steps) if data is None else data
    return VisionPPOTrainer(args, policy.processor, policy.model, reward_model=reward, train_dataset=data)


def logs_of(trainer: Any) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "objective/scores" in entry]
