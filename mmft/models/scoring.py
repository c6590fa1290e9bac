"""One forward pass that gives log-probabilities, entropy and values of sampled responses.

A pre-hook on the output embedding takes the hidden states that predict response tokens and lets the model's own head
see a single one of them: logits of B x T x V never exist at once, and the value head reads the very same states.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmft.functional.lm_head import Forbidden, LogitTransform, head_logprobs
from mmft.functional.masked import entropy, token_logprobs
from mmft.models.critic import ValueHead, backbone_values, gather_states
from mmft.models.encode_once import pinned, vision_tower
from mmft.models.interface import bare
from mmft.models.packing import Packed
from mmft.models.structure import output_head
from mmft.models.value_adapter import CRITIC, adapter_active

# What one product may differ by between two calls, relative to the largest logit.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 5e-3}


@dataclass(frozen=True)
class TokenScores:
    """logprobs_BT: log pi of each response token; entropy_BT: of the distribution it came from; value_BT: V(s_t), or
    None.
    """

    logprobs_BT: Tensor
    entropy_BT: Tensor | None
    value_BT: Tensor | None


@contextmanager
def response_states(head: nn.Module, packed: Packed, whole: bool = False) -> Iterator[dict[str, Tensor]]:
    """While open, the states that predict the responses are kept as `states`, (B, T, D), and the head sees one of
    them, or if `whole` all.
    """
    kept: dict[str, Tensor] = {}

    def keep(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        # Some models put their pictures before the text and give logits of both.
        offset = args[0].shape[1] - packed.width
        kept["states"] = gather_states(args[0], packed.row_B, packed.index_BT + offset)
        return (kept["states"] if whole else kept["states"][:1, :1], *args[1:])

    handle = head.register_forward_pre_hook(keep, prepend=True)  # what others do to the head's input is not ours
    try:
        yield kept
    finally:
        handle.remove()


class PolicyWithCritic(nn.Module):
    """The policy and its critic as one module: what the optimizer sees, what accelerate wraps, and one forward for
    both.

    critic: a `ValueHead` on the policy's states, or with `critic_adapter` on the states of a second pass, in which the
    critic's own adapter computes; or TRL's second model.
    """

    def __init__(
        self,
        policy: nn.Module,
        critic: nn.Module,
        banned_ids: Sequence[int],
        temperature: float,
        stops: Sequence[int] = (),
        min_new_tokens: int = 0,
        critic_adapter: bool = False,
    ):
        super().__init__()
        self.policy = policy
        # Under TRL's name: its saving and generation look there.
        self.value_model = critic
        self.temperature = temperature
        self.min_new_tokens = min_new_tokens
        self.critic_adapter = critic_adapter
        self.register_buffer("banned", torch.tensor(sorted(banned_ids), dtype=torch.long), persistent=False)
        self.register_buffer("stops", torch.tensor(sorted(stops), dtype=torch.long), persistent=False)
        # How the model's logits follow from its head's: found in the first pass; False where they do otherwise.
        self._transform: LogitTransform | bool | None = None

    @property
    def _no_split_modules(self) -> list[str]:
        """Names of the layers that are sharded apart, where accelerate looks for them."""
        present = {type(module).__name__ for module in self.policy.modules()}
        return sorted(present.intersection(bare(self.policy)._no_split_modules or ()))

    def forward(
        self,
        packed: Packed,
        responses_BT: Tensor,
        values: bool = True,
        with_entropy: bool = True,
        entropy_grad: bool = False,
    ) -> TokenScores:
        """Scores of responses_BT where `packed` says; gradients flow unless the caller turned them off."""
        states_BTD, logits = self._pass(packed)
        if logits is None:
            logprobs_BT, entropy_BT = self._from_states(states_BTD, responses_BT, with_entropy, entropy_grad)
        else:
            logits = self.without_banned(logits)
            logprobs_BT = token_logprobs(logits, responses_BT, self.temperature)
            entropy_BT = entropy(logits, self.temperature) if with_entropy else None
        value_BT = self._values(states_BTD, packed) if values else None
        return TokenScores(logprobs_BT, entropy_BT, value_BT)

    def _pass(self, packed: Packed) -> tuple[Tensor, Tensor | None]:
        """The responses' states, and their logits only where these do not follow from the head alone."""
        whole = self._transform is False
        base: Any = bare(self.policy)
        head = output_head(base)
        tower = vision_tower(base) if packed.pinned is not None else None
        with response_states(head, packed, whole) as kept, pinned(tower, packed.pinned):
            logits = self.policy(**packed.inputs, use_cache=False, return_dict=True).logits
        states = kept["states"]
        if self._transform is None:
            with torch.no_grad():
                self._transform = logit_transform(base, head, states[:1, :1], logits) or False
            return (states, None) if self._transform else self._pass(packed)
        return states, logits if whole else None

    def _from_states(
        self, states_BTD: Tensor, responses_BT: Tensor, with_entropy: bool, entropy_grad: bool
    ) -> tuple[Tensor, Tensor | None]:
        shape = responses_BT.shape
        is_early = None
        if self.min_new_tokens and len(self.stops):
            early_T = torch.arange(shape[1], device=responses_BT.device) < self.min_new_tokens
            is_early = early_T.expand(shape).flatten()
        logprobs, entropies = head_logprobs(
            output_head(bare(self.policy)), states_BTD.flatten(0, 1), responses_BT.flatten(),
            Forbidden(self.banned, self.stops, is_early), self.temperature, self._transform or None, with_entropy,
            entropy_grad,
        )  # fmt: skip
        return logprobs.view(shape), entropies.view(shape) if entropies is not None else None

    def without_banned(self, logits_BTV: Tensor) -> Tensor:
        """What sampling cannot choose has no probability, here as there."""
        if len(self.banned):
            logits_BTV = logits_BTV.index_fill(-1, self.banned, float("-inf"))
        if self.min_new_tokens and len(self.stops):
            early, rest = logits_BTV[:, : self.min_new_tokens], logits_BTV[:, self.min_new_tokens :]
            logits_BTV = torch.cat([early.index_fill(-1, self.stops, float("-inf")), rest], 1)
        return logits_BTV

    def _values(self, states_BTD: Tensor, packed: Packed) -> Tensor:
        if self.critic_adapter:
            with adapter_active(self.policy, CRITIC):
                states_BTD, _ = self._pass(packed)
        if isinstance(self.value_model, ValueHead):
            return self.value_model(states_BTD)
        return backbone_values(self.value_model, packed)


