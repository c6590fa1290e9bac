"""`mmft replay FILE`: the batch at which a run stopped, again, row by row."""

from __future__ import annotations

import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmft.config import load_recipe
from mmft.models.policy import load_policy
from mmft.report.console import say
from mmft.report.folder import RunFolder
from mmft.run.building import build_trainer, prepare
from mmft.run.device import device_of, dtype_of, quiet_loading
from mmft.train.replay import Batch, ReplayReport, read_batch, replay
from mmft.types import UserError

_NAMED = 5  # rows that the conclusion tells of; the table has all


def replay_batch(file: Path, overrides: list[str]) -> bool:
    """Prints what each row of a kept batch gives now, and where numbers cease to be finite; returns whether all are
    finite. overrides: recipe keys to try, as train.precision=fp32.
    """
    batch = read_batch(file)
    if batch.recipe is None:
        raise UserError(f"{file}: holds no recipe; use mmft.train.replay with a trainer of your own")
    quiet_loading()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(batch.recipe, encoding="utf-8")
        recipe = load_recipe(path, [*overrides, "logging.report_to=[]"])
        job = prepare(recipe)
        policy = load_policy(recipe.model, device_of(recipe), dtype_of(recipe))
        trainer = build_trainer(job, policy, RunFolder.create(folder, "replay"))
        report = replay(batch, trainer)
    _show(batch, report, Console())
    return report.finite


def _show(batch: Batch, report: ReplayReport, console: Console) -> None:
    table = Table("row", "caption", "loss", "largest ratio", "largest advantage", box=None)
    for row in sorted(report.rows, key=lambda row: (row.finite, -abs(row.loss) if row.finite else 0.0)):
        numbers = [f"{value:.4g}" for value in (row.loss, row.worst_ratio, row.worst_advantage)]
        said = [Text(row.id), Text(row.caption[:60])]  # a caption may look like markup
        table.add_row(*said, *numbers, style=None if row.finite else "bold red")
    say(console, f"step {batch.step}: {batch.reason}")
    console.print(table)
    say(console, _conclusion(report))


def _conclusion(report: ReplayReport) -> str:
    if report.finite:
        return f"all is finite now: the loss is {report.loss:.6g}"
    bad = [row for row in report.rows if not row.finite]
    said = [f"row {row.id}: {row.culprit}" for row in bad[:_NAMED]]
    if len(bad) > _NAMED:
        said.append(f"and {len(bad) - _NAMED} more rows")
    if not bad:
        said.append(f"each row's loss is finite, and that of all is {report.loss:.6g}")
    if report.module:
        said.append(f"the first module with an output that is not finite is {report.module}")
    if report.parameter:
        said.append(f"the first gradient that is not finite is that of {report.parameter}")
    return f"not finite: {'; '.join(said)}"
