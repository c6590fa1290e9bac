"""Pictures of the judgement of a reward model, in the look of the learning curves: transparent, for light and dark."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from mmft.report.plots import COLOURS, INK, MANY_POINTS, Plot, data_uri, smooth
from mmft.report.reward_table import (
    ACCURACY,
    BIAS,
    SCORERS,
    SHARE,
    SIGNS,
    cell,
    coverages,
    in_order,
    interval,
    number,
    part,
    reliability_bins,
    scorer_name,
    weight_cell,
    weights,
)

WIDTH, HEIGHT = 4.6, 2.7  # inches, as the learning curves
WIDE = 9.4
SIGN_COLOURS = {"better": COLOURS[2], "unclear": INK, "worse": COLOURS[5]}
_LONGEST = 28  # characters of a name beside a bar

Interval = dict[str, "float | None"]  # mean, low, high


def accuracy_by_kind(record: Mapping[str, Any]) -> Plot | None:
    """Every kind of wrong caption: how often the better one is ranked above it, by every scorer."""
    scorers = in_order(record, "pairwise")
    rows = _kinds(record, scorers)
    if not rows:
        return None
    figure = Figure(figsize=(WIDE, 1.0 + 0.4 * len(rows)), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    colours = _scorer_colours(scorers)
    first, others = scorers[0], scorers[1:]
    _bars(axes, {kind: found[first] for kind, found in rows.items()}, colours[first])
    for i, name in enumerate(others):  # dots upon the bar, a line for each: side by side they can be compared
        shift = 0.62 * ((i + 0.5) / len(others) - 0.5)
        for row, found in enumerate(rows.values()):
            _dot(axes, found[name], row + shift, colours[name])
    axes.axvline(0.5, color=INK, lw=1, ls=":")
    axes.set_xlim(0, 1.01)
    _percent(axes.xaxis)
    _dress(axes, "chosen caption ranked higher (dotted: chance)", "", grid="x")
    _legend(figure, [(scorer_name(name), colours[name]) for name in scorers])
    words = "; ".join(f"{kind} {ACCURACY.number(found[first]['mean'])}" for kind, found in rows.items())
    note = "In brackets the number of pairs; thin lines are 95% intervals that draw whole pictures."
    return _plot(figure, "Pairwise accuracy", note, f"Pairwise accuracy, {scorer_name(first)}: {words}")


def _kinds(record: Mapping[str, Any], scorers: Sequence[str]) -> dict[str, dict[str, Interval]]:
    """Row of the plot -> scorer -> accuracy: all pairs, then kinds, those first at which the first scorer is best."""
    of_kind = {name: part(record, "pairwise", name, "by_kind") for name in scorers}
    rows = {"all": {name: interval(part(record, "pairwise", name, "all")) for name in scorers}}
    kinds = dict.fromkeys(kind for found in of_kind.values() for kind in found)
    for kind in sorted(kinds, key=lambda kind: -(interval(of_kind[scorers[0]].get(kind))["mean"] or 0.0)):
        pairs = next((n for found in of_kind.values() if (n := number(part(found, kind).get("pairs")))), None)
        title = f"{_plain(kind)} ({pairs:.0f})" if pairs else _plain(kind)
        rows[title] = {name: interval(of_kind[name].get(kind)) for name in scorers}
    return {title: found for title, found in rows.items() if any(v["mean"] is not None for v in found.values())}


def learned_weights(record: Mapping[str, Any]) -> Plot | None:
    """Each weight with its interval, coloured by what the data say of its sign."""
    listed = weights(record)
    if not listed:
        return None
    figure = Figure(figsize=(WIDTH, max(HEIGHT * 0.6, 0.75 + 0.34 * len(listed))), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for row, weight in enumerate(listed):
        colour = SIGN_COLOURS.get(SIGNS.get(weight["sign"], ""), INK)
        _line(axes, weight, row, colour, 2.2)
        free = weight["unconstrained"]
        if free is not None and free != weight["weight"]:
            axes.plot(free, row, "o", mfc="none", mec=colour, ms=7)
        axes.plot(weight["weight"], row, "o", color=colour, ms=7)
    axes.axvline(0, color=INK, lw=0.8, ls=":")
    axes.set_ylim(len(listed) - 0.5, -0.5)
    axes.set_yticks(range(len(listed)), [_plain(weight["name"]) for weight in listed])
    _dress(axes, "weight", "", grid="x")
    axes.margins(x=0.05)
    words = "; ".join(f"{weight['name']} {weight_cell(weight)} {weight['sign']}".rstrip() for weight in listed)
    note = "Green: the sign is as expected; grey: not told from 0; red: against. Hollow: without the sign's rule."
    return _plot(figure, "Term weights", note, f"Learned weights: {words}")


def reliability_diagram(record: Mapping[str, Any]) -> Plot | None:
    points = reliability_bins(record)
    if not points:
        return None
    confidence, accuracy, count = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    figure, axes = _small()
    low = 0.5 if confidence.min() >= 0.5 else 0.0
    axes.plot([low, 1], [low, 1], color=INK, lw=1, ls=":")
    axes.plot(confidence, accuracy, color=COLOURS[0], lw=1.6)
    share = count / count.sum()
    axes.scatter(confidence, accuracy, s=15 + 300 * share, color=COLOURS[0], zorder=3, clip_on=False)
    axes.set_ylim(min(low, accuracy.min() - 0.05), 1.02)
    _percent(axes.xaxis)
    _percent(axes.yaxis)
    _dress(axes, "confidence in the likelier caption", "how often it was chosen")
    words = ", ".join(f"{100 * c:.0f}% sure, {100 * a:.0f}% right" for c, a in zip(confidence, accuracy, strict=True))
    note = "On the dotted line a model knows how sure it may be; below it, overconfident. Larger dots: more pairs."
    return _plot(figure, "Reliability of preferences", note, f"Reliability of preferences: {words}")


def coverage_curve(record: Mapping[str, Any]) -> Plot | None:
    points = coverages(record)
    if not points:
        return None
    level, share = zip(*points, strict=True)
    figure, axes = _small()
    axes.plot([0, 1], [0, 1], color=INK, lw=1, ls=":")
    axes.plot(level, share, "o-", color=COLOURS[0], lw=1.6, clip_on=False)
    low = max(0.0, min(*level, *share) - 0.15)
    axes.set_xlim(low, 1.02)
    axes.set_ylim(low, 1.02)
    _percent(axes.xaxis)
    _percent(axes.yaxis)
    _dress(axes, "nominal level of the interval", "ratings within it")
    words = ", ".join(f"{SHARE.number(y)} within {100 * x:g}% intervals" for x, y in points)
    note = "Below the dotted line sigma is too small, above it too large."
    return _plot(figure, "Coverage of ratings", note, f"Coverage of predictive intervals: {words}")


def sigma_histograms(record: Mapping[str, Any]) -> Plot | None:
    """How unsure the model is on pictures like those it learned from, and on others."""
    sides = {"in distribution": "sigma_in", "out of distribution": "sigma_out"}
    found = {name: _numbers(part(record, "ood").get(key)) for name, key in sides.items()}
    found = {name: values for name, values in found.items() if values}
    if not found:
        return None
    low, high = min(map(min, found.values())), max(map(max, found.values()))
    edges = np.linspace(low, high if high > low else low + 1e-6, 31)
    figure, axes = _small()
    for (name, values), colour in zip(found.items(), COLOURS, strict=False):
        share = np.full(len(values), 1 / len(values))
        style = {"bins": edges, "weights": share, "color": colour}
        axes.hist(values, histtype="stepfilled", alpha=0.3, **style)
        axes.hist(values, histtype="step", lw=1.6, label=name, **style)
    _percent(axes.yaxis)
    _dress(axes, "sigma", "share of pictures", grid="y")
    _legend(figure, list(zip(found, COLOURS, strict=False)))
    words = ", ".join(f"median {np.median(values):.3g} {name}" for name, values in found.items())
    return _plot(figure, "Sigma", "A model that knows its limits is less sure out of distribution.", f"Sigma: {words}")


def length_bias_bars(record: Mapping[str, Any]) -> Plot | None:
    scorers = in_order(record, "length_bias")
    found = {name: interval(part(record, "length_bias", name)) for name in scorers}
    found = {name: value for name, value in found.items() if value["mean"] is not None}
    if not found:
        return None
    colours = _scorer_colours(list(found))
    figure, axes = _small()
    _bars(axes, {_plain(scorer_name(name)): value for name, value in found.items()}, list(colours.values()))
    axes.axvline(0, color=INK, lw=1)
    axes.set_xlim(-1, 1)
    _dress(axes, "partial rank correlation with length, given quality", "", grid="x")
    words = ", ".join(f"{scorer_name(name)} {cell(BIAS, value)}" for name, value in found.items())
    note = "Right of 0: of equally good captions the longer scores higher."
    return _plot(figure, "Length bias", note, f"Length bias: {words}")


def shares_by_kind(title: str, note: str, axis: str, found: Mapping[str, Any], reference: float) -> Plot | None:
    """One bar a kind, from 0 to 1, with a dotted line at `reference`."""
    values = {kind: interval(value if isinstance(value, Mapping) else {"mean": value}) for kind, value in found.items()}
    values = {kind: value for kind, value in values.items() if value["mean"] is not None}
    if not values:
        return None
    figure = Figure(figsize=(WIDTH, max(HEIGHT, 0.7 + 0.26 * len(values))), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    _bars(axes, {_plain(kind): value for kind, value in values.items()}, COLOURS[0])
    axes.axvline(reference, color=INK, lw=1, ls=":")
    axes.set_xlim(0, 1)
    _dress(axes, axis, "", grid="x")
    words = ", ".join(f"{kind} {value['mean']:.3f}" for kind, value in values.items())
    return _plot(figure, title, note, f"{title}: {words}")


def training_losses(lines: Sequence[Mapping[str, Any]]) -> Plot | None:
    """Loss in training and on what was held out, with the step whose weights were kept."""
    names = {"loss/train": "training", "loss/validation": "held out"}
    series: dict[str, list[tuple[float, float]]] = {}
    for i, line in enumerate(lines):
        step = number(line.get("step", i))
        for key in names:
            loss = number(line.get(key))
            if step is not None and loss is not None:
                series.setdefault(key, []).append((step, loss))
    if not series:
        return None
    figure, axes = _small()
    swatches, words = [], []
    for key, points in series.items():
        steps, losses = zip(*points, strict=True)
        colour = COLOURS[list(names).index(key)]
        many = len(points) > MANY_POINTS
        axes.plot(steps, losses, "-" if many else "o-", ms=3, lw=1.4, alpha=0.3 if many else 1.0, color=colour)
        if many:
            axes.plot(steps, smooth(losses), color=colour, lw=1.8)
        swatches.append((names[key], colour))
        words.append(f"{names[key]} from {losses[0]:.4g} to {losses[-1]:.4g}")
    if "loss/validation" in series:
        best = min(series["loss/validation"], key=lambda point: point[1])
        axes.axvline(best[0], color=INK, lw=0.8, ls=":")
        words.append(f"held-out loss lowest at step {best[0]:.0f}")
    _dress(axes, "step", "")
    _legend(figure, swatches)
    return _plot(figure, "Loss", "Dotted: the lowest held-out loss.", f"Loss: {', '.join(words)}")


# -- drawing -----------------------------------------------------------------------------------------------------------


def _bars(axes: Any, rows: Mapping[str, Interval], colour: str | Sequence[str]) -> None:
    """A horizontal bar a row, the first at the top, each with its interval."""
    for row, value in enumerate(rows.values()):
        tone = colour if isinstance(colour, str) else colour[row]
        if value["mean"] is not None:
            axes.barh(row, value["mean"], height=0.74, color=tone, alpha=0.45, lw=0)
            _line(axes, value, row, tone, 2.4)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.4, -0.6)


def _dot(axes: Any, value: Interval, height: float, colour: str) -> None:
    if value["mean"] is not None:
        _line(axes, value, height, colour, 1.2)
        axes.plot(value["mean"], height, "o", color=colour, ms=4.5)


def _line(axes: Any, value: Interval, height: float, colour: str, width: float) -> None:
    if value["low"] is not None and value["high"] is not None:
        axes.plot([value["low"], value["high"]], [height, height], color=colour, lw=width, solid_capstyle="butt")


def _dress(axes: Any, x: str, y: str, grid: str = "both") -> None:
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    axes.tick_params(colors=INK, labelsize=8)
    axes.set_xlabel(x, color=INK, fontsize=8)
    axes.set_ylabel(y, color=INK, fontsize=8)
    axes.grid(axis=grid, color=INK, alpha=0.22, lw=0.6)
    axes.set_axisbelow(True)


def _small() -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=120, layout="constrained")
    return figure, figure.add_subplot()


def _percent(axis: Any) -> None:
    axis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")


def _legend(figure: Figure, named: Sequence[tuple[str, str]]) -> None:
    """(name, colour) above the axes."""
    handles = [Patch(color=colour, alpha=0.75, lw=0) for _, colour in named]
    names = [_plain(name) for name, _ in named]
    figure.legend(handles, names, loc="outside upper left", ncols=5, fontsize=7.5, frameon=False, labelcolor=INK)


def _scorer_colours(scorers: Sequence[str]) -> dict[str, str]:
    """A scorer has one colour in all plots."""
    known = [*SCORERS, *(name for name in scorers if name not in SCORERS)]
    return {name: COLOURS[known.index(name) % len(COLOURS)] for name in scorers}


def _plain(text: Any) -> str:
    """A name as Matplotlib can draw it: one short line, "$" not taken for mathematics."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    short = line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"
    return short.replace("$", r"\$")


def _numbers(values: Any) -> list[float]:
    found = [number(value) for value in values] if isinstance(values, list) else []
    return [value for value in found if value is not None]


def _plot(figure: Figure, title: str, note: str, alt: str) -> Plot:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", transparent=True, metadata={"Software": None})
    return Plot(title, note, data_uri(buffer.getvalue()), alt)
