"""The `mmft` command: reads arguments, calls one function, turns what the user can mend into one line.

Commands import what they need when they run, so that `mmft --help` answers at once, without torch.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmft import __version__
from mmft.cli.arguments import Overrides, RecipeArgument, Target
from mmft.cli.data import app as data_app
from mmft.cli.hub import EXAMPLES as HUB_EXAMPLES
from mmft.cli.hub import merge, pull, push
from mmft.cli.reward import app as reward_app
from mmft.types import Stopped, UserError

if TYPE_CHECKING:
    from mmft.config import Recipe, RewardRecipe

LONGEST_ERROR = 800  # letters; what is quoted may be longer
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
UsageError: type[Exception] = typer.BadParameter.__base__  # type: ignore[assignment]  # typer exports only its child

app = typer.Typer(
    name="mmft",
    help="Fine-tune pretrained vision-language models with reinforcement learning from learned rewards.",
    epilog="Example: mmft train recipes/caption_ppo.yaml train.steps=20",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")
app.add_typer(reward_app, name="reward")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mmft {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show it.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks and library warnings; goes anywhere.")
    ] = False,
) -> None:
    pass  # --debug is taken out by `main`, which accepts it at any place; it is declared here to be listed in --help.


@app.command(
    epilog="Examples: mmft train recipes/caption_ppo.yaml train.steps=20 train.seed=1; the same with --resume goes on "
    "where that run ended; with accelerate=ddp_cpu it runs in several processes."
)
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="[PATH]",
            help="Go on with the newest run of this name, or with PATH: a run folder, or a checkpoint in one.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Resume though the recipe has changed.")] = False,
) -> None:
    """Train as a recipe says; writes a run folder."""
    from mmft.config import load_recipe

    loaded = load_recipe(recipe, overrides or [])  # before the heavy imports: a typo is answered at once
    if force and resume is None:
        raise UserError("--force: goes with --resume")
    if loaded.accelerate and not _is_launched():
        from mmft.run.launching import launch

        options = [*([f"--resume={resume}"] if resume is not None else []), *(["--force"] if force else [])]
        raise typer.Exit(launch(loaded.accelerate, ["train", recipe, *(overrides or []), *options]))
    from mmft import run

    run.train(loaded, resume, force)


@app.command("eval", epilog="Example: mmft eval runs/caption_ppo eval.samples=512")
def evaluate(
    target: Target,
    overrides: Overrides = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Pictures: `scenes`, or a folder with metadata.jsonl; for a reward model, a file of preferences or "
            "ratings. Default: the run's own."
        ),
    ] = None,
) -> None:
    """Measure captions on held-out pictures, with 95% intervals; or judge a reward model."""
    from mmft import run

    if run.is_reward_model(target):
        run.evaluate_reward(target, data, tuple(overrides or ()))
    else:
        run.evaluate(target, data, overrides or [])


@app.command(epilog="Example: mmft generate runs/caption_ppo cat.jpg dog.png --prompt 'Describe the picture.'")
def generate(
    target: Target,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Picture files.")],
    prompt: Annotated[str | None, typer.Option(help="What to ask. Default: the run's prompt.")] = None,
) -> None:
    """Caption pictures, one line each."""
    for image in images:
        if not image.is_file():
            raise UserError(f"{image}: no such picture")
    from mmft import run

    for image, caption in zip(images, run.generate(target, images, prompt), strict=True):
        typer.echo(f"{image}: {caption}")


@app.command(epilog="Example: mmft report runs/caption_ppo --open")
def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or a reward model's.")],
    show: Annotated[bool, typer.Option("--open", help="Show it in a browser.")] = False,
) -> None:
    """Write a run's report: one self-contained HTML page."""
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run folder")
    from mmft.report.folder import is_reward_folder
    from mmft.report.html import write_report
    from mmft.report.reward_page import write_reward_page

    page = write_reward_page(run_dir) if is_reward_folder(run_dir) else write_report(run_dir)
    typer.echo(page)
    if show:
        typer.launch(page.resolve().as_uri())


@app.command(epilog="Example: mmft recipes")
def recipes() -> None:
    """List the recipes at hand, each with its first line: those of `mmft train`, then of `mmft reward train`."""
    from mmft.config import REWARD_MODELS, find_recipes

    found = find_recipes() | {f"reward {name}": path for name, path in find_recipes(REWARD_MODELS).items()}
    if not found:
        raise UserError("no recipes here: run from a clone of mmft, or give the path of a recipe file")
    width = max(len(str(path)) for path in found.values())
    for path in found.values():
        first_line = path.read_text(encoding="utf-8").partition("\n")[0]
        typer.echo(
            f"{path!s:<{width}}  {first_line.removeprefix('#').strip() if first_line[:1] == '#' else ''}".rstrip()
        )


