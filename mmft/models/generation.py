"""Sampling and greedy decoding, in batches of prompts, with placeholder tokens banned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmft.models.decoding import Sampling, sample_responses
from mmft.models.interface import Interface, evaluating
from mmft.models.policy import Policy, eos_ids, picture_token_ids
from mmft.models.selfcheck import check
from mmft.types import Row


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


def caption(
    policy: Policy, rows: Sequence[Row], max_new_tokens: int, batch: int = 64, interface: Interface | None = None
) -> tuple[list[str], list[bool]]:
    """Greedy captions of rows, and which of them ended by themselves."""
    interface = interface or Interface(policy.model, policy.processor, trains=False)
    builder, stops = interface.builder, eos_ids(policy.model, policy.processor)
    banned = picture_token_ids(policy.model, policy.processor)
    sampling = Sampling(max_new_tokens, greedy=True, stops=tuple(stops), banned=tuple(banned))
    captions, finished = [], []
    with evaluating(policy.model):
        for start in range(0, len(rows), batch):
            prompts = [builder(row) for row in (rows[i] for i in range(start, min(start + batch, len(rows))))]
            check(interface, prompts)
            responses, mask, _ = sample_responses(interface, prompts, sampling, batch)
            captions += decode(builder.tokenizer, responses, mask)
            finished += ended(responses, mask, stops).tolist()
    return captions, finished


def ended(responses_BT: Tensor, mask_BT: Tensor, stops: Sequence[int]) -> Tensor:
    """Which responses hold a token that ends them, (B) bool."""
    return (torch.isin(responses_BT, torch.tensor(list(stops), device=responses_BT.device)) & mask_BT).any(1)
