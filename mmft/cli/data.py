"""`mmft data`: look at data before anything is trained on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmft.cli.arguments import Overrides

app = typer.Typer(help="Look at data.", no_args_is_help=True)


@app.command(epilog="Examples: mmft data check my_pictures; mmft data check recipes/caption_ppo.yaml")
def check(
    target: Annotated[
        str, typer.Argument(metavar="PATH|RECIPE", help="A folder, a COCO file, a table, `scenes`, or a recipe.")
    ],
    overrides: Overrides = None,
) -> None:
    """Read every row and picture, and say what is wrong before a run; exit status 1 where something is."""
    from mmft import run

    if not run.check_data(target, overrides or []):
        raise typer.Exit(1)


@app.command(epilog="Example: mmft data preview --rows 12 --seed 3 --out contact_sheet.png")
def preview(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="Whose data to show. Default: the bundled scenes.")
    ] = None,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("contact_sheet.png"),
    rows: Annotated[int, typer.Option(min=1, max=400, help="Pictures on the sheet.")] = 12,
    seed: Annotated[int | None, typer.Option(min=0, help="The data's seed. Default: the recipe's.")] = None,
) -> None:
    """Write a contact sheet: pictures with their references, questions and answers."""
    from mmft.config import ScenesConfig, load_recipe

    data = load_recipe(recipe, overrides or []).data if recipe else ScenesConfig()
    if seed is not None:
        data = data.model_copy(update={"seed": seed})
    from mmft import run

    typer.echo(run.preview(data, rows, out))
