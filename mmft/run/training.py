"""`mmft train`: from a recipe to a trained, saved, evaluated and reported run.

Order matters: data, references and the run folder are checked before any model loads, and nothing is reported as
trained that was not saved and read back.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console
from transformers import set_seed

from mmft.config import Recipe, dump_recipe
from mmft.data.card import data_card
from mmft.data.sources import first_rows
from mmft.eval.evaluator import evaluate_captions, evaluation_record
from mmft.hub import Hub
from mmft.models.policy import Policy, load_policy
from mmft.report.console import say
from mmft.report.folder import BAD_ROWS, BEFORE, DATA_CARD, RECIPE, RunFolder, read_json, read_lines
from mmft.report.html import write_report
from mmft.report.progress import ProgressReporter
from mmft.report.samples import write_eval_samples
from mmft.report.table import print_evaluation
from mmft.report.trackers import open_trackers
from mmft.rewards.terms import TERMS, terms_without
from mmft.run.building import Job, build_trainer, eval_rows, guard_metric, prepare
from mmft.run.captioning import caption_rows
from mmft.run.checkpointing import Checkpoints, save
from mmft.run.device import device_of, dtype_of, quiet_loading
from mmft.run.processes import Processes
from mmft.run.publishing import push
from mmft.run.resuming import Resumed, find_run
from mmft.run.supervised import check_supervised, supervised, warm_up
from mmft.train.ppo import VisionPPOTrainer
from mmft.train.stopping import StopSignals
from mmft.types import Row, Stopped, UserError

FAMILIAR_ROWS = 32  # training pictures that a learned reward is shown beforehand


def train(recipe: Recipe, resume: str | None = None, force: bool = False) -> Path:
    """Trains, evaluates before and after, saves and reports; returns the run folder.

    resume: goes on with a run, see `mmft.run.resuming.find_run`. Raises Stopped where a signal ended it early.
    """
    quiet_loading()
    processes = Processes(cpu=device_of(recipe) == "cpu")
    console = processes.console()
    if recipe.hub.repo:
        processes.from_main(_demand_login)
    resumed = None
    if resume is not None:  # what is not there is said before anything loads
        resumed = processes.from_main(lambda: find_run(recipe, resume, force, console))
    job = prepare(recipe)
    check_supervised(job, resume)
    guard_metric(job)  # one that cannot guard is refused here
    _warn_of_unfamiliar_pictures(job, console)
    resumed = resumed or processes.from_main(lambda: _new_run(recipe))
    run = resumed.run
    with run.lock() if processes.is_main else nullcontext():
        if resumed.finished:
            say(console, f"{run.path} is finished; nothing is left to do")
            return run.path
        say(console, f"-> {run.path}", recipe.name)
        if processes.is_main:
            run.write_recipe(dump_recipe(recipe))
            if resumed.new:
                _show_data(job, run, console)
        try:
            return _train_in(run, resumed, job, console)
        except (Stopped, KeyboardInterrupt):
            say(console, f"to go on: mmft train {run / RECIPE} --resume {run.path}")
            raise


def _new_run(recipe: Recipe) -> Resumed:
    return Resumed(RunFolder.create(recipe.logging.dir, recipe.run_name, dump_recipe(recipe)), new=True)


def _train_in(run: RunFolder, resumed: Resumed, job: Job, console: Console) -> Path:
    recipe, main = job.recipe, job.processes.is_main
    set_seed(recipe.train.seed)
    try:
        policy = load_policy(recipe.model, device_of(recipe), dtype_of(recipe))
        trainer = build_trainer(job, policy, run)
    except UserError:
        if main and resumed.new:
            shutil.rmtree(run.path)  # nothing ran: the name stays free
        raise
    checkpoints = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Checkpoints))
    if not resumed.new:
        checkpoints.load(resumed.checkpoint, console)
    if main:
        _report_bad_rows(run, console)
        for tracker in open_trackers(recipe.logging.report_to, run, trainer.state.global_step):
            trainer.add_callback(tracker)
    rows = eval_rows(job)
    if recipe.warm_up and not trainer.loaded:
        warm_up(job, policy, trainer, run, console)
    before, before_ended = _captions_before(run, policy, rows, job, trainer, console)
    by_reward = recipe.algorithm.type != "sft"
    if by_reward:
        _train(trainer, checkpoints, console)
    else:
        supervised(job, policy, trainer, run, console)
    with console.status("saving"):
        save(run.path, policy, trainer, job.reward, rows[0], critic=by_reward)
    with console.status(f"captioning {len(rows)} {recipe.eval.split} pictures after training"):
        after, after_ended = caption_rows(policy, rows, recipe, trainer)
    if main:
        # Both are scored now: normalisers have moved since the start, and one ruler must measure both.
        scores_before = evaluate_captions(before, rows, job.reward, before_ended)
        scores_after = evaluate_captions(after, rows, job.reward, after_ended)
        ceiling = job.reward.reference_reward(rows, leave_one_out=False)
        record = evaluation_record(scores_before, scores_after, ceiling)
        write_eval_samples(run, rows, before, after, scores_before["reward"].tolist(), scores_after["reward"].tolist())
        run.write_eval(record)
        print_evaluation(record, run.last_step())
        _report_bad_rows(run, console)
        say(console, f"adapter: {run / 'adapter'}\nreport:  {write_report(run.path)}")
    job.processes.wait()
    trainer.accelerator.end_training()
    if recipe.hub.repo and main:
        _publish(run)
    return run.path


def _demand_login() -> None:
    """A token that is wrong is told before training, not after it."""
    try:
        Hub().user()
    except UserError as error:
        raise UserError(f"hub.repo: {error}") from error


def _publish(run: RunFolder) -> None:
    try:
        push(str(run.path))
    except UserError as error:
        again = f"the run is whole; to push it again: mmft push {run.path}"
        raise UserError(f"hub.repo: {error}. Trained, saved and evaluated: {again}") from error


def _show_data(job: Job, run: RunFolder, console: Console) -> None:
    """The data card: on the screen, and in the run folder."""
    card = data_card(job.train, job.heldout)
    run.write_text(DATA_CARD, json.dumps(card.as_dict(), indent=2, ensure_ascii=False) + "\n")
    for number, line in enumerate(card.lines()):
        say(console, line, "" if number else "data")
    if card.without_references == card.looked_at:
        usable = terms_without(references=True)
        say(console, f"without references these terms are impossible: {', '.join(sorted(set(TERMS) - set(usable)))}")


def _captions_before(
    run: RunFolder, policy: Policy, rows: Sequence[Row], job: Job, trainer: VisionPPOTrainer, console: Console
) -> tuple[list[str], list[bool]]:
    """The untrained policy's captions, written down: a resumed run has no untrained policy any more."""
    known = job.processes.from_main(lambda: read_json(run / BEFORE))
    if known is not None and known["ids"] == [row.id for row in rows]:
        if not trainer.loaded:
            trainer.interface.load_state_dict(known["interface"])
        return known["captions"], known["ended"]
    if trainer.loaded:
        raise UserError(f"{run / BEFORE}: missing or of other pictures; captions before training cannot be made anew")
    with console.status(f"captioning {len(rows)} {job.recipe.eval.split} pictures before training"):
        captions, ended = caption_rows(policy, rows, job.recipe, trainer)
    if job.processes.is_main:
        record = {"ids": [row.id for row in rows], "captions": captions, "ended": ended}
        record["interface"] = trainer.interface.state_dict()
        run.write_text(BEFORE, json.dumps(record, ensure_ascii=False) + "\n")
    return captions, ended


