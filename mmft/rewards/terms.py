"""Reward terms by name. A term scores a batch of captions; `combine.RewardFunction` normalises, weights and sums terms.

A new term is a subclass of `Term` under `@register("name")`; its constructor's keywords are its options in a recipe.
Captions come decoded, without special tokens. Rows come without the oracle.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, TypeVar

from mmft.metrics.bleu import SMOOTHING, sentence_bleu
from mmft.metrics.chrf import chrf
from mmft.metrics.cider import CiderBetween, CiderD
from mmft.metrics.rouge_l import rouge_l
from mmft.metrics.text import bad_ending, repetition_rate, tokenise
from mmft.metrics.vqa import exact_match, vqa_accuracy
from mmft.rewards.detail import Detail
from mmft.rewards.python_function import call, load_function
from mmft.types import Row, UserError


class Term:
    """One measure of captions.

    needs_references, needs_answers: rows must hold reference captions, or an answer. needs_fit: `fit` must see the
    training rows first.
    needs_images: rows must hold their pictures, in other processes too.
    sign: +1 when more is better, -1 for a cost; weights in recipes are never negative.
    """

    needs_references: ClassVar[bool] = False
    needs_answers: ClassVar[bool] = False
    needs_fit: ClassVar[bool] = False
    needs_images: ClassVar[bool] = False
    sign: int = 1

    def fit(self, rows: Sequence[Row]) -> None:
        """Collects statistics from training rows (their pictures are left out)."""

    def __call__(
        self, captions: Sequence[str], rows: Sequence[Row], finished: Sequence[bool] | None = None
    ) -> list[float]:
        """B captions of B rows -> B floats, as measured: a cost is positive.

        finished: whether EOS was reached; None = all were.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What `fit` learned, JSON-ready."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""


TERMS: dict[str, type[Term]] = {}
T = TypeVar("T", bound=type[Term])


def register(name: str) -> Callable[[T], T]:
    """Class decorator: makes a term known to recipes as `type: name`."""

    def add(cls: T) -> T:
        if TERMS.setdefault(name, cls) is not cls:
            raise ValueError(f"reward term {name!r} is registered twice")
        return cls

    return add


def terms_without(references: bool = False, answers: bool = False) -> list[str]:
    """Names of the terms that can be used on rows without references, without answers, or without both."""
    return sorted(
        name
        for name, term in TERMS.items()
        if not (references and term.needs_references) and not (answers and term.needs_answers)
    )


def build_term(kind: str, **options: Any) -> Term:
    """A term by its registered name and its options. Raises UserError for a name or an option that does not exist."""
    if kind not in TERMS:
        close = difflib.get_close_matches(kind, TERMS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(TERMS))}"
        raise UserError(f"reward term {kind!r} does not exist; {hint}")
    try:
        return TERMS[kind](**options)
    except (TypeError, ValueError) as error:
        raise UserError(f"reward term {kind!r}: {error}") from error


@register("bleu")
class BleuTerm(Term):
    """BLEU(c, c*) of E34: sentence BLEU by sacrebleu against all references, in [0, 1]."""

    needs_references = True

    def __init__(self, max_order: int = 4, smoothing: str = "exp", smooth_value: float | None = None):
        if smoothing not in SMOOTHING:
            raise ValueError(f"smoothing {smoothing!r} is not one of {', '.join(SMOOTHING)}")
        self.bleu = partial(sentence_bleu, max_order=max_order, smoothing=smoothing, smooth_value=smooth_value)

    def __call__(
        self, captions: Sequence[str], rows: Sequence[Row], finished: Sequence[bool] | None = None
    ) -> list[float]:
        return [self.bleu(c, row.references) for c, row in zip(captions, rows, strict=True)]


