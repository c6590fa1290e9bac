"""How one model reads prompts and answers: what differs between families, in one place.

Nothing here knows a model by name. Layout comes from the config and the signature of `forward`; what those do not tell
is tried out on the first prompts, by `mmft.models.selfcheck`, and a way that changes the model's answers is not taken.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmft.models.encode_once import PIXELS, FeatureStore
from mmft.models.packing import (
    Growth,
    Packed,
    PromptSees,
    additive,
    groups_of,
    pack_apart,
    pack_decoder,
    pack_together,
    prompt_blocks,
    response_rows,
    split_groups,
    tree_mask,
)
from mmft.models.prepacked import PrepackedLinears
from mmft.models.prompts import Prompt, PromptBuilder, pad_prompts
from mmft.models.structure import output_head

FEATURE_BUDGET = 2 * 2**30  # bytes


class Interface:
    """Makes a model's inputs of prompts and responses.

    Args:
        model: a policy, PEFT-wrapped or bare.
        builder: its prompts' builder, or its processor.
        encode_once: "off" hands over pixels in every pass; "auto" and "on" encode each distinct picture once where
            the tower is frozen and the features give the model's own answers.
        feature_budget: bytes that features may take.
        share_prompts: let responses of one prompt share its forward pass.
        trains: the model is to be trained; where it is only read, features never grow stale.
    """

    def __init__(
        self,
        model: nn.Module,
        builder: PromptBuilder | Any,
        encode_once: Literal["auto", "on", "off"] = "auto",
        feature_budget: int = FEATURE_BUDGET,
        share_prompts: bool = True,
        trains: bool = True,
    ):
        self.model = model
        self.trains = trains
        self.base: Any = bare(model)
        self.builder = builder if isinstance(builder, PromptBuilder) else PromptBuilder(builder)
        self.head = output_head(self.base)
        self.hidden_size = int(self.head.weight.shape[1])
        parameters = inspect.signature(self.base.forward).parameters
        self.takes = frozenset(parameters)
        self._insisted = {
            name: None for name in PIXELS & self.takes if parameters[name].default is inspect.Parameter.empty
        }
        text = getattr(self.base.config, "text_config", None)
        self.encoder_decoder = any(c is not None and c.is_encoder_decoder for c in (self.base.config, text))
        self.growth: Growth = {}
        self.prompt_sees: PromptSees = "before"
        self.features = FeatureStore(self.base, feature_budget, "off" if encode_once == "off" else None, steady=trains)
        self.no_sharing = ""  # why prompts that are asked to be shared cannot be, where the signature says so already
        if share_prompts and (self.encoder_decoder or "position_ids" not in self.takes):
            self.no_sharing = "its decoder reads no prompt" if self.encoder_decoder else "it takes no position ids"
        self.share_prompts = share_prompts and not self.no_sharing
        self.decoder = "cached"  # of `mmft.models.decoding.DECODERS`
        self.checked = False  # by `mmft.models.selfcheck`; until then nothing is shared
        self.kinds: dict[int, Prompt | None] = {}  # a prompt of each number of pictures that was checked, where at hand
        self.window = attention_window(self.base)
        self.prepacked = PrepackedLinears(self.base)
        self._rope = next((m for m in self.base.modules() if hasattr(m, "get_rope_index")), None)

    @property
    def pad_id(self) -> int:
        return self.builder.pad_id

    @property
    def device(self) -> torch.device:
        return next(self.base.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype if self.head.weight.is_floating_point() else self.base.dtype

    def start_id(self) -> int:
        """The token that a decoder of its own starts from."""
        text = self.base.config.get_text_config(decoder=True)
        for holder in (self.base.generation_config, self.base.config, text):
            for name in ("decoder_start_token_id", "bos_token_id"):
                value = getattr(holder, name, None)
                if value is not None:
                    return int(value[0] if isinstance(value, list) else value)
        return self.pad_id

    def accept(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Without inputs of the prompt that this model's forward does not name; None for pixels that it insists on."""
        unwanted = {"input_ids", "attention_mask", "token_type_ids"} - self.takes
        return self._insisted | {name: value for name, value in inputs.items() if name not in unwanted}

    # What the start-up check found out, for a run that resumes and for processes that must do the same.

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "ways": list(self.features.ways),
            "growth": dict(self.growth),
            "prompt_sees": self.prompt_sees,
            "share_prompts": self.share_prompts,
            "decoder": self.decoder,
            "kinds": sorted(self.kinds) if self.checked else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back a `state_dict`; what it was checked on is not checked again."""
        self.features.ways = list(state["ways"])
        self.growth, self.prompt_sees = dict(state["growth"]), state["prompt_sees"]
        self.share_prompts, self.decoder = state["share_prompts"], state["decoder"]
        self.checked = state["kinds"] is not None
        self.kinds = dict.fromkeys(state["kinds"] or (), None)

    # Scoring: prompts and responses in one pass.

    def pack(
        self, prompts: Sequence[Prompt], responses_BT: Tensor, mask_BT: Tensor, share: bool | None = None
    ) -> Packed:
        """Inputs of a pass over these responses, on the model's device, prompts shared where that is possible."""
        prompts = self._completed(prompts)
        responses, width = response_rows(responses_BT, mask_BT), responses_BT.shape[1]
        if self.encoder_decoder:
            packed, shown = self._pack_decoder(prompts, responses, width), list(prompts)
        elif groups := self.shared_groups(prompts, responses, share):
            positions = [self.prompt_positions(prompts[group[0]]) for group in groups]
            packed = pack_together(prompts, responses, width, self.pad_id, self.growth, groups, positions)
            blocks = prompt_blocks(packed, self.prompt_sees, self.growth)
            tree = tree_mask(packed.inputs["attention_mask"], blocks)
            packed.inputs["attention_mask"] = additive(tree, self.dtype)
            shown = [prompts[group[0]] for group in groups]
        else:
            packed = pack_apart(prompts, responses, width, self.pad_id, self.growth)
            shown = list(prompts)
        packed = packed.to(self.device)
        pictures = self.features.inputs(shown)
        packed.inputs = self.accept(packed.inputs | pictures.inputs)
        packed.pinned = pictures.pinned
        return packed

    def _completed(self, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
        """Prompts without a picture with the per-token inputs that processors give with one: 0, as all text has."""
        names = [name for name in self.growth if not name.endswith("_mask")]
        if not names or all(p.pictures for p in prompts):
            return prompts
        text = [{} if p.pictures else {name: torch.zeros_like(p.input_ids) for name in names} for p in prompts]
        return [dataclasses.replace(p, token_inputs=t | p.token_inputs) for p, t in zip(prompts, text, strict=True)]

    def shared_groups(
        self, prompts: Sequence[Prompt], responses: list[Tensor], share: bool | None
    ) -> list[list[int]] | None:
        """Rows that go together, or None where each goes apart."""
        wanted = (self.share_prompts and self.checked) if share is None else share
        groups = groups_of(prompts) if wanted else []
        if not groups or len(groups) == len(prompts):
            return None
        lengths = [len(r) for r in responses]
        longest = max(len(p) + n for p, n in zip(prompts, lengths, strict=True))
        if self.window is not None and longest >= self.window:  # a tree mask knows no window
            return None
        return split_groups(groups, prompts, lengths, self.hidden_size)

    def _pack_decoder(self, prompts: Sequence[Prompt], responses: list[Tensor], width: int) -> Packed:
        packed = pack_decoder(responses, width, self.pad_id, self.start_id())
        if any(len(p) for p in prompts):
            asked = [Prompt(p.input_ids, {}, p.token_inputs) for p in prompts]
            packed.inputs |= pad_prompts(asked, self.pad_id, "right")
        if "decoder_attention_mask" not in self.takes:
            del packed.inputs["decoder_attention_mask"]
        return packed

    def prompt_positions(self, prompt: Prompt) -> Tensor:
        """Position ids of a prompt alone, (P,), or (axes, P) where pictures have positions in space."""
        if self._rope is None or not prompt.pictures:
            plain = torch.arange(len(prompt))
            return plain if self._rope is None else plain.expand(3, -1)
        inputs = {"input_ids": prompt.input_ids[None], "attention_mask": torch.ones(1, len(prompt), dtype=torch.long)}
        inputs |= {name: value[None] for name, value in prompt.token_inputs.items()} | prompt.pictures
        names = inspect.signature(self._rope.get_rope_index).parameters
        known = {name: value.to(self.device) for name, value in inputs.items() if name in names}
        positions, _ = self._rope.get_rope_index(**known)
        return positions[:, 0].cpu()

    # Sampling: prompts alone, left-padded.

    def prompt_inputs(self, prompts: Sequence[Prompt], positions: bool = True) -> tuple[dict[str, Any], Any]:
        """Inputs of a pass over prompts alone, left-padded, and the tower's output to pin."""
        prompts = self._completed(prompts)
        asked = [Prompt(p.input_ids, {}, p.token_inputs) for p in prompts]
        inputs: dict[str, Any] = {}
        if any(len(p) for p in prompts):
            inputs = pad_prompts(asked, self.pad_id, "right" if self.encoder_decoder else "left")
        if positions and not self.encoder_decoder and ("position_ids" in self.takes or self._rope is not None):
            places = [self.prompt_positions(p) for p in prompts]
            width = inputs["input_ids"].shape[1]
            inputs["position_ids"] = torch.stack(
                [torch.nn.functional.pad(place, (width - place.shape[-1], 0)) for place in places], -2
            )
        inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        pictures = self.features.inputs(prompts)
        return self.accept(inputs | pictures.inputs), pictures.pinned


def attention_window(model: Any) -> int | None:
    """Tokens that a layer looks back at most; None where all see everything."""
    window = getattr(model.config.get_text_config(decoder=True), "sliding_window", None)
    return int(window) if window else None


def bare(model: Any) -> Any:
    """The transformers model inside PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def evaluating(model: Any) -> Iterator[Any]:
    """Evaluation mode inside, whatever mode it was outside."""
    was_training = model.training
    model.eval()
    try:
        yield model
    finally:
        model.train(was_training)
