"""The table that a run ends with: before, after, change, each with its 95% interval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmft.report.labels import Cell, comparisons, summary_line

STYLES = {"better": "green", "worse": "red", "unclear": "dim", "same": "dim"}
WIDE = 108  # columns of a terminal that three intervals need


def evaluation_table(record: Mapping[str, Any], training: Mapping[str, Any] | None = None, wide: bool = True) -> Table:
    """The table of an `eval.json`; `training` is the last line of `metrics.jsonl`, for KL and L2 distance.

    Green and red only where the change's interval leaves out zero and the metric has a good direction. A narrow
    table shows the interval of the change alone: it decides, and the other two are in `eval.json`.
    """
    table = Table(box=box.SIMPLE_HEAD, caption=summary_line(record) or None, caption_justify="left", pad_edge=False)
    table.add_column("metric", overflow="fold")
    for name in ("before", "after", "change"):
        shown = wide or name == "change"
        table.add_column(Text(f"{name} [95%]" if shown else name), justify="right", no_wrap=True)
    table.add_column("")
    for line in comparisons(record, training):
        style = STYLES.get(line.verdict, "")
        # Text, not markup: a term is named by its user, and "[red]" in a name must print as it is.
        table.add_row(
            Text(line.label.text),
            _text(line.before, wide),
            _text(line.after, wide),
            _text(line.change, True, style),
            Text(line.verdict, style=style),
        )
    return table


def print_evaluation(
    record: Mapping[str, Any], training: Mapping[str, Any] | None = None, console: Console | None = None
) -> None:
    """Prints the table as wide as the terminal allows; a file gets the whole of it."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDE)
    console.print(evaluation_table(record, training, wide=console.width >= WIDE))


def _text(cell: Cell, interval: bool, style: str = "") -> Text:
    text = Text(cell.value, style=style)
    return text.append(f" {cell.interval}", style="dim") if interval and cell.interval else text
