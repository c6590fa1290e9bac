"""`mmft push`, `pull` and `merge`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = {
    "push": "Example: mmft push runs/caption_ppo --repo USER/NAME --public",
    "pull": "Example: mmft pull USER/NAME my_adapter; then: mmft generate my_adapter cat.jpg",
    "merge": "Example: mmft merge runs/caption_ppo my_model --dtype bfloat16",
}


class Precision(str, Enum):
    """Types of a merged model's weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def push(
    run_dir: Annotated[
        str, typer.Argument(metavar="RUN|MODEL", help="A run folder, or a reward model's, an adapter's, a model's.")
    ],
    repo: Annotated[
        str | None, typer.Option(metavar="USER/NAME", help="Where to. Default: the recipe's hub.repo.")
    ] = None,
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Who may see it. Default: the recipe's hub.private, else private."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="USER/NAME", help="Where others find the base, if model.path is a folder.")
    ] = None,
    merged: Annotated[bool, typer.Option("--merged", help="Publish the model with its adapter folded in.")] = False,
    message: Annotated[str, typer.Option(help="Commit message.")] = "",
) -> None:
    """Publish an adapter or a reward model on a hub (HF_ENDPOINT, HF_TOKEN), with a model card."""
    from mmft import run

    run.push(run_dir, repo, private, base, merged, message)


def pull(
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="What to download.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new folder.")],
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit.")] = None,
) -> None:
    """Download an adapter, a reward model or a model from a hub; a broken download goes on where it was."""
    from mmft.hub import Hub

    names = Hub().pull(repo, out, revision)
    typer.echo(f"{out}: {', '.join(names)}", err=True)


def merge(
    run_dir: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or an adapter's.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new folder.")],
    dtype: Annotated[Precision, typer.Option(help="Type of the weights; all but float32 round.")] = Precision.float32,
) -> None:
    """Fold an adapter into its base: a plain checkpoint that needs no mmft, read back and compared."""
    from mmft import run

    run.merge(run_dir, out, dtype.value)