def next_logits(policy: Any, packed: Packed) -> Tensor:
    """logits_BV of the last token of each response."""
    base: Any = bare(policy)
    last = dataclasses.replace(packed, index_BT=packed.index_BT[:, -1:])
    with response_states(output_head(base), last, whole=True), pinned(vision_tower(base), packed.pinned):
        return policy(**packed.inputs, use_cache=False, return_dict=True).logits[:, -1]


def logit_transform(model: Any, head: nn.Module, states: Tensor, logits: Tensor) -> LogitTransform | None:
    """How the model's logits follow from head(states): scaled or capped as the config says, or as they are. None: in
    another way.
    """
    text = model.config.get_text_config(decoder=True)
    scale, divided = getattr(text, "logit_scale", None), getattr(text, "logits_scaling", None)
    cap = getattr(text, "final_logit_softcapping", None)
    factor = float(scale) if isinstance(scale, int | float) else 1 / float(divided) if divided else 1.0
    said = LogitTransform(factor, float(cap) if cap else None)
    plain, given = head(states).float(), logits.float()
    # What the config says comes first: near 0 a cap cannot be told from none.
    for candidate in (said, LogitTransform()):
        gap = (candidate(plain) - given).abs().max()
        if gap <= _ROUNDING.get(logits.dtype, 0.02) * given.abs().max():
            return candidate
    return None
