"""One forward pass that gives log-probabilities, entropy and values of sampled responses.

Rows are repacked to [prompt | response | padding], right-padded, which every decoder reads alike. A pre-hook on the
output embedding keeps only the hidden states that predict response tokens: the model's own head, soft-caps and scales
apply to them, logits exist for response positions alone, and the value head reads the very same states.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmft.functional.masked import entropy, token_logprobs
from mmft.models.critic import ValueHead, backbone_values, gather_states
from mmft.models.prompts import Prompt, pad_sequences, stack_pictures


@dataclass(frozen=True)
class TokenScores:
    """logprobs_BT: log pi of each response token; entropy_BT: of the distribution it came from; value_BT: V(s_t), or
    None.
    """

    logprobs_BT: Tensor
    entropy_BT: Tensor | None
    value_BT: Tensor | None


def pack(
    prompts: Sequence[Prompt], responses_BT: Tensor, mask_BT: Tensor, pad_id: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Model inputs of [prompt | kept response | padding], and index_BT, the position whose output predicts response
    token t.

    index_BT runs one past the response where the batch is wide enough: V of the state after the last token. Positions
    beyond a row's own text point at its last token and mean nothing.
    """
    lengths = mask_BT.sum(1).tolist()
    sequences = [torch.cat([p.input_ids, r[:n].cpu()]) for p, r, n in zip(prompts, responses_BT, lengths, strict=True)]
    inputs = pad_sequences(sequences, pad_id, "right") | stack_pictures(prompts)
    starts = torch.tensor([len(p) - 1 for p in prompts])
    last = torch.tensor([len(s) - 1 for s in sequences])
    index_BT = torch.minimum(starts[:, None] + torch.arange(responses_BT.shape[1])[None, :], last[:, None])
    return inputs, index_BT


@contextmanager
def response_states(model: nn.Module, index_BT: Tensor) -> Iterator[dict[str, Tensor]]:
    """While open, the model's output embedding sees only the states at index_BT; they are left in the dict as
    `states`.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} names no output embedding, so its log-probabilities cannot be read")
    kept: dict[str, Tensor] = {}

    def keep(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        kept["states"] = gather_states(args[0], index_BT)
        return (kept["states"], *args[1:])

    handle = head.register_forward_pre_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()


class PolicyWithCritic(nn.Module):
    """The policy and its critic as one module: what the optimizer sees, what accelerate wraps, and one forward for
    both.
    """

    def __init__(
        self,
        policy: nn.Module,
        critic: nn.Module,
        banned_ids: Sequence[int],
        temperature: float,
        stops: Sequence[int] = (),
        min_new_tokens: int = 0,
    ):
        super().__init__()
        self.policy = policy
        # Under TRL's name: its saving and generation look there.
        self.value_model = critic
        self.temperature = temperature
        self.min_new_tokens = min_new_tokens
        self.register_buffer("banned", torch.tensor(sorted(banned_ids), dtype=torch.long), persistent=False)
        self.register_buffer("stops", torch.tensor(sorted(stops), dtype=torch.long), persistent=False)

    def forward(
        self,
        inputs: dict[str, Tensor],
        index_BT: Tensor,
        responses_BT: Tensor,
        values: bool = True,
        with_entropy: bool = True,
    ) -> TokenScores:
        """Scores of responses_BT at index_BT (see `pack`); gradients flow unless the caller turned them off."""
        with response_states(self.policy, index_BT) as kept:
            logits_BTV = self.policy(**inputs, use_cache=False, return_dict=True).logits
        logits_BTV = self.without_banned(logits_BTV)
        logprobs_BT = token_logprobs(logits_BTV, responses_BT, self.temperature)
        entropy_BT = entropy(logits_BTV, self.temperature) if with_entropy else None
        value_BT = self._values(kept["states"], inputs, index_BT) if values else None
        return TokenScores(logprobs_BT, entropy_BT, value_BT)

    def without_banned(self, logits_BTV: Tensor) -> Tensor:
        """What sampling cannot choose has no probability, here as there."""
        if len(self.banned):
            logits_BTV = logits_BTV.index_fill(-1, self.banned, float("-inf"))
        if self.min_new_tokens and len(self.stops):
            early, rest = logits_BTV[:, : self.min_new_tokens], logits_BTV[:, self.min_new_tokens :]
            logits_BTV = torch.cat([early.index_fill(-1, self.stops, float("-inf")), rest], 1)
        return logits_BTV

    def _values(self, states_BTD: Tensor, inputs: dict[str, Tensor], index_BT: Tensor) -> Tensor:
        if isinstance(self.value_model, ValueHead):
            return self.value_model(states_BTD)
        return backbone_values(self.value_model, inputs["input_ids"], inputs["attention_mask"], index_BT)