@app.command(epilog="Example: mmft validate recipes/caption_ppo.yaml train.batch=128 --show")
def validate(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    show: Annotated[bool, typer.Option("--show", help="Print every key with its resolved value.")] = False,
) -> None:
    """Check a recipe, of a policy or of a reward model, without loading a model."""
    from mmft.config import dump_recipe, is_reward_recipe, load_recipe, load_reward_recipe

    if is_reward_recipe(recipe):
        of_reward = load_reward_recipe(recipe, overrides or [])
        text, summary = dump_recipe(of_reward), _reward_summary(of_reward)
    else:
        of_policy = load_recipe(recipe, overrides or [])
        text, summary = dump_recipe(of_policy), _policy_summary(of_policy)
    typer.echo(text if show else f"{recipe}: valid. {summary}\n", nl=False)


@app.command(epilog="Example: mmft plan recipes/caption_ppo.yaml train.batch=256 --memory 24GB")
def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory to fit in, as 24GB. Default: what the device has free.")
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="Time a few small steps with the loaded model.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print numbers for machines: bytes and seconds.")] = False,
) -> None:
    """Predict memory and time of a training run; exit status 1 where it does not fit, with what to change."""
    from mmft.config import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from mmft.run import planning

    if not planning.plan(loaded, memory, probe, as_json):
        raise typer.Exit(1)


@app.command(epilog="Example: mmft replay runs/caption_ppo/batch-step-7-process-0.safetensors train.precision=fp32")
def replay(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A batch that a run kept when its numbers broke.")],
    overrides: Overrides = None,
) -> None:
    """Run again the batch at which a loss or gradient was not finite, row by row; exit status 1 where it still is."""
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    from mmft import run

    if not run.replay_batch(file, overrides or []):
        raise typer.Exit(1)


for command in (push, pull, merge):
    app.command(epilog=HUB_EXAMPLES[command.__name__])(command)


def _policy_summary(recipe: Recipe) -> str:
    reward = ", ".join([*filter(None, [recipe.reward.model]), *(term.label for term in recipe.reward.terms)])
    return (
        f"{recipe.algorithm.type} on {recipe.data.type}, {recipe.train.steps} steps of {recipe.train.batch} captions, "
        f"reward: {reward}"
    )


def _reward_summary(recipe: RewardRecipe) -> str:
    model, terms = recipe.model, ", ".join(term.label for term in recipe.terms)
    network = "" if model is None else f", {model.fusion} of {model.vision} and {model.text}"
    steps = "" if model is None else f", at most {recipe.train.steps} steps of {recipe.train.batch}"
    return f"Reward model: {recipe.loss} on {recipe.data.type}{network}{steps}; learned weights: {terms or 'none'}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 2 for what the user can mend, 130 or 143 when stopped.

    Anything else that goes wrong is a bug of ours and keeps its traceback.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    if not debug:
        _quiet_libraries()
    try:
        arguments = _with_resume([argument for argument in arguments if argument != "--debug"])
        status = app(args=arguments, prog_name="mmft", standalone_mode=False)
        status = status if isinstance(status, int) else 0
    except (UserError, UsageError) as error:
        if debug:
            raise
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        return _fail(message) if message else EXIT_USER_ERROR  # no message: the help was shown
    except Stopped as stopped:
        return stopped.exit_status
    except (typer.Abort, KeyboardInterrupt):
        status = EXIT_INTERRUPTED  # some releases of typer raise, others return the status
    if status == EXIT_INTERRUPTED:
        typer.echo("interrupted", err=True)
    return status


def _with_resume(arguments: list[str]) -> list[str]:
    """`--resume` with its value spelled out, which may be left out: "" stands for the newest run."""
    spelled: list[str] = []
    rest = iter(range(len(arguments)))
    for i in rest:
        if arguments[i] != "--resume":
            spelled.append(arguments[i])
            continue
        following = arguments[i + 1] if i + 1 < len(arguments) else "-"
        has_recipe = any(not a.startswith("-") and "=" not in a for a in spelled[1:])
        if has_recipe and not following.startswith("-") and "=" not in following:
            spelled.append(f"--resume={following}")
            next(rest)
        else:
            spelled.append("--resume=")
    return spelled


def _fail(message: str) -> int:
    line = f"error: {_printable(' '.join(message.split()))}"
    if not _left_to_launcher(line):
        typer.echo(line, err=True)
    return EXIT_USER_ERROR


def _printable(text: str) -> str:
    """A message that may quote anything, as one line that a terminal shows as it is."""
    if len(text) > LONGEST_ERROR:
        half = LONGEST_ERROR // 2
        text = f"{text[:half]} ... {text[-half:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _is_launched() -> bool:
    """Whether a launcher started this process, as one of several."""
    return "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def _left_to_launcher(line: str) -> bool:
    """Whether a launcher of ours waits for errors, to print once what N processes say."""
    if not _is_launched():
        return False
    from mmft.run.launching import leave_error

    return leave_error(line)


def _quiet_libraries() -> None:
    """Keep the libraries' advice to their own developers off the user's screen; what the user has set stays."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", module=r"(transformers|trl|peft|accelerate|datasets|huggingface_hub|torch)\b")
