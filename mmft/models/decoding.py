"""Sampling token by token, with one prompt pass for all responses of a prompt.

Three decoders, from the fastest to the surest: our loop over a key-value cache, the model's own `generate`, and a loop
that runs the scoring pass anew for each token and so cannot disagree with it. `mmft.models.selfcheck` takes the first
that draws from the distribution that scoring sees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.modeling_outputs import BaseModelOutput

from mmft.functional.masked import response_mask
from mmft.models.encode_once import pinned
from mmft.models.interface import Interface
from mmft.models.prompts import Prompt
from mmft.models.scoring import next_logits


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. `banned`: ids never chosen; `stops`: ids that end a response; `as_transformers`: with one
    seed draw what `generate` draws, which takes a random number a token of the vocabulary instead of one a row.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_new_tokens: int = 0
    greedy: bool = False
    stops: tuple[int, ...] = ()
    banned: tuple[int, ...] = ()
    as_transformers: bool = False

    def scores(self, logits_BV: Tensor, step: int) -> Tensor:
        """What the step's tokens are drawn from, before `top_k` and `top_p`: fp32, -inf where none may be."""
        scores = logits_BV.to(torch.float32, copy=True)
        if step < self.min_new_tokens and self.stops:
            scores[:, list(self.stops)] = float("-inf")
        if self.banned:
            scores[:, list(self.banned)] = float("-inf")
        return scores if self.greedy else scores.div_(self.temperature)

    def choose(self, scores_BV: Tensor, point_B: Tensor | None = None) -> Tensor:
        """Tokens (B). point_B: where in each distribution, in [0, 1); drawn here where it is not given."""
        if self.greedy:
            return scores_BV.argmax(-1)
        if self.top_k and self.top_k < scores_BV.shape[-1]:
            least = scores_BV.topk(self.top_k).values[:, -1:]
            scores_BV = scores_BV.masked_fill(scores_BV < least, float("-inf"))
        if self.top_p < 1.0:
            ordered, index = scores_BV.sort(descending=False)
            outside = ordered.softmax(-1).cumsum(-1) <= 1 - self.top_p
            outside[:, -1] = False
            scores_BV = scores_BV.masked_fill(outside.scatter(1, index, outside), float("-inf"))
        probs_BV = scores_BV.softmax(-1)
        if self.as_transformers:
            return torch.multinomial(probs_BV, 1).squeeze(1)
        cdf_BV = probs_BV.double().cumsum(-1)  # in fp32 the tail of a large vocabulary would drown in rounding
        if point_B is None:
            point_B = torch.rand(len(cdf_BV), dtype=cdf_BV.dtype, device=cdf_BV.device)
        point_B1 = point_B[:, None] * cdf_BV[:, -1:]
        # The first token whose sum passes the point: one of probability 0 never is.
        return torch.searchsorted(cdf_BV, point_B1, right=True).squeeze(1).clamp(max=cdf_BV.shape[-1] - 1)

    def generation_config(self, pad_id: int) -> GenerationConfig:
        """The same for a model's own `generate`."""
        drawn: dict[str, Any] = {} if self.greedy else {
            "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p,
        }  # fmt: skip
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=self.min_new_tokens or None,
            do_sample=not self.greedy,
            eos_token_id=list(self.stops) or None,
            pad_token_id=pad_id,
            suppress_tokens=list(self.banned) or None,
            return_dict_in_generate=True,
            output_scores=True,
            **drawn,
        )


Draw = Callable[[Tensor, int], Tensor]  # logits_BV, step -> tokens_B


class Responses:
    """Tokens as they are drawn, and the log-probabilities they were drawn with; nothing counts after a stop.

    forced: tokens to take instead of drawing. points_BT: random numbers to draw with, see `Sampling.choose`; a row's
    answer then depends on nothing beside it. between: called before each token; what it raises ends the sampling.
    """

    def __init__(
        self,
        rows: int,
        sampling: Sampling,
        pad_id: int,
        device: torch.device,
        forced: Tensor | None = None,
        points_BT: Tensor | None = None,
        between: Callable[[], None] | None = None,
    ):
        self.sampling, self.pad_id, self.forced = sampling, pad_id, forced
        self.points_BT = None if points_BT is None else points_BT.to(device)
        self.between = between
        self.stops = torch.tensor(sampling.stops, dtype=torch.long, device=device)
        self.running = torch.ones(rows, dtype=torch.bool, device=device)
        self.tokens: list[Tensor] = []
        self.logprobs: list[Tensor] = []

    def draw(self, logits_BV: Tensor) -> Tensor:
        """The next token of each row; padding where a row has ended."""
        if self.between is not None:
            self.between()
        step = len(self.tokens)
        scores = self.sampling.scores(logits_BV, step)
        if self.forced is None:
            drawn = self.sampling.choose(scores, None if self.points_BT is None else self.points_BT[:, step])
        else:
            drawn = self.forced[:, step]
        drawn = torch.where(self.running, drawn, self.pad_id)
        total = scores.logsumexp(-1)
        if not torch.isfinite(total[self.running]).all():
            raise FloatingPointError("the model's logits are not finite, or no token may be drawn")
        chosen = scores.gather(1, drawn[:, None]).squeeze(1) - total
        self.tokens.append(drawn)
        self.logprobs.append(chosen)
        self.running = self.running & ~torch.isin(drawn, self.stops)
        return drawn

    @property
    def done(self) -> bool:
        wanted = self.sampling.max_new_tokens if self.forced is None else self.forced.shape[1]
        return len(self.tokens) >= wanted or not bool(self.running.any())

    def stacked(self) -> tuple[Tensor, Tensor]:
        return torch.stack(self.tokens, 1), torch.stack(self.logprobs, 1)


