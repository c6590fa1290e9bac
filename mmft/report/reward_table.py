"""What the judgement of a reward model says, in words: for the terminal, and for the page that shows it.

Any part of the record may be absent: a model of weighted terms has no sigma, a file of ratings has no pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmft.report.labels import NOTHING, Cell, Label, verdict
from mmft.report.table import STYLES

WIDE = 90  # columns of a terminal that three intervals need
ACCURACY = Label("Pairwise accuracy", +1, percent=True)
TAU = Label("Kendall's tau", +1)
BIAS = Label("Length bias")
AUROC = Label("AUROC", +1)
SHARE = Label("Share", percent=True)
WEIGHT = Label("Weight")
SCORERS = {
    "reward": "reward",
    "network": "network alone",
    "linear": "linear",
    "bleu": "BLEU alone",
    "length": "length alone",
}
SIGNS = {"as expected": "better", "not told from 0": "unclear", "against": "worse"}  # verdicts, for their colours


@dataclass(frozen=True)
class ScorerLine:
    """One line of the table: a reward or a baseline."""

    name: str
    accuracy: Cell
    tau: Cell
    bias: Cell


@dataclass(frozen=True)
class Difference:
    """How much more often one scorer orders pairs rightly than another, on the same pairs."""

    name: str
    change: Cell
    verdict: str


def part(record: Any, *keys: str) -> dict[str, Any]:
    """The mapping at `keys`, or an empty one where the record has none."""
    for key in keys:
        record = record.get(key) if isinstance(record, Mapping) else None
    return dict(record) if isinstance(record, Mapping) else {}


def number(value: Any) -> float | None:
    """A finite number, or None."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def interval(value: Any) -> dict[str, float | None]:
    """{"mean", "low", "high"} of anything, None for what it does not have."""
    found = part(value)
    return {key: number(found.get(key)) for key in ("mean", "low", "high")}


def cell(what: Label, value: Any) -> Cell:
    found = interval(value)
    return Cell(NOTHING) if found["mean"] is None else Cell(what.number(found["mean"]), what.interval(found))


def scorer_name(name: str) -> str:
    return SCORERS.get(name, name)


def in_order(record: Mapping[str, Any], *sections: str) -> list[str]:
    """Scorers of these sections, the reward first and baselines last."""
    found = dict.fromkeys(name for section in sections for name in part(record, section))
    return [name for name in SCORERS if name in found] + [name for name in found if name not in SCORERS]


def scorer_lines(record: Mapping[str, Any]) -> list[ScorerLine]:
    return [
        ScorerLine(
            scorer_name(name),
            cell(ACCURACY, part(record, "pairwise", name, "all")),
            cell(TAU, part(record, "kendall_tau", name)),
            cell(BIAS, part(record, "length_bias", name)),
        )
        for name in in_order(record, "pairwise", "kendall_tau", "length_bias")
    ]


def differences(record: Mapping[str, Any]) -> list[Difference]:
    lines = []
    for name, value in part(record, "differences").items():
        found = interval(value)
        if found["mean"] is not None:
            change = Cell(ACCURACY.change(found["mean"]), ACCURACY.interval(found, sign="+"))
            names = " over ".join(scorer_name(side.strip()) for side in name.split(" - "))
            lines.append(Difference(names, change, verdict(ACCURACY, found)))
    return lines


