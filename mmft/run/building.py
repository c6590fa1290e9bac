"""From a recipe to a trainer with its data, reward, guard and logs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from mmft.config import DataConfig, Recipe, dump_recipe
from mmft.data.imagefolder import ImageFolder
from mmft.data.metadata import BadRow
from mmft.data.sources import Source, first_rows, open_cursor, open_source, open_training
from mmft.data.table import TableRows, TableStream
from mmft.models.policy import Policy
from mmft.models.prompts import PromptBuilder
from mmft.models.structure import context_length
from mmft.report.console import say
from mmft.report.folder import RunFolder, write_atomic
from mmft.report.progress import ProgressReporter
from mmft.report.trackers import Tracker, check_trackers
from mmft.rewards.combine import RewardFunction, build_reward
from mmft.rewards.terms import terms_without
from mmft.run.captioning import PeriodicEvaluation
from mmft.run.checkpointing import Checkpoints, save
from mmft.run.device import device_of
from mmft.run.guard import RewardGuard, choose_metric, kinds_of
from mmft.run.processes import Processes
from mmft.train.experience import Rollout
from mmft.train.ppo import VisionPPOTrainer
from mmft.train.ppo_config import VisionPPOConfig
from mmft.types import Needs, Row, UserError

FIT_ROWS = 4000  # training rows whose references a reward's statistics come from
_SUSPICIOUS = 4  # a prompt whose bytes fill a fourth of the model's context is measured in tokens
_LOGS_KEPT = 100  # of a trainer's log history; metrics.jsonl has all


@dataclass(frozen=True)
class Job:
    """What a recipe needs before a model loads."""

    recipe: Recipe
    train: Source | TableStream
    heldout: Source
    reward: RewardFunction
    processes: Processes


def prepare(recipe: Recipe) -> Job:
    """Data and reward, checked against each other. Raises UserError before a model is touched."""
    _refuse_what_cannot_be(recipe)
    processes = Processes(cpu=device_of(recipe) == "cpu")
    reward = build_reward(recipe.reward, device_of(recipe))
    try:
        source = open_training(recipe.data, reward.needs)
        heldout = open_source(recipe.data, recipe.eval.split, recipe.eval.samples, reward.needs)
        first_rows(source, 1)  # that there is one; a stream does not say so before it is read
    except UserError as error:
        raise UserError(_what_the_data_lacks(recipe.data, reward.needs) or str(error)) from error
    reward.fit(source.rows_without_pictures(FIT_ROWS))
    return Job(recipe, source, heldout, reward, processes)


def _what_the_data_lacks(data: DataConfig, needs: Needs) -> str | None:
    """What to say where no row at all has what the reward needs; None where that is not what is wrong."""
    try:
        texts = list(open_training(data).rows_without_pictures(FIT_ROWS))
    except UserError:
        return None
    referred, answered = any(row.references for row in texts), any(row.answer is not None for row in texts)
    usable = ", ".join(terms_without(references=not referred, answers=not answered))
    for who, what, column, there in (
        (needs.references, "references", "references", referred),
        (needs.answers, "answers", "answer", answered),
    ):
        if who and texts and not there:
            return (
                f"{who} needs {what}, and no row of {data.type} data has any; name their column in "
                f"data.columns.{column}, or use only terms that do without: {usable}"
            )
    return None


def _refuse_what_cannot_be(recipe: Recipe) -> None:
    """Values of keys that would be wrong for this job: silence would be a lie."""
    if recipe.model.lora is not None and recipe.model.lora.dropout:
        raise UserError("model.lora.dropout: PPO compares log-probabilities of two passes, so it must be 0")
    check_trackers(recipe.logging.report_to)


def build_trainer(job: Job, policy: Policy, run: RunFolder) -> VisionPPOTrainer:
    """The trainer of a recipe, logging to its run folder."""
    recipe = job.recipe
    placeholder = PromptBuilder(policy.processor).placeholder
    if placeholder and placeholder.lower() in recipe.data.prompt.lower():
        raise UserError(f"data.prompt: holds the picture placeholder {placeholder!r}, which mmft writes itself")
    trainer = VisionPPOTrainer(
        args=trainer_arguments(recipe, run, job.processes.count),
        processing_class=policy.processor,
        model=policy.model,
        reward_model=job.reward,
        train_dataset=open_cursor(job.train, recipe.train.seed),
        callbacks=[RunLog(run), ProgressReporter()],
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    every = recipe.logging.samples_every
    guard = build_guard(job, policy, trainer, run)

    def write_samples(step: int, rollout: Rollout) -> None:
        if guard is not None:
            rollout.watched.update(guard.watch(rollout))
        wanted = trainer.ranks.is_main and every and (step % every == 0 or step == 1)
        if wanted and rollout.reward is not None:
            run.write_samples(step, rollout.captions, rollout.rows, rollout.reward, rollout.finished_B.tolist())
            for callback in trainer.callback_handler.callbacks:
                if isinstance(callback, Tracker):
                    callback.log_samples(step, rollout.captions, rollout.rows, rollout.reward)

    def save_models(folder: Path) -> None:
        save(folder, policy, trainer, job.reward, job.heldout[0])

    def keep_batch(data: bytes) -> Path:
        path = run / f"batch-step-{trainer.state.global_step + 1}-process-{trainer.ranks.index}.safetensors"
        write_atomic(path, data)
        return path

    trainer.keep_batch, trainer.recipe_text = keep_batch, dump_recipe(recipe)
    job.reward.gather = trainer.ranks.gather_list
    job.reward.on_drop = run.append_dropped
    for source in (job.train, job.heldout):
        if isinstance(source, ImageFolder | TableStream | TableRows):
            source.bad_rows.tell(run.append_bad_row, known=job.processes.is_main)
            source.accept_only(partial(_refuse_too_long, trainer, recipe.generation.max_new_tokens))
    trainer.on_rollout = write_samples
    if recipe.eval.every:
        trainer.add_callback(PeriodicEvaluation(run, policy, eval_rows(job), recipe, job.reward, trainer))
    if guard is not None:
        trainer.add_callback(guard)
    trainer.add_callback(Checkpoints(run, trainer, recipe.train.save_every, recipe.train.keep, guard, save_models))
    return trainer


def _refuse_too_long(trainer: VisionPPOTrainer, response: int, row: Row) -> None:
    """Raises BadRow where prompt and response are longer than the model's context. Most are told by their bytes,
    which are no fewer than their tokens.
    """
    room = context_length(trainer.interface.base)
    if room is None or len(row.prompt.encode()) * _SUSPICIOUS < room:
        return
    try:
        length = len(trainer.builder(row))
    except UserError as error:
        raise BadRow(str(error)) from error
    if length + response > room:
        raise BadRow(f"a prompt of {length} tokens and a response of {response} do not fit the model's {room}")


def guard_metric(job: Job) -> str | None:
    """The metric that `reward.tripwire` watches; None where it is off or nothing can be measured. Raises UserError."""
    config = job.recipe.reward.tripwire
    if config.action == "off":
        return None
    rows = list(job.heldout.rows_without_pictures(FIT_ROWS))
    row = next((row for row in rows if row.references or row.scene is not None), rows[0])
    return choose_metric(config.metric, row, kinds_of(job.reward))


def build_guard(job: Job, policy: Policy, trainer: VisionPPOTrainer, run: RunFolder) -> RewardGuard | None:
    """The watch over a metric that is not in the reward; None where it is off or nothing can be measured."""
    config = job.recipe.reward.tripwire
    metric = guard_metric(job)
    if metric is None:
        if config.action != "off":
            console = Console(stderr=True)
            say(console, "no tripwire: pictures have neither references nor a scene graph")
        return None

    def save_best(folder: Path) -> None:
        save(folder, policy, trainer, job.reward, job.heldout[0])

    return RewardGuard(metric, config, run, trainer, save_best)


def trainer_arguments(recipe: Recipe, run: RunFolder, processes: int = 1) -> VisionPPOConfig:
    """A recipe's numbers under TRL's names, which are those of one process. Raises UserError where the batch cannot be
    shared.
    """
    t, a, g = recipe.train, recipe.ppo, recipe.generation
    batch = t.batch // processes
    minibatch = batch // t.minibatches
    micro = min(t.micro_batch or minibatch, minibatch)
    parts = processes * t.minibatches * max(1, micro)
    if not minibatch or t.batch % parts or batch % t.samples_per_prompt:
        raise UserError(
            f"train.batch: {t.batch} captions cannot be shared by {processes} processes with {t.minibatches} "
            f"minibatches, micro-batches of {micro} and {t.samples_per_prompt} captions a picture"
        )
    return VisionPPOConfig(
        output_dir=str(run / "checkpoints"),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=batch // micro,
        num_mini_batches=t.minibatches,
        num_ppo_epochs=t.epochs,
        total_episodes=t.steps * t.batch,
        learning_rate=t.lr,
        value_learning_rate=t.value_lr,
        schedule=t.schedule,
        warmup=t.warmup,
        seed=t.seed,
        samples_per_prompt=t.samples_per_prompt,
        critic=a.critic,
        encode_once=recipe.model.encode_once,
        feature_cache_gb=recipe.model.feature_cache_gb,
        share_prompts=t.share_prompts,
        local_rollout_forward_batch_size=batch,
        workers=t.workers,
        response_length=g.max_new_tokens,
        min_new_tokens=g.min_new_tokens,
        temperature=g.temperature,
        top_k=g.top_k,
        top_p=g.top_p,
        gamma=a.gamma,
        lam=a.lam,
        cliprange=a.clip_range,
        cliprange_value=a.value_clip_range,
        vf_coef=a.value_coef,
        entropy_coef=a.entropy_coef,
        whiten_rewards=a.whiten_rewards,
        whiten_advantages=a.whiten_advantages,
        missing_eos_penalty=a.missing_eos_penalty,
        target_kl=a.target_kl,
        max_grad_norm=a.max_grad_norm,
        kl_coef=recipe.kl.coef,
        kl_estimator=recipe.kl.estimator,
        kl_target=recipe.kl.target,
        kl_horizon=recipe.kl.horizon,
        l2=recipe.anchor.l2,
        adapter_penalty=recipe.adapter_penalty,
        weight_decay=0.0,
        report_to=[],  # trackers are opened when it is known where the run goes on
        run_name=run.path.name,
        project="mmft",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=device_of(recipe) == "cpu",
    )


class RunLog(TrainerCallback):
    """A line of metrics.jsonl a step."""

    def __init__(self, run: RunFolder):
        self.run = run

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            self.run.log(state.global_step, {k: v for k, v in logs.items() if k not in ("epoch", "step")})
        del state.log_history[:-_LOGS_KEPT]  # or memory would grow with every step


def eval_rows(job: Job) -> list[Row]:
    return [job.heldout[i] for i in range(min(len(job.heldout), job.recipe.eval.samples))]
