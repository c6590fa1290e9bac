"""`report.html`: one page that holds everything, opens anywhere and runs no script."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from mmft import __version__
from mmft.report.folder import REPORT, RunFolder
from mmft.report.labels import comparisons, label, summary_line, verdict
from mmft.report.plots import data_uri, learning_curves
from mmft.report.samples import sample_picture
from mmft.report.template import CSS, PAGE
from mmft.types import UserError

HEADLINES = ("reward", "oracle_recall", "oracle_hallucination", "bleu_4", "rouge_l")
MAX_HEADLINES = 4
TRAINING_SAMPLES = 12
PICTURE_SIDE = 256  # pixels in the page, twice what a card shows of most


def write_report(run_dir: str | Path) -> Path:
    """Writes `report.html` into a run folder, from whatever the run has left so far, and returns its path.

    Raises UserError where the folder is no run or cannot be written.
    """
    run = RunFolder(run_dir)
    lines, record, recipe = run.metrics(), run.evaluation(), run.recipe_text()
    if not lines and record is None and recipe is None:
        raise UserError(f"{run.path}: not a run folder: no recipe.yaml, metrics.jsonl or eval.json in it")
    plots, more_plots = learning_curves(lines)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    page = environment.from_string(PAGE).render(
        css=Markup(CSS),
        name=run.path.resolve().name,
        version=__version__,
        steps=lines[-1].get("step", len(lines)) if lines else 0,
        facts=_facts(record or {}),
        comparisons=comparisons(record, run.last_step()) if record else [],
        summary=summary_line(record or {}),
        plots=plots,
        more_plots=more_plots,
        gallery=[_card(run, sample) for sample in run.eval_samples()],
        training=_training(run.samples()),
        recipe=recipe,
    )
    return run.write_text(REPORT, page.replace("\0", "\ufffd"))  # captions may hold NUL, a page must not


def _facts(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """The few numbers that a reader looks for first."""
    before, after = record.get("before") or {}, record.get("after") or {}
    facts = []
    for name in HEADLINES:
        what, side = label(name), after.get(name) or before.get(name)
        if side is None or side.get("mean") is None:
            continue
        change = (record.get("difference") or {}).get(name)
        note = "" if not change or change.get("mean") is None else what.change(change["mean"])
        value = what.number(side["mean"])
        facts.append({"name": what.text, "value": value, "note": note, "verdict": verdict(what, change)})
    return facts[:MAX_HEADLINES]


def _card(run: RunFolder, sample: Mapping[str, Any]) -> dict[str, Any]:
    references = sample.get("references")
    return {
        "id": sample.get("id", ""),
        "picture": _thumbnail(run, sample),
        "prompt": sample.get("prompt", ""),
        "references": references if isinstance(references, list) else [],
        "before": sample.get("before", ""),
        "after": sample.get("after", ""),
        "before_reward": _number(sample.get("before_reward")),
        "after_reward": _number(sample.get("after_reward")),
    }


def _thumbnail(run: RunFolder, sample: Mapping[str, Any]) -> str | None:
    image = sample_picture(run, dict(sample))
    if image is None:
        return None
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return data_uri(buffer.getvalue())


def _training(samples: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The best and the worst of the last logged step: where a reward is being hacked, these show how."""
    last: list[Mapping[str, Any]] = []
    for sample in samples:  # one step is held at a time: the file grows with the run
        if last and sample.get("step") != last[-1].get("step"):
            last = []
        last.append(sample)
    if not last:
        return None
    ranked = sorted(last, key=lambda sample: -(sample.get("reward") or 0.0))
    half = TRAINING_SAMPLES // 2
    shown = ranked if len(ranked) <= TRAINING_SAMPLES else ranked[:half] + ranked[-half:]
    terms = list(dict.fromkeys(name for sample in last for name in sample.get("terms") or {}))
    rows = [
        {
            "caption": sample.get("caption", ""),
            "reward": _number(sample.get("reward")),
            "terms": [_number(((sample.get("terms") or {}).get(name) or {}).get("raw")) for name in terms],
        }
        for sample in shown
    ]
    return {"step": last[-1].get("step", ""), "terms": terms, "rows": rows}


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, (int, float)) else ""
