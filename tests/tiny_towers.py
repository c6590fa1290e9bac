"""Small untrained towers and reward models: their own words and picture size, other than `tiny.vision_policy`'s."""

from __future__ import annotations

import random
from functools import lru_cache
from pathlib import Path
from typing import Any

import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipProcessor,
    SiglipVisionConfig,
)

from mmft.config import RewardRecipe, resolve
from mmft.data import scene_text
from mmft.data.annotators import Taste
from mmft.data.candidates import candidate
from mmft.data.scenes import make_scene, render, sprites
from mmft.models.features import FeatureStore
from mmft.models.reward import (
    CaptionRewardConfig,
    CaptionRewardModel,
    CaptionRewardProcessor,
    load_towers,
    tower_dims,
)
from mmft.rewards.judgements import Judgement, Picture, Preference, Rating
from mmft.train.reward import TrainingSet, add_features

SIDE, PATCH = 32, 8  # the policies of tiny.py see 96 pixels
PROMPT = "what is there ?"
FUSIONS = ("sum", "weighted_sum", "attention", "cross_attention", "shared_attention", "coupled")
LOSSES = ("bradley_terry", "mse", "aleatoric")
SPECIAL = ["<pad>", "<eos>", "<image>", "<unk>", "[CLS]", "[SEP]"]
PAD, EOS, IMAGE = 0, 1, 2


@lru_cache(maxsize=1)
def words() -> list[str]:
    """Whole words, where the bundled model's tokenizer has pieces of them."""
    names = [word for sprite in sprites() for word in (sprite.name, sprite.plural)]
    said = "a an some no the and on in at with next to above background picture left right middle top bottom , ? what"
    plain = [*said.split(), *scene_text.SIZES, *scene_text.NUMBERS.values(), *scene_text.COLOURS]
    return list(dict.fromkeys([*SPECIAL, *plain, "is", "there", *names]))


