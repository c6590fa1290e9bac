"""What a family of models must do before anyone trains it: behind tests/test_families.py and docs/models.md.

    python tests/families.py FOLDER NAME ...     # builds and examines them; a line of JSON each

As a script it makes torchvision importable before transformers looks for it, for the families that need it.
"""

from __future__ import annotations

import os

import torchvision_shim

if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    torchvision_shim.available()

import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import tiny
import torch
import zoo
from PIL import Image
from torch import Tensor
from transformers.utils import logging as transformers_logging

from mmft.config import ModelConfig
from mmft.models.adapter_io import save_adapter
from mmft.models.decoding import Sampling, sample_responses
from mmft.models.interface import Interface
from mmft.models.policy import Policy, load_adapter, load_policy, load_pretrained, picture_token_ids
from mmft.models.prompts import Prompt, PromptBuilder
from mmft.models.scoring import PolicyWithCritic
from mmft.models.selfcheck import check
from mmft.types import Row, UserError

TOKENS = 5
SAME_ROW = 1e-5  # nats between two ways of computing one row, by the order of sums alone
OTHER_SHAPE = 1e-4  # ... and where rows have another length or company
GRADIENT = 1e-3  # of the gradient's norm

Result = Literal["yes", "apart", "no", "wrong"]


@dataclass(frozen=True)
class Verdict:
    """yes; apart: yes, but not in one batch with other rows; no: refused or given up, and nothing is wrong; wrong."""

    result: Result = "yes"
    reason: str = ""


