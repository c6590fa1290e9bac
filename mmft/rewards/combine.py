"""The reward: terms measured, normalised, weighted and summed, with every step of it kept for the log."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mmft.functional.normalize import RunningStats, minmax, zscore
from mmft.rewards.parallel import ParallelTerm, WorkerDied
from mmft.rewards.shaping import prefix_potentials
from mmft.rewards.terms import Term, build_term
from mmft.types import NOTHING_NEEDED, Needs, RewardOutput, Row, UserError

if TYPE_CHECKING:
    from mmft.config import RewardConfig

logger = logging.getLogger(__name__)
Gather = Callable[[Sequence[float]], list[float]]
NORMALIZERS = ("none", "minmax", "zscore")
_CAPTION_TERMS = ("bleu", "detail", "length")
_SHAPING = "(shaping)"  # in a state dict; no term can be called so


def weighted_sum(rewards: Mapping[str, Sequence[float]], weights: Mapping[str, float]) -> list[float]:
    """Reward of several modalities or terms.

    Equation: E28
        R = sum_m w_m R_m(s^m, a^m)

    Args:
        rewards: term m -> R_m of B samples.
        weights: term m -> w_m, for every term in `rewards`; negative for a cost.

    Returns:
        R of B samples.
    """
    columns = [[weights[name] * value for value in values] for name, values in rewards.items()]
    return [math.fsum(sample) for sample in zip(*columns, strict=True)]


def caption_reward(
    bleu: Sequence[float], detail: Sequence[float], length: Sequence[float], alpha: float, beta: float, gamma: float
) -> list[float]:
    """Reward of captions c with references c*.

    Equation: E34
        R = alpha BLEU(c, c*) + beta Detail(c) - gamma Length(c)

    Args:
        bleu, detail, length: the terms of B captions, normalised where the recipe says so.
        alpha, beta, gamma: their weights, at least 0.

    Returns:
        R of B captions.
    """
    return [alpha * b + beta * d - gamma * n for b, d, n in zip(bleu, detail, length, strict=True)]


@dataclass
class WeightedTerm:
    """A term as a recipe lists it: named (a term type may be listed twice), weighted and normalised.

    training_only: it counts in training (update=True) and is only reported in evaluation.
    """

    name: str
    term: Term
    weight: float = 1.0
    normalize: str = "none"
    training_only: bool = False
    stats: RunningStats = field(default_factory=RunningStats)

    def __post_init__(self) -> None:
        if self.normalize not in NORMALIZERS:
            raise UserError(f"reward term {self.name!r}: normalize {self.normalize!r} is not {', '.join(NORMALIZERS)}")
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise UserError(f"reward term {self.name!r}: weight {self.weight} is not a finite number of at least 0")

    @property
    def signed_weight(self) -> float:
        return self.term.sign * self.weight

    def measure(
        self, captions: list[str], rows: list[Row], finished: Sequence[bool] | None, drop: bool = False
    ) -> tuple[list[float], dict[int, str]]:
        """The raw values; and of the samples on which the term fails, which have NaN, why.

        Raises UserError naming the term and the first such sample unless they are to be dropped.
        """
        cause: Exception | None = None
        failed: dict[int, str] = {}
        try:
            values = self._values(captions, rows, finished)
        except WorkerDied:  # asked again of each caption, a new one would die
            raise
        except Exception as error:
            cause = error
            values, failed = self._one_by_one(captions, rows, finished, error)
        failed |= {i: f"gave {value}" for i, value in enumerate(values) if i not in failed and not math.isfinite(value)}
        if failed and not drop:
            i = min(failed)
            raise UserError(self.complaint(failed[i], rows[i], captions[i])) from cause
        return [math.nan if i in failed else value for i, value in enumerate(values)], failed

    def complaint(self, reason: str, row: Row, caption: str) -> str:
        return f"reward term {self.name!r} {reason} for sample {row.id!r}, caption {caption[:200]!r}"

    def _values(self, captions: list[str], rows: list[Row], finished: Sequence[bool] | None) -> list[float]:
        values = [float(value) for value in self.term(captions, rows, finished)]
        if len(values) != len(captions):
            raise UserError(f"it gave {len(values)} values for {len(captions)} captions")
        return values

    def _one_by_one(
        self, captions: list[str], rows: list[Row], finished: Sequence[bool] | None, error: Exception
    ) -> tuple[list[float], dict[int, str]]:
        """Which samples of a batch a term fails on. Raises UserError where it fails on the batch alone."""
        values, failed = [], {}
        for i, (caption, row) in enumerate(zip(captions, rows, strict=True)):
            try:
                values += self._values([caption], [row], None if finished is None else [finished[i]])
            except WorkerDied:
                raise
            except Exception as own:
                values.append(math.nan)
                failed[i] = f"failed ({_line_of(own)})"
        if not failed:
            reason = f"fails on a batch of {len(rows)} captions, on none of them alone ({_line_of(error)})"
            raise UserError(f"reward term {self.name!r} {reason}") from error
        return values, failed

    def normalized(self, values: list[float], update: bool, gather: Gather) -> list[float]:
        """E06 or E07 with the running statistics; with none yet, and none to be taken, the values as they are."""
        if self.normalize == "none":
            return list(values)
        if update and (known := [value for value in gather(values) if not math.isnan(value)]):
            self.stats.update(known)
        if not self.stats.count:
            return list(values)
        if self.normalize == "minmax":
            return [float(v) for v in minmax(values, self.stats.min, self.stats.max)]
        return [float(v) for v in zscore(values, self.stats.mean, self.stats.std)]


@dataclass
class Shaping:
    """Potential-based shaping (E15): weight, and the term whose value of a partial caption is the potential."""

    beta: float
    term: Term


class RewardFunction:
    """R of B captions from weighted terms: `check` the data, `fit` on the training rows, then call.

    Normalisers learn from calls with update=True (training) and are frozen with update=False (evaluation). `state_dict`
    holds all that was learned, JSON-ready. No term sees the oracle: rows pass through `Row.for_reward`. `shaping` is
    not part of R: a trainer asks for `potentials` and adds them to the rewards of single tokens.

    on_error: what happens where a term fails on a sample, or gives no finite number: "raise" stops, "drop" leaves the
    sample without a reward and tells `on_drop`. gather: makes of one process's values those of all, for normalisers
    that are the same in each.
    """

    def __init__(
        self,
        terms: Sequence[WeightedTerm],
        shaping: Shaping | None = None,
        on_error: Literal["raise", "drop"] = "raise",
    ):
        self.shaping = shaping
        self.on_error = on_error
        self.on_drop: Callable[[str, Row, str], None] = lambda reason, row, caption: logger.warning(
            "dropped: %s", reason
        )
        self.gather: Gather = list
        names = [term.name for term in terms]
        if not names:
            raise UserError("the reward has no terms")
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"two reward terms are named {name!r}; give one of them another `name`")
        self.terms = {term.name: term for term in terms}

    @property
    def needs(self) -> Needs:
        """What rows must hold, by the first term that needs it."""
        terms = self._all_terms().items()
        references = (f"reward term {name!r}" for name, term in terms if term.needs_references)
        answers = (f"reward term {name!r}" for name, term in terms if term.needs_answers)
        return Needs(next(references, None), next(answers, None))

    def check(self, rows: Iterable[Row]) -> None:
        """Raises UserError, naming term and row, when a row lacks what a term needs."""
        needs = self.needs
        if needs == NOTHING_NEEDED:
            return
        for row in rows:
            if needs.references and not any(reference.strip() for reference in row.references):
                raise UserError(f"{needs.references} needs references, and row {row.id!r} has none")
            if needs.answers and row.answer is None and not row.answers:
                raise UserError(f"{needs.answers} needs an answer, and row {row.id!r} has none")

    def fit(self, rows: Iterable[Row]) -> None:
        """Lets terms collect statistics from training rows. Pictures are not kept, so rows may be any lazy iterable."""
        fitting = [term for term in self._all_terms().values() if term.needs_fit]
        if fitting:
            texts = [dataclasses.replace(row.for_reward(), image=None) for row in rows]
            for term in fitting:
                term.fit(texts)

    def _all_terms(self) -> dict[str, Term]:
        shaping = {"shaping": self.shaping.term} if self.shaping is not None else {}
        return {name: entry.term for name, entry in self.terms.items()} | shaping

    def potentials(self, prefixes: Sequence[Sequence[str]], rows: Sequence[Row]) -> list[list[float]]:
        """Phi(s_t) of the partial captions before each token, for the trainer's `shaped_reward`."""
        if self.shaping is None:
            raise ValueError("this reward has no shaping")
        try:
            return prefix_potentials(self.shaping.term, prefixes, rows)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"reward term 'shaping' failed ({_line_of(error)})") from error

    def __call__(
        self,
        captions: Sequence[str],
        rows: Sequence[Row],
        finished: Sequence[bool] | None = None,
        update: bool = True,
    ) -> RewardOutput:
        """Scores B captions of B rows. finished: whether EOS was reached, None = all were; update: see the class."""
        if len(captions) != len(rows) or (finished is not None and len(finished) != len(rows)):
            raise ValueError(f"{len(captions)} captions, {len(rows)} rows: not the same number of samples")
        texts, visible = list(captions), [row.for_reward() for row in rows]
        output = RewardOutput(total=[])
        # All terms are measured before any statistic moves: a term that fails leaves the state as it was.
        failed: dict[int, str] = {}
        for name, entry in self.terms.items():
            output.raw[name], why = entry.measure(texts, visible, finished, self.on_error == "drop")
            failed |= {i: entry.complaint(reason, rows[i], texts[i]) for i, reason in why.items() if i not in failed}
        kept: list[float] = [len(rows) - len(failed)]
        if update and self.on_error == "drop":  # in each process, whether one of its own captions failed or not
            kept = self.gather(kept)
        if failed:
            if not any(kept):
                raise UserError(f"no caption of the batch has a reward: {next(iter(failed.values()))}")
            for i, reason in failed.items():
                self.on_drop(reason, rows[i], texts[i])
            output.raw.update(
                {n: [math.nan if i in failed else v for i, v in enumerate(output.raw[n])] for n in self.terms}
            )
        for name, entry in self.terms.items():
            output.normalized[name] = entry.normalized(output.raw[name], update, self.gather)
            weight = 0.0 if entry.training_only and not update else entry.signed_weight
            output.weighted[name] = [weight * value for value in output.normalized[name]]
        counted = {n: v for n, v in output.normalized.items() if update or not self.terms[n].training_only}
        total = [0.0 if i in failed else value for i, value in enumerate(self._total(counted, len(texts)))]
        return dataclasses.replace(output, total=total, dropped=tuple(sorted(failed)))

    def _total(self, values: Mapping[str, list[float]], count: int) -> list[float]:
        """E34 for the caption terms, E28 for it together with the others."""
        weights = {name: entry.signed_weight for name, entry in self.terms.items()}
        absent = [0.0] * count
        bleu, detail, length = (values.get(name, absent) for name in _CAPTION_TERMS)
        alpha, beta, negative_gamma = (weights.get(name, 0.0) for name in _CAPTION_TERMS)
        caption = caption_reward(bleu, detail, length, alpha, beta, -negative_gamma)
        others = {name: column for name, column in values.items() if name not in _CAPTION_TERMS}
        return weighted_sum({"caption": caption, **others}, {**weights, "caption": 1.0})

    def reference_reward(self, rows: Iterable[Row], leave_one_out: bool = True) -> float:
        """What people get: the mean reward of a row's references, averaged over rows; the ceiling in evaluation.

        leave_one_out: each reference is scored against the others of its row, and rows with fewer than two are passed
        over. It asks how well one person agrees with others, and is a fair ceiling when references are interchangeable.
        Where they differ by design (a full account, a short one) a policy that says one of them exactly can pass it;
        False scores each against all, itself included, as a policy's captions are. Statistics stay as they are. NaN
        when no row is left. References without a reward (`on_error`) don't count.
        """
        captions: list[str] = []
        targets: list[Row] = []
        sizes: list[int] = []
        for row in rows:
            references, k = row.references, len(row.references)
            if k >= (2 if leave_one_out else 1):
                sizes.append(k)
                captions += references
                others = [references[:i] + references[i + 1 :] if leave_one_out else references for i in range(k)]
                targets += [dataclasses.replace(row, references=t) for t in others]
        if not captions:
            return math.nan
        output = self(captions, targets, update=False)
        totals = iter([math.nan if i in output.dropped else value for i, value in enumerate(output.total)])
        known = [[value for value in itertools.islice(totals, k) if not math.isnan(value)] for k in sizes]
        means = [math.fsum(values) / len(values) for values in known if values]
        return math.fsum(means) / len(means)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            name: {"stats": entry.stats.state_dict(), "term": entry.term.state_dict()}
            for name, entry in self.terms.items()
        }
        return state if self.shaping is None else {**state, _SHAPING: self.shaping.term.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back a `state_dict`. Raises UserError when it is of other terms."""
        saved = set(state) - {_SHAPING}
        if saved != set(self.terms):
            raise UserError(f"the saved reward has terms {sorted(saved)}, the recipe has {sorted(self.terms)}")
        if self.shaping is not None and _SHAPING in state:
            self.shaping.term.load_state_dict(state[_SHAPING])
        for name, entry in self.terms.items():
            entry.stats.load_state_dict(state[name]["stats"])
            entry.term.load_state_dict(state[name]["term"])


def build_reward(config: RewardConfig, device: str = "cpu") -> RewardFunction:
    """The reward of a recipe: the terms of `config`, and those of its learned model with their learned weights.

    config: `recipe.reward`, whose `terms` hold type, name, weight, normalize and the options of their type. A term
    listed beside a model takes the place of the model's term of that name; one with weight 0 is left out.
    device: where a learned model runs.

    Raises UserError for a model that is not there, and for terms that are not.
    """
    terms = {term.name: term for term in _learned_terms(config, device)}
    for entry in config.terms:
        options = entry.model_dump(exclude={"type", "name", "weight", "normalize"})
        term = (
            ParallelTerm(entry.type, options, config.workers) if config.workers else build_term(entry.type, **options)
        )
        terms[entry.label] = WeightedTerm(entry.label, term, entry.weight, entry.normalize)
        if config.model is not None and not entry.weight:
            del terms[entry.label]
    shaping = None
    if config.shaping is not None and config.shaping.beta:
        potential = config.shaping.potential
        options = potential.model_dump(exclude={"type", "name", "weight", "normalize"})
        shaping = Shaping(config.shaping.beta, build_term(potential.type, **options))
    return RewardFunction(list(terms.values()), shaping, config.on_error)


def _line_of(error: Exception) -> str:
    line = (str(error).splitlines() or [""])[0]
    return line if isinstance(error, UserError) else f"{type(error).__name__}: {line}"


def _learned_terms(config: RewardConfig, device: str) -> list[WeightedTerm]:
    if config.model is None:
        return []
    # Here, not above: a reward of plain terms needs no transformers, nor do the processes of `ParallelTerm`.
    from mmft.models.reward import load_reward_model
    from mmft.rewards import learned

    model = load_reward_model(config.model, device)
    weights = learned.learned_weights(model.config)
    terms = [
        WeightedTerm(learned.label_of(entry), learned.term_of(entry), weights[learned.label_of(entry)])
        for entry in model.config.terms
    ]
    if model.fusion is None:
        if config.uncertainty_penalty:
            raise UserError(f"reward.uncertainty_penalty: {config.model!r} has no network, so no uncertainty")
        return terms
    network = learned.NetworkTerm(model)
    uncertainty = learned.UncertaintyTerm(network)
    return [
        *terms,
        WeightedTerm(learned.NETWORK, network, weights[learned.NETWORK]),
        # In the units in which the network counts, or kappa would mean something else for every model.
        WeightedTerm(
            learned.UNCERTAINTY, uncertainty, config.uncertainty_penalty * weights[learned.NETWORK], training_only=True
        ),
    ]