@register("detail")
class DetailTerm(Term):
    """Detail(c) of E34: informative content, supported and complete. Maths and options: `mmft.rewards.detail`."""

    needs_references = True
    needs_fit = True

    def __init__(self, **options: float):
        self.detail = Detail(**options)

    def fit(self, rows: Sequence[Row]) -> None:
        self.detail.fit(row.references for row in rows)

    def __call__(
        self, captions: Sequence[str], rows: Sequence[Row], finished: Sequence[bool] | None = None
    ) -> list[float]:
        return [self.detail.score(c, row.references).value for c, row in zip(captions, rows, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        return self.detail.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.detail.load_state_dict(state)


@register("cider_d")
class CiderDTerm(Term):
    """CIDEr-D against all references, in [0, 10]; document frequencies are those of the training references.

    contrast: how much of what the caption earns by other pictures' references is taken off (CIDErBtw). At 1 no caption
    earns anything, on average, that was written without looking. The others are pictures of the training set.
    """

    needs_references = True
    needs_fit = True
    others = 256  # pictures

    def __init__(self, max_order: int = 4, sigma: float = 6.0, count_end: bool = True, contrast: float = 0.0):
        self.cider = CiderD(max_order, sigma, count_end)
        self.contrast = contrast
        self._of_others: dict[str, Sequence[str]] = {}
        self._between: CiderBetween | None = None

    def fit(self, rows: Sequence[Row]) -> None:
        self.cider.fit(row.references for row in rows)
        if self.contrast:
            spread = max(1, len(rows) // self.others)
            self._compare_with({row.id: row.references for row in rows[::spread][: self.others]})

    def _compare_with(self, others: dict[str, Sequence[str]]) -> None:
        self._of_others, self._between = others, CiderBetween(self.cider, others)

    def __call__(
        self, captions: Sequence[str], rows: Sequence[Row], finished: Sequence[bool] | None = None
    ) -> list[float]:
        """A caption that was cut off has no end that could agree with a reference's."""
        ends = [True] * len(captions) if finished is None else finished
        return [self._score(caption, row, end) for caption, row, end in zip(captions, rows, ends, strict=True)]

    def _score(self, caption: str, row: Row, ended: bool) -> float:
        own = self.cider.score(caption, row.references, ended)
        return own if self._between is None else own - self.contrast * self._between.score(caption, row.id, ended)

    def state_dict(self) -> dict[str, Any]:
        others = {key: list(references) for key, references in self._of_others.items()}
        return self.cider.state_dict() | ({"others": others} if others else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.cider.load_state_dict(state)
        if self.contrast:
            self._compare_with(state["others"])


class _AgainstReferences(Term):
    """A plain function of a caption and its references."""

    needs_references = True
    metric: ClassVar[Callable[[str, Sequence[str]], float]]

    def __call__(
        self, captions: Sequence[str], rows: Sequence[Row], finished: Sequence[bool] | None = None
    ) -> list[float]:
        return [type(self).metric(caption, row.references) for caption, row in zip(captions, rows, strict=True)]


@register("rouge_l")
class RougeLTerm(_AgainstReferences):
    """ROUGE-L F1, the best over the references, in [0, 1]."""

    metric = rouge_l


@register("chrf")
class ChrfTerm(_AgainstReferences):
    """chrF by sacrebleu, against the nearest reference, in [0, 1]."""

    metric = chrf


class _AgainstAnswers(Term):
    """A plain function of an answer and what people answered. Raises UserError for a row without answers."""

    needs_answers = True
    metric: ClassVar[Callable[[str, Sequence[str]], float]]

    def __call__(
        self, captions: Sequence[str], rows: Sequence[Row], finished: Sequence[bool] | None = None
    ) -> list[float]:
        return [type(self).metric(text, row.known_answers) for text, row in zip(captions, rows, strict=True)]


@register("vqa_accuracy")
class VqaAccuracyTerm(_AgainstAnswers):
    """VQA accuracy of an answer, in [0, 1]: as far as three people agree; with one known answer, exact match."""

    metric = vqa_accuracy


@register("exact_match")
class ExactMatchTerm(_AgainstAnswers):
    """1 for an answer that somebody gave, after the normalisation of VQA, else 0."""

    metric = exact_match


@register("clip_score")
class ClipScoreTerm(Term):
    """CLIPScore of caption and picture, or with `references` RefCLIPScore: `mmft.models.clip_score`."""

    needs_images = True

    def __init__(self, model: str, references: bool = False, prompt: str = "A photo depicts"):
        from mmft.models.clip_score import ClipScore

        self.needs_references = references  # type: ignore[misc]
        self.clip = ClipScore(model, prompt)

    def __call__(
        self, captions: Sequence[str], rows: Sequence[Row], finished: Sequence[bool] | None = None
    ) -> list[float]:
        return self.clip(captions, rows, self.needs_references)


@register("length")
class LengthTerm(Term):
    """Length(c) of E34: words outside the band `target` = [low, high], so the weight is a price per word."""

    sign = -1

    def __init__(self, target: tuple[int, int] = (4, 20)):
        self.low, self.high = target
        if not 0 <= self.low <= self.high:
            raise ValueError(f"target [{self.low}, {self.high}] is not a band of word counts")

    def __call__(
        self, captions: Sequence[str], rows: Sequence[Row], finished: Sequence[bool] | None = None
    ) -> list[float]:
        counts = [len(tokenise(caption)) for caption in captions]
        return [float(max(0, self.low - count, count - self.high)) for count in counts]


@register("repetition")
class RepetitionTerm(Term):
    """Share of content words said again, in [0, 1): `mmft.metrics.text.repetition_rate`."""

    sign = -1

    def __init__(self, ngram: int = 2):
        if ngram < 1:
            raise ValueError(f"ngram must be at least 1, not {ngram}")
        self.ngram = ngram

    def __call__(
        self, captions: Sequence[str], rows: Sequence[Row], finished: Sequence[bool] | None = None
    ) -> list[float]:
        return [repetition_rate(caption, self.ngram) for caption in captions]


@register("bad_ending")
class BadEndingTerm(Term):
    """1 for a caption that is cut off, empty or left hanging, else 0: `mmft.metrics.text.bad_ending`."""

    sign = -1

    def __call__(
        self, captions: Sequence[str], rows: Sequence[Row], finished: Sequence[bool] | None = None
    ) -> list[float]:
        ends = [True] * len(captions) if finished is None else finished
        return [float(bad_ending(caption, end)) for caption, end in zip(captions, ends, strict=True)]


@register("python")
class PythonTerm(Term):
    """A function of the user's: `module:function`, called as f(captions, rows) -> one number a caption."""

    needs_images = True  # it may look

    def __init__(self, function: str, sign: int = 1):
        if sign not in (1, -1):
            raise ValueError(f"sign must be 1 or -1, not {sign}")
        self.name, self.sign = function, sign
        self.function = load_function(function)

    def __call__(
        self, captions: Sequence[str], rows: Sequence[Row], finished: Sequence[bool] | None = None
    ) -> list[float]:
        return call(self.function, self.name, captions, rows)