@dataclass(frozen=True)
class FamilyReport:
    """verdicts: by examination, in the order of `EXAMINATIONS`. features, decoder, shares: the ways that were chosen;
    growth: what each per-token input holds at an answer's tokens; notes: what the start-up check logged.
    """

    name: str
    verdicts: dict[str, Verdict]
    features: str = ""
    decoder: str = ""
    shares: bool = False
    growth: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def passes(self) -> bool:
        """Whether the family can be trained, and nothing that it takes goes wrong."""
        needed = all(name in self.verdicts and self.verdicts[name].result == "yes" for name in NEEDED)
        return needed and all(verdict.result != "wrong" for verdict in self.verdicts.values())

    @property
    def faults(self) -> list[str]:
        """A line for each examination that was not passed."""
        bad = {n: v for n, v in self.verdicts.items() if v.result == "wrong" or (n in NEEDED and v.result != "yes")}
        return [f"{self.name}: {name}: {verdict.reason}" for name, verdict in bad.items()]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> FamilyReport:
        values = json.loads(line)
        verdicts = {name: Verdict(**verdict) for name, verdict in values.pop("verdicts").items()}
        return cls(verdicts=verdicts, **values)


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """Coloured blocks."""
    blocks = torch.randint(0, 256, (6, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(blocks.numpy()).resize(size, Image.Resampling.NEAREST)


SIZES = ((64, 48), (40, 72), (48, 48))
QUESTIONS = ("Describe the picture.", "What is there?", "What is on the left of the big picture?")
ROWS = [Row(f"row {i}", picture(i, SIZES[i % 3]), QUESTIONS[i % 3]) for i in range(6)]
TWO, OTHER_TWO = (replace(ROWS[0], more_images=(picture(seed, SIZES[2]),)) for seed in (6, 7))
TEXT = Row("text", None, "What is a picture, then?")


def reward(captions: list[str], rows: list[Row], finished: list[bool]) -> Any:
    """Something that differs between captions of one picture."""
    return tiny.letters_reward([caption + "ae"[i % 2] for i, caption in enumerate(captions)], rows, finished)


class Subject:
    """A family's checkpoint, and its policy after two steps of PPO."""

    def __init__(self, folder: Path):
        self.config = ModelConfig(path=str(folder), lora={"r": 4, "alpha": 8})
        self.policy: Policy = load_policy(self.config)
        self.builder = PromptBuilder(self.policy.processor)
        self.banned = picture_token_ids(self.policy.model, self.policy.processor)
        self.notes: list[str] = []

    @cached_property
    def interface(self) -> Interface:
        interface = Interface(self.policy.model, self.builder)
        self.notes += check(interface, self.prompts)
        return interface

    @cached_property
    def prompts(self) -> list[Prompt]:
        return [self.builder(row) for row in ROWS]

    @cached_property
    def answers(self) -> Tensor:
        """(6, T) ordinary tokens, other ones in each row."""
        words: Any = self.builder.tokenizer
        ordinary = sorted({*range(min(len(words), self._vocabulary))} - {*words.all_special_ids, *self.banned})
        start = len(ordinary) // 3
        return torch.tensor(ordinary[start : start + 6 * TOKENS]).view(6, TOKENS)

    @property
    def _vocabulary(self) -> int:
        return int(self.interface.head.weight.shape[0])

    def logprobs(
        self, interface: Interface, prompts: Sequence[Prompt], answers: Tensor | None = None, share: bool = False,
        mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """(B, T) of the first rows of `answers`, in one pass."""
        answers = self.answers[: len(prompts)] if answers is None else answers
        mask = torch.ones_like(answers, dtype=torch.bool) if mask is None else mask
        scorer = PolicyWithCritic(interface.model, torch.nn.Identity(), self.banned, 1.0)
        return scorer(interface.pack(prompts, answers, mask, share), answers, False, False).logprobs_BT

    def alone(self, interface: Interface, prompts: Sequence[Prompt], answers: Tensor | None = None) -> Tensor:
        """The same, a pass a row."""
        answers = self.answers[: len(prompts)] if answers is None else answers
        return torch.cat([self.logprobs(interface, [p], answers[i : i + 1]) for i, p in enumerate(prompts)])


@contextmanager
def pixels(interface: Interface) -> Iterator[Interface]:
    """Inside, every pass sees pixels."""
    store = interface.features
    ways, store.ways = store.ways, ["off"]
    try:
        yield interface
    finally:
        store.ways = ways


def far(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def within(gap: float, limit: float, what: str) -> Verdict:
    return Verdict() if gap <= limit else Verdict("wrong", f"{what} by {gap:.2g}")  # a NaN is not within


def first_wrong(*verdicts: Verdict) -> Verdict:
    return next((verdict for verdict in verdicts if verdict.result != "yes"), Verdict())


def two_steps(subject: Subject) -> Verdict:
    """Two PPO steps of the language side's LoRA: the first ratio is exactly 1, and adapters move and stay finite."""
    trained = {n: p for n, p in subject.policy.model.named_parameters() if p.requires_grad}
    before = {name: weight.detach().clone() for name, weight in trained.items()}
    with tempfile.TemporaryDirectory() as folder:
        settings = {"total_episodes": 16, "samples_per_prompt": 2, "learning_rate": 1e-2, "response_length": TOKENS}
        trainer = tiny.trainer(subject.policy, Path(folder), ROWS, reward=reward, **settings)
        logs: list[dict[str, float]] = []
        trainer.log = lambda entry, *_: logs.append(entry)
        trainer.train()
    ratios = [entry["policy/ratio_first"] for entry in logs if "policy/ratio_first" in entry]
    if ratios != [1.0, 1.0]:
        return Verdict("wrong", f"the first ratios of two steps are {ratios}")
    if not all(torch.isfinite(weight).all() for weight in trained.values()):
        return Verdict("wrong", "weights are not finite")
    still = [name for name, weight in trained.items() if "lora_B" in name and torch.equal(weight, before[name])]
    return Verdict("wrong", f"{len(still)} weights did not move, as {still[0]}") if still else Verdict()


def encode_once(subject: Subject) -> Verdict:
    """Features give what pixels give: one row to the bit, and a shuffled batch in which pictures come twice."""
    interface = subject.interface
    if interface.features.way == "off":
        return Verdict("no", _note(subject, "pictures are encoded"))
    shuffled = [subject.prompts[i] for i in (2, 0, 1, 2, 0)]
    with pixels(interface):  # one by one: in a batch of several sizes some towers see padding
        expected = subject.alone(interface, shuffled)
    interface.features.clear()  # where pictures of one size are encoded together, rounding may differ
    if not torch.equal(expected[:1], subject.logprobs(interface, shuffled[:1])):
        return Verdict("wrong", "one row is not equal to the bit")
    interface.features.clear()
    seen = interface.features.misses
    gap = far(expected, subject.logprobs(interface, shuffled))
    if interface.features.misses - seen != 3:
        return Verdict("wrong", f"3 pictures were encoded {interface.features.misses - seen} times")
    return within(gap, SAME_ROW, "features change log-probabilities")


def adapter_off(subject: Subject) -> Verdict:
    """Without its adapter the policy is the checkpoint, to the bit; with it, it is not."""
    model, processor = load_pretrained(subject.config)
    bare = Interface(model.requires_grad_(False), processor, "off")
    bare.growth = subject.interface.growth
    expected = subject.logprobs(bare, subject.prompts)
    with pixels(subject.interface) as interface:
        trained = subject.logprobs(interface, subject.prompts)
        with subject.policy.model.disable_adapter():
            found = subject.logprobs(interface, subject.prompts)
    if torch.equal(trained, found):
        return Verdict("wrong", "the adapter changes nothing")
    return Verdict() if torch.equal(found, expected) else within(far(found, expected), 0.0, "log-probabilities change")


def padding(subject: Subject) -> Verdict:
    """Prompts of other lengths and picture sizes in one batch change nothing, on either side: see `agree`."""
    return agree(subject, subject.interface, subject.prompts[:3])


def agree(subject: Subject, interface: Interface, prompts: Sequence[Prompt]) -> Verdict:
    """A right-padded batch gives what rows alone give; so do sampling in a left-padded one, and shared prompts."""
    batched = far(subject.logprobs(interface, prompts), subject.alone(interface, prompts))
    twice = [prompt for prompt in prompts for _ in range(2)]
    torch.manual_seed(0)
    tokens, mask, drawn = sample_responses(interface, twice, Sampling(TOKENS, banned=tuple(subject.banned)), len(twice))
    assert mask.all()  # without stops
    alone = subject.alone(interface, twice, tokens)
    shared = subject.logprobs(interface, twice, tokens, share=True) if interface.share_prompts else alone
    return first_wrong(
        within(batched, OTHER_SHAPE, "rows change one another"),
        within(far(drawn, alone), OTHER_SHAPE, "sampling and scoring differ"),
        within(far(shared, alone), OTHER_SHAPE, "shared prompts change answers"),
    )


def save_reload(subject: Subject) -> Verdict:
    """The adapter from disk, on the checkpoint from disk, gives the same logits to the bit."""
    with pixels(subject.interface) as interface, tempfile.TemporaryDirectory() as folder:
        inputs = interface.pack(subject.prompts[:1], subject.answers[:1], subject.answers[:1] >= 0, False).inputs
        saved = save_adapter(subject.policy.model, Path(folder) / "adapter", inputs)
        again = load_adapter(subject.config, saved)
    expected, found = (model(**inputs).logits for model in (subject.policy.model, again.model))
    return Verdict() if torch.equal(expected, found) else within(far(expected, found), 0.0, "logits change")


def prompt_sharing(subject: Subject) -> Verdict:
    """Answers that share their prompt's pass have the log-probabilities and gradients of separate rows."""
    interface = subject.interface
    if not interface.share_prompts:
        return Verdict("no", _why_apart(subject))
    prompts = [subject.prompts[i] for i in (0, 0, 0, 1, 1)]
    lengths = torch.tensor([TOKENS, 2, 3, 1, TOKENS])
    mask = torch.arange(TOKENS)[None, :] < lengths[:, None]
    answers = subject.answers[:5]
    rows = interface.pack(prompts, answers, mask, True).inputs["input_ids"].shape[0]
    if rows >= len(prompts):
        return Verdict("wrong", "no two answers share a pass")
    weight = torch.randn(answers.shape, generator=torch.Generator().manual_seed(0)) * mask
    found = {}
    for share in (False, True):
        subject.policy.model.zero_grad()
        with torch.enable_grad():
            logprobs = subject.logprobs(interface, prompts, answers, share, mask)
            (logprobs * weight).sum().backward()
        trained = [p for p in subject.policy.model.parameters() if p.requires_grad and p.grad is not None]
        found[share] = logprobs.detach() * mask, torch.cat([p.grad.flatten() for p in trained])
    apart, together = found[False], found[True]
    relative = float((apart[1] - together[1]).norm() / apart[1].norm())
    return first_wrong(
        within(far(apart[0], together[0]), OTHER_SHAPE, "answers change"),
        within(relative, GRADIENT, "gradients change"),
    )


def several_pictures(subject: Subject) -> Verdict:
    """Two pictures in a prompt, beside rows of one: the second counts, and nothing else is lost."""
    try:
        two, other_two = subject.builder(TWO), subject.builder(OTHER_TWO)
    except UserError as error:
        return Verdict("no", str(error).removeprefix(f"row {TWO.id}: "))
    verdict = _mixed(subject, [two, other_two], subject.prompts[1:2])
    if verdict.result in ("yes", "apart"):
        one = [subject.logprobs(subject.interface, [prompt]) for prompt in (two, other_two)]
        if not far(*one) > 1e-3:
            return Verdict("wrong", "another second picture changes nothing")
    return verdict


def text_only(subject: Subject) -> Verdict:
    """Rows without a picture, beside rows with one."""
    return _mixed(subject, [subject.builder(TEXT)], subject.prompts[:2])


def _mixed(subject: Subject, prompts: list[Prompt], others: list[Prompt]) -> Verdict:
    """Whether such prompts go into one batch with others, else by themselves."""
    reason = ""
    for result, batch in (("yes", [*prompts, *others]), ("apart", prompts)):
        interface = Interface(subject.policy.model, subject.builder)
        try:
            check(interface, batch)
        except UserError as error:
            reason = str(error)
            continue
        found = agree(subject, interface, batch)
        if found.result == "yes":
            with pixels(interface):
                expected = subject.alone(interface, batch)
            found = within(far(subject.logprobs(interface, batch), expected), SAME_ROW, "features change answers")
        return Verdict(result, reason) if found.result == "yes" else found
    return Verdict("no", reason)


def _note(subject: Subject, start: str) -> str:
    return next((note.partition(": ")[2] for note in subject.notes if note.startswith(start)), "")


def _why_apart(subject: Subject) -> str:
    if subject.interface.encoder_decoder:
        return "answers are a decoder's own rows, which hold no prompt"
    if "position_ids" not in subject.interface.takes:
        return "its forward takes no position ids"
    return _note(subject, "each response computes")


NEEDED: dict[str, Callable[[Subject], Verdict]] = {
    "two_steps": two_steps,
    "adapter_off": adapter_off,
    "padding": padding,
    "save_reload": save_reload,
}
EXAMINATIONS = NEEDED | {
    "encode_once": encode_once,
    "prompt_sharing": prompt_sharing,
    "several_pictures": several_pictures,
    "text_only": text_only,
}


def examine(name: str, folder: Path) -> FamilyReport:
    """Every examination of one family, whose checkpoint `zoo.build` saved in `folder`."""
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(0)
        subject = Subject(folder)
        verdicts = {}
        for examination, function in EXAMINATIONS.items():
            with torch.set_grad_enabled(function is two_steps):
                try:
                    verdicts[examination] = function(subject)
                except Exception as error:
                    line = (str(error).strip() or type(error).__name__).splitlines()[0]
                    verdicts[examination] = Verdict("wrong", f"{type(error).__name__}: {line}")
            if function is two_steps and verdicts["two_steps"].result != "yes":
                return FamilyReport(name, verdicts)
    interface = subject.interface
    growth = dict(interface.growth)
    return FamilyReport(
        name, verdicts, interface.features.way, interface.decoder, interface.share_prompts, growth, subject.notes
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Neither warnings of tiny models nor progress bars."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        transformers_logging.set_verbosity(before)
        transformers_logging.enable_progress_bar()


def main(arguments: Sequence[str]) -> int:
    folder = Path(arguments[0])
    if reason := next((reason for name in arguments[1:] if (reason := zoo.missing(name))), ""):
        print(f"skipped: {reason}")
        return 0
    for name in arguments[1:]:
        print(examine(name, zoo.build(name, folder / name)).to_json(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
