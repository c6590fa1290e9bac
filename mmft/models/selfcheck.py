"""What a model's config does not tell is tried out on its first prompts, before anything is learned from them.

Each faster way of feeding a model is compared with the plain one: features with pixels, a padded batch with rows alone,
tokens drawn from a cache with the scoring pass, shared prompts with separate rows. A way that changes log-probabilities
is given up for the next, with one line in the log; where no way is left, the model is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from mmft.models.decoding import DECODERS, Responses, Sampling
from mmft.models.interface import Interface, evaluating
from mmft.models.packing import REPEAT_LAST, PromptSees
from mmft.models.prompts import Prompt, counted
from mmft.models.scoring import PolicyWithCritic
from mmft.types import UserError

logger = logging.getLogger(__name__)

# Mean |difference| of log-probabilities, in nats, that rounding explains and no error does.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 5e-4, torch.bfloat16: 0.1, torch.float16: 0.03}
# Within one arithmetic, what must not change does not, up to the order in which equal numbers are added.
SAME = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 0.02, torch.float16: 5e-3}
_TOKENS = 4
_FAILURES = (
    ValueError,
    TypeError,
    RuntimeError,
    KeyError,
    AttributeError,
    IndexError,
    NotImplementedError,
    FloatingPointError,
)


@torch.no_grad()
def check(interface: Interface, prompts: Sequence[Prompt]) -> list[str]:
    """Settles how this model is fed, once, and again where prompts have a number of pictures not seen before; returns
    what was given up, a line each. Random states are left alone.

    Raises UserError where even the plainest way is not consistent with itself.
    """
    kinds = {p.picture_count: p for p in reversed(prompts)}
    if interface.checked and kinds.keys() <= interface.kinds.keys():
        return []
    kinds |= {count: prompt for count, prompt in interface.kinds.items() if prompt is not None}
    devices = [interface.device] if interface.device.type == "cuda" else []
    with evaluating(interface.model), torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        notes = _Check(interface, prompts, kinds).run()
    interface.checked, interface.kinds = True, interface.kinds | kinds
    for note in notes:
        logger.warning(note)
    return notes


def most_cautious(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What holds for every process, of the interface's states that each found on prompts of its own."""
    together = dict(states[0])
    together["ways"] = min((s["ways"] for s in states), key=len)
    together["decoder"] = max((s["decoder"] for s in states), key=list(DECODERS).index)
    together["growth"] = {name: value for s in states for name, value in s["growth"].items()}
    alike = len({s["prompt_sees"] for s in states}) == 1
    together["share_prompts"] = alike and all(s["share_prompts"] for s in states)
    kinds = [s["kinds"] for s in states]
    together["kinds"] = None if None in kinds else sorted({count for counts in kinds for count in counts})
    return together


