"""Arguments that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or a name that `mmft recipes` lists.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Recipe keys to change: train.lr=1e-4.")
]
Target = Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run folder, a local model folder or a hub id.")]
