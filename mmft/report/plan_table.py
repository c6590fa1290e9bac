"""The table of `mmft plan`: memory by part and phase, what to change where it does not fit, and time by phase."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

_WIDE = 100  # columns that a file gets
_TIGHT = 0.9  # of the memory: above, an estimate may be wrong by what is left


def print_plan(record: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints what `mmft.run.planning.Plan.record` holds."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, _WIDE)
    console.print(_headline(record), highlight=False)
    console.print(memory_table(record["memory"]))
    console.print(verdict(record["memory"]), highlight=False)
    for line in advice_lines(record):
        console.print(line, highlight=False)
    if record["estimated"]:
        console.print(f"estimated from layer sizes, not counted: {', '.join(record['estimated'])}", highlight=False)
    if record["time"] is not None:
        console.print(time_table(record["time"]))
        console.print(time_line(record["time"]), highlight=False)


def memory_table(memory: Mapping[str, Any]) -> Table:
    """A row a part, a column a phase of a step, sums below; the phase with the peak in bold."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_footer=True)
    table.add_column("memory", footer="together")
    for phase, size in memory["phases"].items():
        style = "bold" if phase == memory["peak"]["phase"] else ""
        table.add_column(Text(phase, style=style), footer=Text(sized(size), style=style), justify="right", style=style)
    for part, sizes in memory["parts"].items():
        table.add_row(part, *(sized(sizes[phase]) if sizes.get(phase) else "" for phase in memory["phases"]))
    return table


def time_table(seconds: Mapping[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    names = [name for name, value in seconds["phases"].items() if value >= 0.0005]
    table.add_column("seconds a step, about")
    for name in names:
        table.add_column(name, justify="right")
    table.add_column("together", justify="right")
    values = [seconds["phases"][name] for name in names]
    tried = " and ".join(str(rows) for rows in seconds["probed_rows"])
    table.add_row(f"from steps of {tried} captions", *(f"{value:.3g}" for value in values), f"{seconds['step']:.3g}")
    return table


def time_line(seconds: Mapping[str, Any]) -> str:
    return (
        f"the run takes about {duration(seconds['run'])}: {seconds['evaluations']} evaluations of "
        f"{duration(seconds['evaluation'])} and {duration(seconds['setup'])} of loading included"
    )


def verdict(memory: Mapping[str, Any]) -> Text:
    peak, available = memory["peak"]["bytes"], memory["available"]
    text = Text(f"peak: about {sized(peak)} in the phase {memory['peak']['phase']!r}, of {sized(available)}: ")
    if not memory["fits"]:
        return text.append("it does not fit", style="bold red")
    tight = peak > _TIGHT * available
    return text.append("it fits, tightly" if tight else "it fits", style="yellow" if tight else "green")


def advice_lines(record: Mapping[str, Any]) -> list[str]:
    """What to change, in order, and what that leaves."""
    advice, memory = record["advice"], record["memory"]
    if memory["fits"]:
        return []
    if not advice:
        return ["no key of the recipe saves enough to matter; take a smaller model or a larger machine"]
    width = max(len(entry["change"]) for entry in advice)
    lines = ["change, in this order:"]
    lines += [
        f"  {entry['change']:<{width}}  saves {sized(entry['saves'])}, leaves {sized(entry['peak'])}"
        for entry in advice
    ]
    if advice[-1]["peak"] > memory["available"]:
        return [*lines, "and even then it does not fit; take a smaller model or a larger machine"]
    return [*lines, "with these it fits"]


def sized(count: int) -> str:
    """Bytes in GB of 2**30, or in MB below a tenth of one."""
    if count >= 2**30 / 10:
        return f"{count / 2**30:.2f} GB"
    return f"{count / 2**20:.2g} MB" if count >= 2**20 / 10 else "< 0.1 MB"


def _numbered(count: int) -> str:
    return f"{count / 1e9:.3g} B" if count >= 1e9 else f"{count / 1e6:.3g} M"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.2g} min" if seconds < 5400 else f"{seconds / 3600:.2g} h"


def _headline(record: Mapping[str, Any]) -> str:
    return (
        f"{record['recipe']} on {record['device']}: {_numbered(record['parameters'])} weights in {record['dtype']}, "
        f"{_numbered(record['trainable'])} trained, prompts of {record['prompt_tokens']} tokens"
    )