class _Check:
    def __init__(self, interface: Interface, prompts: Sequence[Prompt], kinds: dict[int, Prompt]):
        self.interface = interface
        self.scorer = PolicyWithCritic(interface.model, torch.nn.Identity(), (), 1.0)
        self.tolerance = TOLERANCE.get(interface.dtype, 0.1)
        self.same = SAME.get(interface.dtype, 0.02)
        self.kinds = list(kinds.values())
        self.first, self.other = _two_prompts(interface, [*prompts, *self.kinds])
        self.answers = _answers(interface)
        self.notes: list[str] = []

    def run(self) -> list[str]:
        for prompt in self.kinds:
            self._plainest(prompt)
        self._token_inputs()
        self._features()
        self._padding()
        self._mixing()
        self._decoder()
        self._sharing()
        return self.notes

    def logprobs(self, prompts: Sequence[Prompt], answers: Tensor, share: bool = False) -> Tensor:
        mask = torch.ones_like(answers, dtype=torch.bool)
        packed = self.interface.pack(prompts, answers, mask, share)
        return self.scorer(packed, answers, values=False, with_entropy=False).logprobs_BT

    def _plainest(self, prompt: Prompt) -> None:
        """A prompt by itself, with pixels: not every model does without a picture, or takes several."""
        store = self.interface.features
        ways, store.ways = store.ways, ["off"]
        try:
            self.logprobs([prompt], self.answers[:1])
        except _FAILURES as error:
            raise UserError(f"this model does not take prompts with {_counts([prompt])}: {_line(error)}") from error
        finally:
            store.ways = ways

    def _token_inputs(self) -> None:
        """The value at an answer's tokens under which none of them sees what follows it. Masks go on as they end."""
        one, two = self.answers[:1], self.answers[:1].clone()
        two[:, 2:] = self.answers[1:2, 2:]
        for name in {n: None for p in (self.first, self.other) for n in p.token_inputs}:
            if name.endswith("_mask"):
                self.interface.growth[name] = REPEAT_LAST
                continue
            for value in (0, 1, REPEAT_LAST):
                self.interface.growth[name] = value
                gap = self.logprobs([self.first], one)[:, :2] - self.logprobs([self.first], two)[:, :2]
                if gap.abs().max() <= self.same:
                    break
            else:
                raise UserError(f"this model's answers see their own future whatever {name} says; it cannot be trained")

    def _features(self) -> None:
        store = self.interface.features
        seen = next((p for p in (self.first, self.other) if p.pictures), None)
        if seen is None or store.way == "off":
            return
        answers = self.answers[:1]
        ways, store.ways = store.ways, ["off"]
        pixels = self.logprobs([seen], answers)
        store.ways = ways
        reason = ""
        while store.way != "off":
            try:
                if self.interface.trains and store.trains(seen):
                    reason = "the vision tower trains"
                elif (self.logprobs([seen], answers) - pixels).abs().mean() <= self.same:
                    break
                else:
                    reason = "its features change the answers"
            except _FAILURES as error:
                reason = _line(error)
            store.give_up_way()
        if store.way == "off":
            self.notes.append(f"pictures are encoded in every pass: {reason}")

    def _padding(self) -> None:
        if problem := self._beside([self.first, self.other]):
            raise UserError(
                f"this model does not take prompts of different lengths with {_counts([self.first])} in one batch: "
                f"{problem}"
            )

    def _mixing(self) -> None:
        """Prompts with other numbers of pictures in one batch."""
        if len(self.kinds) > 1 and (problem := self._beside(self.kinds)):
            raise UserError(f"this model does not take prompts with {_counts(self.kinds)} in one batch: {problem}")

    def _beside(self, prompts: Sequence[Prompt]) -> str:
        """What is wrong with these rows in one batch; empty where each is as it is alone."""
        answers = self._answers_of(prompts)
        apart = torch.cat([self.logprobs([p], answers[i : i + 1]) for i, p in enumerate(prompts)])
        try:
            gap = (self.logprobs(prompts, answers) - apart).abs().mean()
        except _FAILURES as error:
            return f"its forward pass fails ({_line(error)})"
        return "" if gap <= self.tolerance else f"its log-probabilities change by {gap:.3f} nats a token"

    def _answers_of(self, prompts: Sequence[Prompt]) -> Tensor:
        return self.answers[torch.arange(len(prompts)) % len(self.answers)]

    def _decoder(self) -> None:
        given_up = []
        for name in DECODERS:
            try:
                gap = self._decoder_gap(name)
            except _FAILURES as error:
                given_up.append(f"{name} ({_line(error)})")
                continue
            if gap <= self.tolerance:
                self.interface.decoder = name
                break
            given_up.append(f"{name} (off by {gap:.3f} nats)")
        else:
            raise UserError("this model's sampling and scoring disagree: " + "; ".join(given_up))
        if not self.interface.decoder.startswith("cached"):
            self.notes.append(f"responses are sampled by {self.interface.decoder!r}: not by " + "; ".join(given_up))

    def _decoder_gap(self, name: str) -> float:
        """Rows of one prompt beside each other, then two unequal prompts: both paddings, shared and apart."""
        worst = 0.0
        batches = [[self.first, self.first], [self.first, self.other], *([self.kinds] if len(self.kinds) > 1 else [])]
        for prompts in batches:
            forced = None if name == "generate" else self._answers_of(prompts)
            sampling = Sampling(max_new_tokens=_TOKENS)
            responses = Responses(len(prompts), sampling, self.interface.pad_id, self.interface.device, forced)
            with self.interface.prepacked():
                DECODERS[name](self.interface, prompts, responses)
            tokens, drawn = responses.stacked()
            gap = float((self.logprobs(prompts, tokens) - drawn).abs().mean())
            worst = gap if not gap <= worst else worst  # NaN is no agreement
        return worst

    def _sharing(self) -> None:
        interface = self.interface
        if interface.no_sharing:
            self.notes.append(f"each response computes its prompt anew: {interface.no_sharing}")
        if not interface.share_prompts:
            return
        reason = ""
        for sees in get_args(PromptSees):
            interface.prompt_sees = sees
            problem = self._sharing_problem()
            if not problem:
                return
            reason = reason or problem
        interface.share_prompts = False
        self.notes.append(f"each response computes its prompt anew: {reason}")

    def _sharing_problem(self) -> str:
        """What is wrong with rows that share their prompt; empty where they equal separate rows."""
        prompts, answers = [self.first, self.first, self.other], self.answers
        if self.interface.shared_groups(prompts, list(answers.cpu()), share=True) is None:
            return "a layer looks back less far than to the prompt's start"
        try:
            shared = self.logprobs(prompts, answers, share=True)
            changed = answers.clone()
            changed[0] = answers[2]
            leak = (self.logprobs(prompts, changed, share=True)[1] - shared[1]).abs().max()
            gap = (shared - self.logprobs(prompts, answers)).abs().mean()
        except _FAILURES as error:
            return f"its forward pass refuses such rows ({_line(error)})"
        fine = leak <= self.same and gap <= self.tolerance
        return "" if fine else f"answers change by {max(gap, leak):.3f} nats"


def _two_prompts(interface: Interface, prompts: Sequence[Prompt]) -> tuple[Prompt, Prompt]:
    """The first prompt with a picture, and one of another picture and length: as it is, or without its last token."""
    first = next((p for p in prompts if p.pictures), prompts[0])
    like = [p for p in prompts if p.picture_count == first.picture_count]
    others = [p for p in like if p.picture_key != first.picture_key] or like
    other = next((p for p in others if len(p) != len(first)), others[0])
    if len(other) == len(first) and len(first) > 2:
        shorter = {name: value[:-1] for name, value in other.token_inputs.items()}
        other = Prompt(other.input_ids[:-1], other.pictures, shorter, other.picture_count)
    return first, other


def _answers(interface: Interface) -> Tensor:
    """(3, T) ordinary tokens, other ones in each row."""
    tokenizer: Any = interface.builder.tokenizer
    vocabulary = interface.head.weight.shape[0]
    special = {*tokenizer.all_special_ids, interface.pad_id}
    ordinary = [i for i in range(min(vocabulary, len(tokenizer))) if i not in special]
    step: Callable[[int], int] = lambda k: ordinary[(len(ordinary) // 3 + 7 * k) % len(ordinary)]  # noqa: E731
    tokens = [step(k) for k in range(3 * _TOKENS)]
    return torch.tensor(tokens, device=interface.device).view(3, _TOKENS)


def _counts(prompts: Sequence[Prompt]) -> str:
    return " and with ".join(counted(n) for n in sorted({p.picture_count for p in prompts}))


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
