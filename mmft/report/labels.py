"""How a metric is named, written and judged wherever people read it: in the terminal and in the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

NOTHING = "–"
Summary = Mapping[str, "float | None"]  # mean, low, high

# Trainer metrics that are 0 before the first step: the policy is still its reference.
DRIFT = ("objective/kl", "anchor/l2_distance")


@dataclass(frozen=True)
class Label:
    """`better`: +1 where more is better, -1 where less is, 0 where neither can be said. `percent`: written as %."""

    text: str
    better: int = 0
    percent: bool = False

    def number(self, value: float | None) -> str:
        if value is None:
            return NOTHING
        return f"{100 * value:.1f}%" if self.percent else f"{value:.3f}"

    def change(self, value: float | None) -> str:
        """Of a share in percentage points, so that 40% -> 44% does not read as +10%."""
        if value is None:
            return NOTHING
        return f"{100 * value:+.1f} pt" if self.percent else f"{value:+.3f}"

    def interval(self, summary: Summary, sign: str = "") -> str:
        """ "[low, high]", in the unit of the number before it; empty where there is none."""
        low, high = summary.get("low"), summary.get("high")
        if low is None or high is None:
            return ""
        scale, digits = (100, 1) if self.percent else (1, 3)
        return f"[{scale * low:{sign}.{digits}f}, {scale * high:{sign}.{digits}f}]"


LABELS: dict[str, Label] = {
    "reward": Label("Reward", +1),
    "bleu_4": Label("BLEU-4", +1),
    "rouge_l": Label("ROUGE-L", +1),
    "chrf": Label("chrF", +1),
    "cider_d": Label("CIDEr-D", +1),
    "vqa_accuracy": Label("VQA accuracy", +1, percent=True),
    "exact_match": Label("Exact match", +1, percent=True),
    "length": Label("Caption length"),
    "repetition": Label("Repetition", -1, percent=True),
    "bad_ending": Label("Bad endings", -1, percent=True),
    "finished": Label("Finished", +1, percent=True),
    "oracle_precision": Label("Oracle precision", +1, percent=True),
    "oracle_recall": Label("Oracle recall", +1, percent=True),
    "oracle_f1": Label("Oracle F1", +1, percent=True),
    "oracle_hallucination": Label("Oracle hallucination", -1, percent=True),
    "oracle_attribute": Label("Oracle attributes", +1, percent=True),
    "oracle_count": Label("Oracle counts", +1, percent=True),
    "objective/kl": Label("KL to the reference"),
    "anchor/l2_distance": Label("L2 distance"),
}
# Terms that are costs: less is better. A term of the user's own has no direction here.
_TERMS = {
    "bleu": +1, "detail": +1, "length": -1, "repetition": -1, "bad_ending": -1, "network": +1, "uncertainty": -1,
}  # fmt: skip


def label(name: str) -> Label:
    if name in LABELS:
        return LABELS[name]
    if name.startswith("term_"):
        term = name.removeprefix("term_")
        return Label(f"Term: {term}", _TERMS.get(term, 0))
    return Label(name)


def in_order(names: Iterable[str]) -> list[str]:
    """Reward, its terms, then the others as listed above; unknown ones last."""
    known = list(LABELS)

    def rank(name: str) -> tuple[int, int, str]:
        if name == "reward":
            return (0, 0, name)
        if name.startswith("term_"):
            return (1, 0, "")  # sorting is stable: terms stay in the recipe's order
        return (2, known.index(name), name) if name in known else (3, 0, name)

    return sorted(dict.fromkeys(names), key=rank)


@dataclass(frozen=True)
class Cell:
    value: str = ""
    interval: str = ""

    def __str__(self) -> str:
        return f"{self.value} {self.interval}".strip()


@dataclass(frozen=True)
class Comparison:
    """One line of the before/after table: values and their intervals as text.

    verdict: better, worse, changed, unclear, same, or empty where there is nothing to compare.
    """

    label: Label
    before: Cell
    after: Cell
    change: Cell
    verdict: str


def comparisons(record: Mapping[str, Any], training: Mapping[str, Any] | None = None) -> list[Comparison]:
    """The lines of an `eval.json`, then how far the policy moved, from the last line of `metrics.jsonl`."""
    before, after = record.get("before") or {}, record.get("after") or {}
    difference = record.get("difference") or {}
    lines = []
    for name in in_order([*before, *after]):
        what, change = label(name), difference.get(name)
        old, new = _value(what, before.get(name)), _value(what, after.get(name))
        lines.append(Comparison(what, old, new, _change(what, change), verdict(what, change)))
    for name in DRIFT:
        value = (training or {}).get(name)
        if isinstance(value, (int, float)):
            what = label(name)
            lines.append(Comparison(what, Cell(what.number(0.0)), Cell(what.number(value)), Cell(), ""))
    return lines


def verdict(what: Label, change: Summary | None) -> str:
    """Only an interval that leaves out zero says anything."""
    if not change or change.get("mean") is None:
        return ""
    low, high = change["low"], change["high"]
    if low is None or high is None or low <= 0 <= high:
        return "same" if low == high == 0 else "unclear"
    sign = 1 if low > 0 else -1
    return "changed" if what.better == 0 else "better" if sign == what.better else "worse"


def summary_line(record: Mapping[str, Any]) -> str:
    """What the table is of, and where the references stand."""
    parts = [f"{record['samples']} samples"] if record.get("samples") else []
    ceiling = record.get("reference_reward")
    if ceiling is not None:
        from mmft.eval.evaluator import share_of_gap_closed

        parts.append(f"the references' own reward is {ceiling:.3f}")
        share = share_of_gap_closed(dict(record))
        if share is not None:
            parts.append(f"{100 * share:.0f}% of the distance to it covered")
    return "; ".join(parts)


def _value(what: Label, summary: Summary | None) -> Cell:
    if not summary or summary.get("mean") is None:
        return Cell(NOTHING)
    return Cell(what.number(summary["mean"]), what.interval(summary))


def _change(what: Label, change: Summary | None) -> Cell:
    if not change or change.get("mean") is None:
        return Cell(NOTHING)
    return Cell(what.change(change["mean"]), what.interval(change, sign="+"))
