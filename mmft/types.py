"""Shared data types, and the legend of shapes and masks. Imports no torch at run time.

Shape suffixes (`logprobs_BT` is a tensor of shape B x T):
    B  rows of a batch (samples)          T  response (generated) positions
    P  prompt positions, padding included L  prompt + response positions
    D  hidden size                        V  vocabulary size
    K  discrete actions                   M  modalities
Time: `value_BT[:, t]` is V(s_t), the value of the state *before* token t is chosen; `next_value_BT[:, t]` is
    V(s_{t+1}).
Masks: every `*_mask` is True = keep, everywhere.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


class UserError(Exception):
    """Something the user can put right: one clear line naming what is wrong, and where.

    The command line prints the message without a traceback and exits with status 2.
    """


class Stopped(Exception):
    """A run was asked to leave by a signal, and has: everything is as after the last whole step."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by signal {signum}")
        self.signum = signum

    @property
    def exit_status(self) -> int:
        """As shells have it: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.signum


@dataclass(frozen=True)
class Row:
    """One row of data: a picture, what is asked about it, and what people said of it.

    `image` is a decoded RGB picture or None for text alone; `more_images` are further pictures of the same prompt,
    after it. `references` are zero or more reference captions. `answers` are what several people answered, where more
    than `answer` is known.
    `scene` is the exact scene graph of a synthetic picture: an oracle for evaluation, never visible to a reward.
    """

    id: str
    image: Image | None
    prompt: str
    references: tuple[str, ...] = ()
    question: str | None = None
    answer: str | None = None
    scene: Any = None
    more_images: tuple[Image, ...] = ()
    answers: tuple[str, ...] = ()

    @property
    def pictures(self) -> tuple[Image, ...]:
        """All pictures of the prompt, in order."""
        return () if self.image is None else (self.image, *self.more_images)

    @property
    def is_asked(self) -> bool:
        """Whether the prompt asks the question; some data has questions beside a prompt that asks something else."""
        return self.question is not None and self.question in self.prompt

    @property
    def known_answers(self) -> tuple[str, ...]:
        """Everybody's answers. Raises UserError where there is none."""
        known = self.answers or ((self.answer,) if self.answer is not None else ())
        if not known:
            raise UserError(f"row {self.id!r} has no answer to compare with; name its column in data.columns.answer")
        return known

    def for_reward(self) -> Row:
        """The row as a reward may see it: without the oracle."""
        return dataclasses.replace(self, scene=None)


@dataclass(frozen=True)
class Needs:
    """What each row must hold, by who needs it, in words, as "reward term 'bleu'"; None: nobody does."""

    references: str | None = None
    answers: str | None = None


NOTHING_NEEDED = Needs()


@dataclass(frozen=True)
class RewardOutput:
    """Rewards of B samples, with every term as measured, as normalised and as weighted.

    total: B floats, the sum over terms of `weighted`; raw, normalized, weighted: term name -> B floats.
    dropped: samples that have no reward, because a term failed on them.
    """

    total: list[float]
    raw: dict[str, list[float]] = field(default_factory=dict)
    normalized: dict[str, list[float]] = field(default_factory=dict)
    weighted: dict[str, list[float]] = field(default_factory=dict)
    dropped: tuple[int, ...] = ()


@dataclass
class LossOutput:
    """A scalar loss (0-d tensor, differentiable) and detached metrics, name -> float or 0-d tensor."""

    loss: torch.Tensor
    metrics: dict[str, Any] = field(default_factory=dict)