def word_tokenizer(sentence: bool = False) -> PreTrainedTokenizerFast:
    """Words and punctuation. sentence: as a sentence encoder has it, [CLS] before and [SEP] after."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words())}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "model_max_length": 256}
    if sentence:
        ends = [(name, SPECIAL.index(name)) for name in ("[CLS]", "[SEP]")]
        backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
        return PreTrainedTokenizerFast(tokenizer_object=backend, cls_token="[CLS]", sep_token="[SEP]", **names)
    image = {"extra_special_tokens": {"image_token": "<image>"}}
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", **names, **image)


def image_processor() -> SiglipImageProcessorPil:
    return SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})


def processor() -> LlavaProcessor:
    return LlavaProcessor(image_processor(), word_tokenizer(), patch_size=PATCH, vision_feature_select_strategy="full")


def llava(seed: int = 0) -> LlavaForConditionalGeneration:
    """Reads 32-pixel pictures as 16 tokens; its log-probabilities depend strongly on picture and words."""
    torch.manual_seed(seed)
    ids = {"pad_token_id": PAD, "bos_token_id": None, "eos_token_id": EOS}
    vision = SiglipVisionConfig(**sides(16), image_size=SIDE, patch_size=PATCH, vision_use_head=False)
    config = LlavaConfig(
        vision_config=vision, text_config=tiny.llama_config(vocab_size=len(words()), **ids), image_seq_length=16,
        image_token_index=IMAGE, vision_feature_layer=-1, vision_feature_select_strategy="full", **ids,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for part, std in ((model.lm_head, 0.3), (model.model.multi_modal_projector, 0.3)):
            for weight in part.parameters():
                weight.normal_(std=std)
    return model.eval()


def sides(hidden: int) -> dict[str, int]:
    return {
        "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": 1, "num_attention_heads": 2,
    }  # fmt: skip


def bert(seed: int = 0) -> BertModel:
    """A sentence encoder."""
    torch.manual_seed(seed)
    config = BertConfig(**sides(20), vocab_size=len(words()), max_position_embeddings=48, pad_token_id=PAD)
    return BertModel(config).eval()


def clip(seed: int = 0) -> CLIPModel:
    """Two towers of different sizes; the vision tower adds a class token to 16 patches."""
    torch.manual_seed(seed)
    ids = {"bos_token_id": SPECIAL.index("[CLS]"), "eos_token_id": EOS, "pad_token_id": PAD}
    text = {**sides(12), "vocab_size": len(words()), "max_position_embeddings": 32, **ids}
    vision = {**sides(24), "image_size": SIDE, "patch_size": PATCH}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()


def siglip(seed: int = 0, text_width: int = 12) -> SiglipModel:
    torch.manual_seed(seed)
    text = {
        **sides(text_width),
        "vocab_size": len(words()),
        "max_position_embeddings": 32,
        "projection_size": text_width,
    }
    ids = {"bos_token_id": SPECIAL.index("[CLS]"), "eos_token_id": EOS, "pad_token_id": PAD}
    return SiglipModel(
        SiglipConfig(text_config=text | ids, vision_config={**sides(24), "image_size": SIDE, "patch_size": PATCH})
    ).eval()


def two_towers(kind: str, folder: Path) -> Path:
    """A checkpoint of `clip` or `siglip` with a processor, whose texts end in EOS."""
    tokenizer = word_tokenizer()
    ends = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", EOS)])
    tokenizer.backend_tokenizer.post_processor, tokenizer.model_max_length = ends, 32
    model, joined = (clip(), CLIPProcessor) if kind == "clip" else (siglip(text_width=24), SiglipProcessor)
    return Path(saved(model, joined(image_processor(), tokenizer), folder))


def saved(model: PreTrainedModel, own: Any, folder: Path) -> str:
    """The folder of a checkpoint with its processor or tokenizer."""
    model.save_pretrained(folder)
    own.save_pretrained(folder)
    return str(folder)


# Judgements of a few pictures, and reward models over small towers.


def judgements(loss: str, pictures: int = 12, first: int = 0, flip: bool = False) -> list[Judgement]:
    """Six captions of each scene, by their true utility: three pairs, or six ratings. flip: the other way round."""
    kinds = ("true", "wrong_noun", "generic", "negation", "noun_list", "other_picture")
    found: list[Judgement] = []
    for index in range(first, first + pictures):
        scene = make_scene(index)
        rng = random.Random(index)
        picture = Picture.of(render(scene))
        captions = [candidate(kind, scene, rng) or "a picture" for kind in kinds]
        worth = [Taste().utility(caption, scene) * (-1 if flip else 1) for caption in captions]
        if loss != "bradley_terry":
            said = zip(captions, worth, strict=True)
            found += [Rating(picture=picture, prompt=PROMPT, caption=text, rating=value) for text, value in said]
            continue
        for wrong in (1, 2, 3):
            pair = sorted((0, wrong), key=lambda k: -worth[k])
            chosen, rejected = (captions[k] for k in pair)
            found.append(Preference(picture=picture, prompt=PROMPT, chosen=chosen, rejected=rejected))
    return found


def reward_model(path: str, fusion: str, loss: str, seed: int = 0, **changes: Any) -> CaptionRewardModel:
    """A fresh reward model over the checkpoint `path`; in float32, so that features are exact."""
    sizes = {"hidden": 16, "layers": 1, "heads": 2, "dropout": 0.1, "mc_samples": 4, "image_tokens": 4}
    config = CaptionRewardConfig(
        **{"vision": path, "text": path, "grounded": True, "tower_dtype": "float32", **sizes, **changes},
        fusion=fusion, loss=loss,
    )  # fmt: skip
    own = CaptionRewardProcessor.of_towers(resolve(config.vision), resolve(config.text), config.grounded)
    towers = load_towers(config, "")
    config.vision_dim, config.text_dim = tower_dims(config, towers, own)
    torch.manual_seed(seed)
    model = CaptionRewardModel(config)
    model.attach(own, towers)
    return model


def recipe(loss: str, **train: Any) -> RewardRecipe:
    settings = {"steps": 30, "batch": 16, "lr": 3e-3, "warmup": 2, "every": 10, "device": "cpu"}
    return RewardRecipe.model_validate({"loss": loss, "train": settings | train})


def training_sets(
    model: CaptionRewardModel, *parts: list[Judgement], store: FeatureStore | None = None
) -> tuple[FeatureStore, list[TrainingSet]]:
    """The features of judgements, and each part as a training set; ratings standardised by those of the first."""
    store = store or FeatureStore(model.encode)
    for items in parts:
        add_features(store, items)
    ratings = torch.tensor([item.rating for item in parts[0] if isinstance(item, Rating)])
    if len(ratings):
        model.config.target_mean, model.config.target_std = ratings.mean().item(), ratings.std().item()
    config = model.config
    return store, [TrainingSet.of(items, store, config.target_mean, config.target_std) for items in parts]
