"""How much memory a learned reward model takes, counted from its configs."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from mmft.config import resolve
from mmft.models.fake_tensors import size_of
from mmft.models.footprint import layer_count
from mmft.models.reward import CaptionRewardConfig, CaptionRewardModel, load_reward_config


def reward_footprint(path: str, captions: int, group: int, prompt: int, new: int) -> tuple[int, int]:
    """Bytes of a learned reward model: its weights with those of its towers, and what reading captions takes.

    captions: of `new` tokens, `group` of them about one picture, after prompts of `prompt` tokens.
    """
    config = load_reward_config(path)
    with torch.device("meta"):
        network = sum(size_of(p) for p in CaptionRewardModel(config).parameters())
    if config.fusion is None:
        return network, 0
    text, vision = (_tower(config, resolve(path), name) for name in ("text", "vision"))
    towers = {id(tower): tower for tower in ((text,) if config.text == config.vision else (text, vision))}
    weights = network + sum(size_of(p) for tower in towers.values() for p in tower.parameters())
    if not config.grounded:
        return weights, 0
    # `GroundedTextTower`: every layer's states; logits in the tower's type and twice in float32; 32 pictures at once
    pictures, sizes = min(32, math.ceil(captions / group)), text.config.get_text_config(decoder=True)
    read, states = min(captions, pictures * group) * (new + 1), (layer_count(sizes) + 1) * sizes.hidden_size
    size = text.dtype.itemsize
    working = read * (sizes.vocab_size * (2 * size + 8) + states * size) + pictures * prompt * states * size
    return weights, working


def _tower(config: CaptionRewardConfig, root: str, name: str) -> Any:
    """A frozen tower of the reward model at `root`, "text" or "vision", on the meta device."""
    kind: Any = AutoModelForImageTextToText if name == "text" and config.grounded else AutoModel
    path = getattr(config, name)
    if path in ("text_tower", "vision_tower"):  # saved with the model
        loaded = AutoConfig.from_pretrained(root, subfolder=path)
    else:
        loaded = AutoConfig.from_pretrained(resolve(path))
    with torch.device("meta"):
        return kind.from_config(loaded, dtype=getattr(torch, config.tower_dtype))
