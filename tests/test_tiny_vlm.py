"""The bundled model really sees, is an ordinary checkpoint, and leaves room that learning can find."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmft.config import ModelConfig
from mmft.data.scenes import EmojiScenes, score_caption
from mmft.models.decoding import Sampling, sample_responses
from mmft.models.generation import caption, decode
from mmft.models.interface import Interface
from mmft.models.policy import Policy, eos_ids

FOLDER = ModelConfig().resolved_path()


@pytest.fixture(scope="module")
def policy() -> Policy:
    """Loaded as any checkpoint is, by transformers alone."""
    model = AutoModelForImageTextToText.from_pretrained(FOLDER, dtype=torch.float32)
    return Policy(model.eval(), AutoProcessor.from_pretrained(FOLDER))


@pytest.fixture(scope="module")
def rows() -> list:
    scenes = EmojiScenes(128, "heldout")
    return [scenes[i] for i in range(len(scenes))]


def mean(captions: list[str], rows: list, name: str) -> float:
    return float(np.nanmean([score_caption(text, row.scene)[name] for text, row in zip(captions, rows, strict=True)]))


@pytest.mark.slow  # of a file that does not change
def test_it_sees_and_leaves_objects_out(policy: Policy, rows: list) -> None:
    captions, finished = caption(policy, rows, max_new_tokens=32)
    assert mean(captions, rows, "object_precision") >= 0.80
    recall = mean(captions, rows, "object_recall")
    assert recall >= 0.55
    assert all(finished)
    moved = captions[1:] + captions[:1]
    assert mean(moved, rows, "object_precision") < 0.15, "captions that fit any picture come from no picture"

    few = rows[:48]
    best = [0.0] * len(few)
    torch.manual_seed(0)
    for _ in range(16):
        for i, text in enumerate(sampled(policy, few)):
            best[i] = max(best[i], score_caption(text, few[i].scene)["object_recall"])
    assert np.mean(best) >= mean(captions[:48], few, "object_recall") + 0.15


def sampled(policy: Policy, rows: list) -> list[str]:
    interface = Interface(policy.model, policy.processor)
    prompts = [interface.builder(row) for row in rows]
    sampling = Sampling(32, stops=eos_ids(policy.model, policy.processor), as_transformers=True)
    responses, mask, _ = sample_responses(interface, prompts, sampling, len(rows))
    return decode(interface.builder.tokenizer, responses, mask)


def test_it_is_small_enough_to_bundle() -> None:
    assert sum(file.stat().st_size for file in Path(FOLDER).iterdir()) <= 12e6