def equal_groups(prompts: Sequence[Prompt]) -> tuple[list[Prompt], int]:
    """(distinct prompts, n) where rows are n neighbours of each prompt; else (rows as they are, 1)."""
    size = 1
    while size < len(prompts) and prompts[size].key == prompts[0].key:
        size += 1
    distinct = list(prompts[::size])
    if len(prompts) % size or any(p.key != distinct[i // size].key for i, p in enumerate(prompts)):
        return list(prompts), 1
    return distinct, size


def decode_cached(
    interface: Interface,
    prompts: Sequence[Prompt],
    responses: Responses,
    positions: bool = True,
    share: bool = True,
    pictures_always: bool = False,
) -> None:
    """One pass over the distinct prompts, their cache handed to each response, then a token a pass.

    `positions`: give position ids; `share`: one pass for equal prompts; `pictures_always`: give the pictures in every
    pass, to models that insist on them.
    """
    model: Any = interface.model
    distinct, size = equal_groups(prompts) if share else (prompts, 1)
    inputs, tower_output = interface.prompt_inputs(distinct, positions)
    keep = {"logits_to_keep": 1} if "logits_to_keep" in interface.takes else {}
    if interface.encoder_decoder:
        start = torch.full((len(distinct), 1), interface.start_id(), device=interface.device)
        inputs["decoder_input_ids"] = start
    with pinned(interface.features.tower, tower_output):
        output = model(**inputs, use_cache=True, return_dict=True, **keep)
    cache = cache_of(output)
    logits = output.logits[:, -1]
    if size > 1:
        cache.batch_repeat_interleave(size)
        logits = logits.repeat_interleave(size, 0)
    step = _later_inputs(interface, inputs, output, size)
    again = interface.features.inputs(prompts).inputs if pictures_always else {}
    while True:
        tokens = responses.draw(logits)
        if responses.done:
            return
        with pinned(interface.features.tower, tower_output if pictures_always else None):
            output = model(**interface.accept(again | step(tokens)), cache=cache, use_cache=True, return_dict=True)
        logits = output.logits[:, -1]


def cache_of(output: Any) -> Any:
    """The key-value cache of a forward pass; raises ValueError where a model keeps none."""
    holders = (output, output.get("language_model_outputs") or {})
    cache = next((h[name] for h in holders for name in ("cache", "past_key_values") if h.get(name) is not None), None)
    if cache is None:
        raise ValueError("this model keeps no cache")
    return cache


def _later_inputs(interface: Interface, inputs: dict[str, Any], output: Any, size: int) -> Callable[[Tensor], Any]:
    """Inputs of each later pass as a function of its tokens: what grows with the answer grows here."""
    repeat = {k: v.repeat_interleave(size, 0) for k, v in inputs.items() if isinstance(v, Tensor)}
    if interface.encoder_decoder:
        states = output.encoder_last_hidden_state.repeat_interleave(size, 0)
        fixed = {"encoder_outputs": BaseModelOutput(last_hidden_state=states)} | {
            k: v for k, v in repeat.items() if k == "attention_mask"
        }
        return lambda tokens: fixed | {"decoder_input_ids": tokens[:, None]}
    mask = repeat["attention_mask"]
    places = inputs.get("position_ids")
    following = None
    if places is not None:  # the position after the prompt's last, the same on every axis
        following = places.amax(-1).amax(0) if places.dim() == 3 else places.amax(-1)
        following = following.repeat_interleave(size, 0) + 1
    grown = {
        name: repeat[name][:, -1:] if (rule := interface.growth.get(name, "last")) == "last"
        else torch.full_like(repeat[name][:, -1:], rule)
        for name in token_names(interface, inputs)
    }  # fmt: skip
    axes = 0 if places is None else places.dim()

    def step(tokens: Tensor) -> dict[str, Any]:
        nonlocal mask, following
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        one: dict[str, Any] = {"input_ids": tokens[:, None], "attention_mask": mask} | grown
        if following is not None:
            place = following[:, None]
            one["position_ids"] = place if axes == 2 else place.expand(len(places), -1, -1)
            following = following + 1
        return one

    return step


def token_names(interface: Interface, inputs: dict[str, Any]) -> list[str]:
    """Names of the per-token inputs among a model's inputs."""
    shape = inputs["input_ids"].shape
    skip = {"input_ids", "attention_mask", "position_ids"}
    return [
        name for name, value in inputs.items()
        if isinstance(value, Tensor) and name not in skip and value.shape[:2] == shape
        and name.endswith(("_ids", "_mask"))
    ]  # fmt: skip


def decode_without_positions(interface: Interface, prompts: Sequence[Prompt], responses: Responses) -> None:
    """As `decode_cached`, for models that must find positions themselves."""
    decode_cached(interface, prompts, responses, positions=False)


def decode_apart(interface: Interface, prompts: Sequence[Prompt], responses: Responses) -> None:
    """As `decode_cached`, for models whose caches cannot be handed to several responses."""
    decode_cached(interface, prompts, responses, share=False)


def decode_with_pictures(interface: Interface, prompts: Sequence[Prompt], responses: Responses) -> None:
    """As `decode_cached`, for models whose every pass asks for the pictures."""
    decode_cached(interface, prompts, responses, share=False, pictures_always=True)


def decode_by_generate(interface: Interface, prompts: Sequence[Prompt], responses: Responses) -> None:
    """The model's own `generate`, with pixels and nothing else from the checkpoint's generation config."""
    if responses.forced is not None:
        raise ValueError("generate() chooses its tokens itself")
    model: Any = interface.model
    inputs, tower_output = interface.prompt_inputs(prompts, positions=False)
    config = responses.sampling.generation_config(interface.pad_id)
    base = interface.base
    config.decoder_start_token_id = interface.start_id() if interface.encoder_decoder else None
    kept, base.generation_config = base.generation_config, GenerationConfig()  # a checkpoint's beams or bans: no PPO
    try:
        # a copy of the ids: some models write into what they are given
        copied = {k: v.clone() if k == "input_ids" else v for k, v in inputs.items()}
        with pinned(interface.features.tower, tower_output):
            output = model.generate(**copied, generation_config=config)
    finally:
        base.generation_config = kept
    tokens = output.sequences[:, -len(output.scores) :]
    for t, scores in enumerate(output.scores):
        chosen = tokens[:, t]
        responses.tokens.append(torch.where(responses.running, chosen, interface.pad_id))
        responses.logprobs.append(scores.float().log_softmax(-1).gather(1, chosen[:, None]).squeeze(1))
        responses.running = responses.running & ~torch.isin(chosen, responses.stops)


def decode_by_scoring(interface: Interface, prompts: Sequence[Prompt], responses: Responses) -> None:
    """The scoring pass over prompt and response so far, anew for each token."""
    tokens = torch.full((len(prompts), 1), interface.pad_id, device=interface.device)  # the last is yet to be drawn
    while True:
        packed = interface.pack(prompts, tokens, torch.ones_like(tokens, dtype=torch.bool))
        drawn = responses.draw(next_logits(interface.model, packed))
        if responses.done:
            return
        tokens = torch.cat([tokens[:, :-1], drawn[:, None], tokens[:, -1:]], 1)


DECODERS: dict[str, Callable[[Interface, Sequence[Prompt], Responses], None]] = {
    "cached": decode_cached,
    "cached without positions": decode_without_positions,
    "cached apart": decode_apart,
    "cached with pictures": decode_with_pictures,
    "generate": decode_by_generate,
    "scoring": decode_by_scoring,
}


@torch.no_grad()
def sample_responses(
    interface: Interface,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    batch: int,
    points_BT: Tensor | None = None,
    between: Callable[[], None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(responses_BT, mask_BT, logprobs_BT): what was drawn for each row, up to and including its stop, and with what
    log-probability; padding and 0 behind. points_BT, between: see `Responses`; a model's own `generate` knows neither.
    """
    parts = []
    for start in range(0, len(prompts), batch):
        chunk = prompts[start : start + batch]
        points = None if points_BT is None else points_BT[start : start + batch]
        responses = Responses(
            len(chunk), sampling, interface.pad_id, interface.device, points_BT=points, between=between
        )
        with interface.prepacked():
            DECODERS[interface.decoder](interface, chunk, responses)
        parts.append(responses.stacked())
    width = max(tokens.shape[1] for tokens, _ in parts)
    tokens_BT = torch.cat([_widen(tokens, width, interface.pad_id) for tokens, _ in parts])
    logprobs_BT = torch.cat([_widen(logprobs, width, 0.0) for _, logprobs in parts])
    mask_BT = response_mask(tokens_BT, sampling.stops, None)  # a sampled padding token is a token like any other
    return tokens_BT.masked_fill(~mask_BT, interface.pad_id), mask_BT, logprobs_BT.masked_fill(~mask_BT, 0.0)


def _widen(tensor: Tensor, width: int, value: float) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]), value=value)
