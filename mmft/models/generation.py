"""Sampling and greedy decoding, in batches of prompts, with placeholder tokens banned."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from mmft.functional.masked import response_mask
from mmft.models.policy import Policy, eos_ids, picture_token_ids
from mmft.models.prompts import Prompt, PromptBuilder, pad_prompts
from mmft.types import Row


@torch.no_grad()
def generate(
    model: Any, prompts: Sequence[Prompt], config: GenerationConfig, pad_id: int, batch: int, scores: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Responses of all prompts, (B, T) right-padded with `pad_id`, and if `scores` the log-probabilities they were
    drawn with.

    Prompts are left-padded, in chunks of `batch` rows, so that every row's next token follows its own last one.
    """
    config = copy.deepcopy(config)
    config.update(return_dict_in_generate=True, output_scores=scores)
    responses, logprobs = [], []
    for start in range(0, len(prompts), batch):
        inputs = pad_prompts(prompts[start : start + batch], pad_id, "left")
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        width = inputs["input_ids"].shape[1]
        # A copy: some models write into what they are given.
        output = model.generate(**inputs | {"input_ids": inputs["input_ids"].clone()}, generation_config=config)
        tokens = output.sequences[:, width:]
        responses.append(tokens)
        if scores:
            steps = [s.float().log_softmax(-1).gather(1, tokens[:, t : t + 1]) for t, s in enumerate(output.scores)]
            logprobs.append(torch.cat(steps, 1))
    longest = max(r.shape[1] for r in responses)
    stacked = torch.cat([_widen(r, longest, pad_id) for r in responses])
    return stacked, torch.cat([_widen(p, longest, 0) for p in logprobs]) if scores else None


def _widen(tensor: Tensor, width: int, value: float) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]), value=value)


@contextmanager
def evaluating(model: Any):
    """Evaluation mode inside, whatever mode it was outside."""
    was_training = model.training
    model.eval()
    try:
        yield model
    finally:
        model.train(was_training)


def decode(tokenizer: Any, responses_BT: Tensor, mask_BT: Tensor) -> list[str]:
    """Texts of the kept tokens, special tokens dropped, ends trimmed."""
    kept = [row[keep].tolist() for row, keep in zip(responses_BT, mask_BT, strict=True)]
    return [text.strip() for text in tokenizer.batch_decode(kept, skip_special_tokens=True)]


def prefixes_of(tokenizer: Any, responses_BT: Tensor, mask_BT: Tensor) -> list[list[str]]:
    """The text before each token t = 0 .. T-1 of each response; after its end, the whole of it."""
    width = responses_BT.shape[1]
    cut = [row[keep][:t].tolist() for row, keep in zip(responses_BT, mask_BT, strict=True) for t in range(width)]
    texts = [text.strip() for text in tokenizer.batch_decode(cut, skip_special_tokens=True)]
    return [texts[start : start + width] for start in range(0, len(texts), width)]


def caption(policy: Policy, rows: Sequence[Row], max_new_tokens: int, batch: int = 64) -> tuple[list[str], list[bool]]:
    """Greedy captions of rows, and which of them ended by themselves."""
    builder = PromptBuilder(policy.processor)
    stops = eos_ids(policy.model, policy.processor)
    banned = picture_token_ids(policy.model, policy.processor)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=list(stops) or None,
        pad_token_id=builder.pad_id,
        suppress_tokens=banned or None,
    )
    captions, finished = [], []
    with evaluating(policy.model):
        for start in range(0, len(rows), batch):
            prompts = [builder(row) for row in (rows[i] for i in range(start, min(start + batch, len(rows))))]
            responses, _ = generate(policy.model, prompts, config, builder.pad_id, batch)
            mask = response_mask(responses, stops, builder.pad_id)
            captions += decode(builder.tokenizer, responses, mask)
            finished += torch.isin(responses, torch.tensor(stops, device=responses.device)).any(1).tolist()
    return captions, finished