def _train(trainer: VisionPPOTrainer, checkpoints: Checkpoints, console: Console) -> None:
    """Trains to the end, which is saved as a checkpoint, as is where a signal stops it. Raises Stopped there."""
    started, first = time.perf_counter(), trainer.state.global_step
    if checkpoints.guard is not None and checkpoints.guard.has_stopped:
        return

    def answer(signum: int) -> None:
        say(console, "\nstopping: this micro-batch is finished, then all is saved; Ctrl-C leaves at once")

    with StopSignals(answer) as trainer.steps.signals:
        try:
            trainer.train()
        except Stopped:
            if trainer.state.global_step:
                say(console, f"saved {checkpoints.save()}")
            raise
        finally:
            for callback in trainer.callback_handler.callbacks:
                if isinstance(callback, ProgressReporter):
                    callback.close()
        checkpoints.save()
    trainer.steps.signals = None
    steps, seconds = trainer.state.global_step - first, time.perf_counter() - started
    say(console, f"trained {steps} step{'s' * (steps != 1)} in {seconds:.0f} s")


def _warn_of_unfamiliar_pictures(job: Job, console: Console) -> None:
    """A learned reward says something of any picture; of those unlike its own, that is worth little."""
    network = next((e.term for e in job.reward.terms.values() if hasattr(e.term, "unfamiliar")), None)
    if network is None:
        return
    share = network.unfamiliar(first_rows(job.train, FAMILIAR_ROWS))
    if share > 0.5:
        say(
            console,
            f"reward.model {job.recipe.reward.model} was trained on other pictures than these "
            f"({share:.0%} lie outside): its judgement means little here. Use caption_ppo_fixed, or train a reward "
            "model on pictures like yours (reward_models/README.md).",
            "warning",
        )


def _report_bad_rows(run: RunFolder, console: Console) -> None:
    """Rows that were left out, all of which are in bad_rows.jsonl by now."""
    count = sum(1 for _ in read_lines(run / BAD_ROWS))
    if count:
        say(console, f"skipped {count} bad rows, listed in {run / BAD_ROWS}")
