"""`mmft reward`: train, score, data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmft.cli.arguments import Overrides

app = typer.Typer(help="Reward models: train, score.", no_args_is_help=True)


@app.command(
    "train", epilog="Example: mmft reward train reward_models/caption.yaml train.steps=200 model.fusion=attention"
)
def train(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A file of reward_models/, or a name: caption, caption_linear, ...")
    ],
    overrides: Overrides = None,
) -> None:
    """Train a reward model; prints held-out accuracy, calibration and learned weights."""
    from mmft.config import load_reward_recipe

    loaded = load_reward_recipe(recipe, overrides or [])
    from mmft import run

    run.train_reward(loaded)


@app.command("score", epilog="Example: mmft reward score runs/caption_reward --data my_preferences.jsonl")
def score(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A reward model's folder, builtin:NAME or hub id.")],
    data: Annotated[
        str,
        typer.Option(help="`scenes`, a folder with metadata.jsonl, or a .jsonl or .parquet of preferences or ratings."),
    ],
    limit: Annotated[int | None, typer.Option(min=1, help="Rows at most.")] = None,
) -> None:
    """Score captions: one JSON line each, with mean, both sigmas and every term."""
    import json

    from mmft import run

    for record in run.score_captions(model, data, limit):
        typer.echo(json.dumps(record, ensure_ascii=False))


@app.command("data", epilog="Example: mmft reward data reward_models/caption.yaml preferences.jsonl")
def data(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A file of reward_models/, or its name.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The .jsonl or .parquet to write.")],
    overrides: Overrides = None,
) -> None:
    """Write the preferences or ratings that a recipe learns from to a file."""
    from mmft.config import load_reward_recipe

    loaded = load_reward_recipe(recipe, overrides or [])
    from mmft import run

    typer.echo(f"{out}: {run.write_judgements(loaded, out)} judgements")
