"""`report.html` of a reward model: one page that holds everything, opens anywhere and runs no script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from mmft import __version__
from mmft.report import reward_plots as plots
from mmft.report.folder import REPORT, RunFolder, read_json
from mmft.report.labels import NOTHING, Label
from mmft.report.plots import Plot, learning_curves
from mmft.report.reward_table import (
    ACCURACY,
    AUROC,
    SHARE,
    SIGNS,
    TAU,
    WEIGHT,
    cell,
    coverages,
    differences,
    number,
    part,
    print_reward,
    remarks,
    reward_table,
    samples_line,
    scorer_lines,
    weight_cell,
    weights,
)
from mmft.report.reward_template import REWARD_CSS, REWARD_PAGE
from mmft.types import UserError

__all__ = ["print_reward", "reward_table", "write_reward_page"]

CONFIG, EXAMPLES = "config.json", "examples.json"
_LOSSES = ("loss/train", "loss/validation")  # drawn together, not in a panel each


@dataclass(frozen=True)
class Section:
    """Plots under one heading. `half`: two such share a row; `more` are folded away; `weights`: a table beside them."""

    title: str
    note: str
    plots: Sequence[Plot]
    wide: bool = False
    half: bool = False
    weights: Sequence[Mapping[str, Any]] = ()
    more: Sequence[Plot] = ()


def write_reward_page(folder: str | Path) -> Path:
    """Writes `report.html` into a reward model's folder from what is there, and returns its path.

    Reads `eval.json`, `config.json` (what the model is made of), `metrics.jsonl` (its training) and `examples.json`;
    a file, or a part of one, that is missing is left out. Raises UserError where none is there, where one cannot be
    read, or where the page cannot be written.
    """
    run = RunFolder(folder)
    record, lines, config = run.evaluation(), run.metrics(), read_json(run / CONFIG)
    if record is None and not lines and config is None:
        raise UserError(f"{run.path}: not a reward model's folder: no config.json, metrics.jsonl or eval.json in it")
    record = part(record)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    page = environment.from_string(REWARD_PAGE).render(
        css=Markup(REWARD_CSS),
        name=run.path.resolve().name,
        version=__version__,
        made_of=_made_of(part(config)),
        samples=samples_line(record),
        facts=_facts(record),
        scorers=scorer_lines(record),
        differences=differences(record),
        remarks=[remark for remark in remarks(record) if remark[0] not in ("held out", "weights")],
        sections=[section for section in _sections(record, lines) if section.plots],
        examples=[_example(example) for example in _listed(read_json(run / EXAMPLES)) if isinstance(example, Mapping)],
    )
    return run.write_text(REPORT, page.replace("\0", "\ufffd"))  # captions may hold NUL, a page must not


def _sections(record: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> list[Section]:
    kinds = part(record, "adversarial", "by_kind")
    adversarial = plots.shares_by_kind(
        "True caption ranked higher", "Dotted: 90%.", "share of pairs", kinds, reference=0.9
    )
    outside = plots.shares_by_kind(
        "AUROC of sigma", "Dotted: no better than chance.", "AUROC", part(record, "ood", "by_kind"), reference=0.5
    )
    curves, more = learning_curves([{k: v for k, v in line.items() if k not in _LOSSES} for line in lines])
    return [
        Section("Accuracy by kind", "", _drawn(plots.accuracy_by_kind(record)), wide=True),
        Section(
            "How the weights were learned",
            "Each at least 0: a term's own sign makes it a reward or a cost. Free: what the data say without it.",
            _drawn(plots.learned_weights(record)),
            weights=[_weight(weight) for weight in weights(record)],
        ),
        Section("Calibration", "", _drawn(plots.reliability_diagram(record), plots.coverage_curve(record))),
        Section("In and out of distribution", "", _drawn(plots.sigma_histograms(record), outside)),
        Section(
            "Adversarial captions",
            "Captions that are false, or say nothing, but look good to a metric.",
            _drawn(adversarial),
            half=True,
        ),
        Section(
            "Length bias",
            "Whether captions are preferred for being long, not for being good.",
            _drawn(plots.length_bias_bars(record)),
            half=True,
        ),
        Section("Training", "", [*_drawn(plots.training_losses(lines)), *curves], more=more),
    ]


def _facts(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """The few numbers that a reader looks for first."""
    agreement = cell(ACCURACY, record.get("agreement")).value
    ninety = dict(coverages(record)).get(0.9)
    found: list[tuple[str, Label, Any, str]] = [
        (
            ACCURACY.text,
            ACCURACY,
            part(record, "pairwise", "reward", "all"),
            "" if agreement == NOTHING else f"annotators agree {agreement}",
        ),
        (TAU.text, TAU, part(record, "kendall_tau", "reward"), "with ratings, within a picture"),
        ("Coverage", SHARE, {"mean": ninety}, "of 90% intervals"),
        ("Out of distribution", AUROC, part(record, "ood", "auroc"), "AUROC of sigma"),
        ("Adversarial", ACCURACY, part(record, "adversarial"), "below the true caption"),
    ]
    cells = [(name, cell(what, value), note) for name, what, value, note in found]
    return [{"name": name, "value": shown.value, "note": note} for name, shown, note in cells if shown.value != NOTHING]


def _made_of(config: Mapping[str, Any]) -> str:
    """Towers, fusion and loss in a line."""
    parts = [f"{what} {config[what]}" for what in ("vision", "text", "fusion", "loss") if config.get(what)]
    return ", ".join(parts)


def _weight(weight: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": weight["name"],
        "cell": weight_cell(weight),
        "unconstrained": WEIGHT.number(weight["unconstrained"]),
        "sign": weight["sign"],
        "verdict": SIGNS.get(weight["sign"], ""),
    }


def _example(example: Mapping[str, Any]) -> dict[str, str]:
    image = example.get("image")
    chosen, rejected = number(example.get("score_chosen")), number(example.get("score_rejected"))
    right = None if chosen is None or rejected is None or chosen == rejected else chosen > rejected
    return {
        "image": image if isinstance(image, str) and image.startswith("data:image/") else "",
        "kind": str(example.get("kind") or ""),
        "chosen": str(example.get("chosen") or ""),
        "rejected": str(example.get("rejected") or ""),
        "score_chosen": _score(chosen, example.get("sigma_chosen")),
        "score_rejected": _score(rejected, example.get("sigma_rejected")),
        "ranked": "" if right is None else "ranked right" if right else "ranked wrong",
        "verdict": "" if right is None else "better" if right else "worse",
    }


def _score(score: float | None, sigma: Any) -> str:
    spread = number(sigma)
    return "" if score is None else f"{score:.2f}" if spread is None else f"{score:.2f} ± {spread:.2f}"


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _drawn(*drawn: Plot | None) -> list[Plot]:
    return [plot for plot in drawn if plot is not None]