def weights(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The learned weights that have a value: {"name", "sign", "weight", "low", "high", "unconstrained"}."""
    listed = record.get("weights")
    lines = []
    for entry in listed if isinstance(listed, list) else []:
        found = {key: number(part(entry).get(key)) for key in ("weight", "low", "high", "unconstrained")}
        if found["weight"] is not None:
            lines.append({"name": str(entry.get("name", "")), "sign": str(entry.get("sign") or ""), **found})
    return lines


def weight_cell(weight: Mapping[str, Any]) -> Cell:
    return cell(WEIGHT, {"mean": weight["weight"], "low": weight["low"], "high": weight["high"]})


def samples_line(record: Mapping[str, Any]) -> str:
    words = {"pictures": "pictures", "pairs": "pairs", "ratings": "ratings", "ood": "out-of-distribution pictures"}
    counts = {key: number(part(record, "samples").get(key)) for key in words}
    return ", ".join(f"{int(count)} {words[key]}" for key, count in counts.items() if count)


def remarks(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(subject, what was found), for whatever the record has beside the table."""
    found = [
        ("held out", samples_line(record)),
        ("annotators agree", str(cell(ACCURACY, record.get("agreement")))),
        ("calibration", _calibration(record)),
        ("coverage", _coverage(record)),
        ("out of distribution", _out_of_distribution(record)),
        ("adversarial", _adversarial(record)),
        ("weights", "; ".join(f"{w['name']} {weight_cell(w)} {w['sign']}".rstrip() for w in weights(record))),
    ]
    return [(subject, text) for subject, text in found if text and text != NOTHING]


def _calibration(record: Mapping[str, Any]) -> str:
    preferences, ratings = part(record, "calibration", "preferences"), part(record, "calibration", "ratings")
    parts = [
        ("NLL of preferences", number(preferences.get("nll")), ".3f"),
        ("expected calibration error", number(preferences.get("ece")), ".3f"),
        ("NLL of ratings", number(ratings.get("nll")), ".3f"),
        ("RMSE of ratings", number(ratings.get("rmse")), ".3f"),
        ("sigma scaled by", number(ratings.get("sigma_scale")), ".3g"),
    ]
    return ", ".join(f"{name} {value:{form}}" for name, value, form in parts if value is not None)


def reliability_bins(record: Mapping[str, Any]) -> list[tuple[float, float, float]]:
    """(confidence, accuracy, count), by rising confidence."""
    listed = part(record, "calibration", "preferences").get("bins")
    bins = []
    for entry in listed if isinstance(listed, list) else []:
        confidence, accuracy, count = (number(part(entry).get(key)) for key in ("confidence", "accuracy", "count"))
        if confidence is not None and accuracy is not None and count:
            bins.append((confidence, accuracy, count))
    return sorted(bins)


def coverages(record: Mapping[str, Any]) -> list[tuple[float, float]]:
    """(nominal level, share of ratings within), by rising level."""
    shares = part(record, "calibration", "ratings", "coverage")
    pairs = []
    for level, share in shares.items():
        try:
            nominal = number(float(level))
        except ValueError:
            continue
        measured = number(share)
        if nominal is not None and measured is not None:
            pairs.append((nominal, measured))
    return sorted(pairs)


def _coverage(record: Mapping[str, Any]) -> str:
    shares = ", ".join(f"{SHARE.number(share)} of {100 * level:g}%" for level, share in coverages(record))
    return f"predictive intervals hold {shares}" if shares else ""


def _out_of_distribution(record: Mapping[str, Any]) -> str:
    auroc = cell(AUROC, part(record, "ood", "auroc"))
    return "" if auroc.value == NOTHING else f"told by sigma with AUROC {auroc}"


def _adversarial(record: Mapping[str, Any]) -> str:
    below = cell(ACCURACY, record.get("adversarial"))
    scenes = number(part(record, "adversarial").get("scenes"))
    over = f" in {int(scenes)} pictures" if scenes else ""
    return "" if below.value == NOTHING else f"{below} below the true caption{over}"


def reward_table(record: Mapping[str, Any], wide: bool = True) -> Table:
    """The table of a reward model's `eval.json`: the reward and its baselines on the same held-out judgements.

    A narrow table has the interval of the accuracy alone; the others are in `eval.json`.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", overflow="fold")
    for what in (ACCURACY, TAU, BIAS):
        shown = wide or what is ACCURACY
        table.add_column(Text(f"{what.text} [95%]" if shown else what.text), justify="right", no_wrap=True)
    for line in scorer_lines(record):
        # Text, not markup: "[red]" in a name must print as it is.
        table.add_row(Text(line.name), _text(line.accuracy, True), _text(line.tau, wide), _text(line.bias, wide))
    return table


def print_reward(record: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints the table as wide as the terminal allows, and under it, in a line each, what else was found."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDE)
    if scorer_lines(record):
        console.print(reward_table(record, wide=console.width >= WIDE))
    for line in differences(record):
        change = Text(str(line.change), style=STYLES.get(line.verdict, ""))
        console.print(Text(f"{line.name}: ").append(change), soft_wrap=True)
    for subject, text in remarks(record):
        console.print(Text(f"{subject}: ", style="dim").append(text, style="default"), soft_wrap=True)


def _text(found: Cell, shown: bool) -> Text:
    text = Text(found.value)
    return text.append(f" {found.interval}", style="dim") if shown and found.interval else text
