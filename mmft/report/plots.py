"""Learning curves as pictures that go inside a page: one panel a question, transparent, readable on light and dark."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from matplotlib.figure import Figure

# Mid-tones with contrast on white and on near-black alike; after Okabe and Ito, told apart by the colour-blind.
COLOURS = ("#3b82c4", "#e07b39", "#2a9d76", "#b45fa3", "#c9a227", "#d1495b", "#5fa8d3", "#8d8d8d")
INK = "#808894"
MANY_POINTS = 60  # beyond this a smoothed line is laid over the points


@dataclass(frozen=True)
class Panel:
    """A plot: its title and note, and the metrics in it, by name or pattern. `reference` draws a level line."""

    title: str
    note: str
    patterns: tuple[str, ...]
    reference: float | None = None


PANELS: tuple[Panel, ...] = (
    Panel("Reward", "The mean reward of what was sampled at each step.", ("reward/mean", "objective/scores")),
    Panel("Terms, as measured", "Each term before normalising and weighting.", ("reward/raw/*",)),
    Panel("Terms, as weighted", "What each adds to the reward.", ("reward/weighted/*",)),
    Panel("Held-out metric", "Not part of the reward: if it falls while the reward rises, the reward is being gamed.",
          ("guard/*",)),
    Panel("KL to the reference", "How far sampling has moved from the reference.", ("objective/kl", "policy/kl")),
    Panel("Entropy", "Near zero the policy has stopped exploring.", ("policy/entropy", "policy/entropy_avg")),
    Panel("L2 distance", "Between the weights and the pretrained weights.", ("anchor/l2_distance",)),
    Panel("Value loss", "", ("loss/value_avg",)),
    Panel("Explained variance", "1: the critic foresees the returns; 0: no better than their mean.",
          ("value/explained_variance",), 0.0),
    Panel("Ratio", "New over old probability: 1 at the first minibatch.", ("policy/ratio_*", "val/ratio"), 1.0),
    Panel("Clip fraction", "Share of tokens beyond the clip range.", ("policy/clipfrac_avg", "val/clipfrac_avg")),
    Panel("Approximate KL of an update", "The early stop looks at this.", ("policy/approxkl_avg",)),
    Panel("Caption length", "Tokens or words sampled.", ("response/tokens",)),
    Panel("Loss", "", ("loss/policy_avg", "loss/total")),
    Panel("Loss of supervised fine-tuning", "Nats a token of the references.", ("loss/sft",)),
    Panel("Learning rate", "", ("lr", "learning_rate", "train/lr")),
)  # fmt: skip


@dataclass(frozen=True)
class Plot:
    """A drawn panel: PNG as a data URI, and a sentence for those who cannot see it."""

    title: str
    note: str
    source: str
    alt: str


def learning_curves(lines: Sequence[Mapping[str, Any]]) -> tuple[list[Plot], list[Plot]]:
    """The known panels, and a panel for each other metric, from the lines of `metrics.jsonl`."""
    series = _series(lines)
    main, used = [], set()
    for panel in PANELS:
        names = [name for pattern in panel.patterns for name in series if fnmatchcase(name, pattern)]
        names = [name for name in dict.fromkeys(names) if name not in used]
        if names:
            used.update(names)
            main.append(_draw(panel, {name: series[name] for name in names}))
    rest = [_draw(Panel(name, "", (name,)), {name: series[name]}) for name in sorted(series) if name not in used]
    return main, rest


def _series(lines: Iterable[Mapping[str, Any]]) -> dict[str, tuple[list[float], list[float]]]:
    """Metric -> (steps, values). A missing or undefined value is a gap in the line, never a zero."""
    lines = list(lines)
    names = dict.fromkeys(
        name for line in lines for name, value in line.items() if name != "step" and _is_number(value)
    )
    series = {}
    for name in names:
        points = [(line.get("step", i), line[name]) for i, line in enumerate(lines) if name in line]
        steps = [float(step) for step, _ in points]
        series[name] = (steps, [float(value) if _is_number(value) else math.nan for _, value in points])
    return series


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _draw(panel: Panel, series: Mapping[str, tuple[list[float], list[float]]]) -> Plot:
    # A bare Figure: pyplot's global state would leak figures and pick a window system.
    figure = Figure(figsize=(4.6, 2.7), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    short = _short_names(list(series))
    for i, (name, (steps, values)) in enumerate(series.items()):
        colour = COLOURS[i % len(COLOURS)]
        many = len(values) > MANY_POINTS
        marker = "o" if len(values) == 1 else None
        axes.plot(steps, values, color=colour, lw=1.0 if many else 1.6, alpha=0.3 if many else 1.0, marker=marker,
                  label=None if many else short[name])  # fmt: skip
        if many:
            axes.plot(steps, smooth(values), color=colour, lw=1.8, label=short[name])
    if panel.reference is not None:
        axes.axhline(panel.reference, color=INK, lw=0.8, ls=":")
    _style(axes)
    if len(series) > 1:  # above the axes: inside it would lie on the lines
        figure.legend(loc="outside upper left", ncols=3, fontsize=7.5, frameon=False, labelcolor=INK)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", transparent=True, metadata={"Software": None})
    return Plot(panel.title, panel.note, data_uri(buffer.getvalue()), _in_words(panel.title, series, short))


def _style(axes: Any) -> None:
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    axes.tick_params(colors=INK, labelsize=8)
    axes.set_xlabel("step", color=INK, fontsize=8)
    axes.grid(color=INK, alpha=0.22, lw=0.6)
    axes.margins(x=0.02)


def smooth(values: Sequence[float], weight: float = 0.8) -> list[float]:
    """Exponential moving average, started without bias; gaps stay gaps.

    Source: the correction of Kingma and Ba, Adam, ICLR 2015, section 3.
    """
    mean, scale, out = 0.0, 0.0, []
    for value in values:
        if math.isnan(value):
            out.append(math.nan)
            continue
        mean = weight * mean + (1 - weight) * value
        scale = weight * scale + (1 - weight)
        out.append(mean / scale)
    return out


def _short_names(names: list[str]) -> dict[str, str]:
    """The last part of each name, unless two would then be the same."""
    last = {name: name.rsplit("/", 1)[-1] for name in names}
    # A leading underscore hides a line from Matplotlib's legend, and "$" starts its mathematics.
    shown = last if len(set(last.values())) == len(names) else {name: name for name in names}
    return {name: text.lstrip("_").replace("$", r"\$") or "value" for name, text in shown.items()}


def _in_words(title: str, series: Mapping[str, tuple[list[float], list[float]]], short: Mapping[str, str]) -> str:
    parts = []
    for name, (_, values) in series.items():
        real = [value for value in values if not math.isnan(value)]
        if real:
            parts.append(f"{short[name]} from {real[0]:.4g} to {real[-1]:.4g}")
    return f"{title}: {', '.join(parts)}"


def data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
