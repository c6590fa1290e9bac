"""`mmft train`: from a recipe to a trained, saved, evaluated and reported run.

Order matters: data, references and the run folder are checked before any model loads, and nothing is reported as
trained that was not saved and read back.
"""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import enable_progress_bars
from rich.console import Console
from safetensors.torch import save_file
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, set_seed
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import logging as transformers_logging

from mmft.config import Recipe, RewardRecipe, dump_recipe
from mmft.data.sources import Repeated, Source, open_source
from mmft.eval.evaluator import evaluate_captions, evaluation_record
from mmft.models.adapter_io import save_adapter
from mmft.models.generation import caption
from mmft.models.interface import Interface
from mmft.models.policy import Policy, load_policy
from mmft.models.value_adapter import save_value_adapter
from mmft.report.folder import RunFolder, write_atomic
from mmft.report.html import write_report
from mmft.report.progress import ProgressReporter
from mmft.report.samples import write_eval_samples
from mmft.report.table import print_evaluation
from mmft.rewards.combine import RewardFunction, build_reward
from mmft.run.guard import RewardGuard, choose_metric, kinds_of
from mmft.train.experience import Rollout
from mmft.train.ppo import VisionPPOTrainer
from mmft.train.ppo_config import VisionPPOConfig
from mmft.types import Row, UserError

FAMILIAR_ROWS = 32  # training pictures that a learned reward is shown beforehand
FIT_ROWS = 4000  # training rows whose references a reward's statistics come from


@dataclass(frozen=True)
class Job:
    """What a recipe needs before a model loads."""

    recipe: Recipe
    train: Source
    heldout: Source
    reward: RewardFunction


def train(recipe: Recipe) -> Path:
    """Trains, evaluates before and after, saves and reports; returns the run folder."""
    console = Console(stderr=True)
    quiet_loading()
    job = prepare(recipe)
    guard_metric(job)  # one that cannot guard is refused here
    _warn_of_unfamiliar_pictures(job, console)
    run = RunFolder.create(recipe.logging.dir, recipe.run_name)
    run.write_recipe(dump_recipe(recipe))
    console.print(f"[bold]{recipe.name}[/] -> {run.path}", highlight=False)
    set_seed(recipe.train.seed)
    try:
        policy = load_policy(recipe.model, device_of(recipe), dtype_of(recipe))
        trainer = build_trainer(job, policy, run)
    except UserError:
        shutil.rmtree(run.path)  # nothing ran: the name stays free
        raise
    rows = eval_rows(job)
    with console.status(f"captioning {len(rows)} {recipe.eval.split} pictures before training"):
        before, before_ended = caption_rows(policy, rows, recipe, trainer.interface)
    _train(trainer, console)
    with console.status("saving"):
        save(run.path, policy, trainer, job.reward, rows[0])
    with console.status(f"captioning {len(rows)} {recipe.eval.split} pictures after training"):
        after, after_ended = caption_rows(policy, rows, recipe, trainer.interface)
    # Both are scored now: normalisers have moved since the start, and one ruler must measure both.
    scores_before = evaluate_captions(before, rows, job.reward, before_ended)
    scores_after = evaluate_captions(after, rows, job.reward, after_ended)
    ceiling = job.reward.reference_reward(rows, leave_one_out=False)
    record = evaluation_record(scores_before, scores_after, ceiling)
    run.write_eval(record)
    write_eval_samples(run, rows, before, after, scores_before["reward"].tolist(), scores_after["reward"].tolist())
    print_evaluation(record, run.last_step())
    _report_bad_rows(job, run, console)
    console.print(f"adapter: {run / 'adapter'}\nreport:  {write_report(run.path)}", highlight=False)
    return run.path


def _warn_of_unfamiliar_pictures(job: Job, console: Console) -> None:
    """A learned reward says something of any picture; of those unlike its own, that is worth little."""
    network = next((e.term for e in job.reward.terms.values() if hasattr(e.term, "unfamiliar")), None)
    if network is None:
        return
    share = network.unfamiliar([job.train[i] for i in range(min(FAMILIAR_ROWS, len(job.train)))])
    if share > 0.5:
        console.print(
            f"[bold yellow]warning[/] reward.model {job.recipe.reward.model} was trained on other pictures than these "
            f"({share:.0%} lie outside): its judgement means little here. Use caption_ppo_fixed, or train a reward "
            "model on pictures like yours (reward_models/README.md).",
            highlight=False,
        )


def _report_bad_rows(job: Job, run: RunFolder, console: Console) -> None:
    """Rows that `data.on_bad_row: skip` left out: counted on screen, listed in bad_rows.jsonl."""
    found = [row for source in (job.train, job.heldout) for row in getattr(source, "bad_rows", [])]
    bad = list({json.dumps(row, sort_keys=True): row for row in found}.values())
    if bad:
        run.write_lines("bad_rows.jsonl", bad)
        console.print(f"skipped {len(bad)} bad rows, listed in {run / 'bad_rows.jsonl'}", highlight=False)


def prepare(recipe: Recipe) -> Job:
    """Data and reward, checked against each other. Raises UserError before a model is touched."""
    _refuse_what_is_not_there(recipe)
    source = open_source(recipe.data, "train")
    heldout = open_source(recipe.data, recipe.eval.split, recipe.eval.samples)
    reward = build_reward(recipe.reward, device_of(recipe))
    reward.check(itertools.chain(source.rows_without_pictures(FIT_ROWS), heldout.rows_without_pictures(FIT_ROWS)))
    reward.fit(source.rows_without_pictures(FIT_ROWS))
    return Job(recipe, source, heldout, reward)


def _refuse_what_is_not_there(recipe: Recipe) -> None:
    """Keys of the contract that this version accepts in one value only: silence would be a lie."""
    if recipe.model.lora is not None and recipe.model.lora.dropout:
        raise UserError("model.lora.dropout: PPO compares log-probabilities of two passes, so it must be 0")
    if recipe.hub.repo:
        raise UserError("hub.repo: pushing is not available yet; the adapter folder can be uploaded by hand")
    try:
        for tracker in get_reporting_integration_callbacks(list(recipe.logging.report_to)):
            tracker()
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"logging.report_to: {str(error).splitlines()[0]}") from error


def device_of(recipe: Recipe | RewardRecipe) -> str:
    device = recipe.train.device
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device: cuda is not available here; use auto or cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def dtype_of(recipe: Recipe) -> torch.dtype:
    """Weights' type where `model.dtype` is auto: `train.precision`, whose auto is bf16 on hardware that has it."""
    precision = recipe.train.precision
    if precision == "auto":
        # Weights that train need more than 8 bits: a small step would round to none.
        frozen = recipe.model.lora is not None and not recipe.model.lora.modules_to_save
        precision = "bf16" if frozen and _has_bf16(device_of(recipe)) else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _has_bf16(device: str) -> bool:
    """Whether matrix products in bf16 are the device's own; emulated, they are slower than fp32."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    return any(getattr(torch.cpu, f"_is_{kind}_supported", bool)() for kind in ("amx_tile", "avx512_bf16"))


def build_trainer(job: Job, policy: Policy, run: RunFolder) -> VisionPPOTrainer:
    """The trainer of a recipe, logging to its run folder."""
    recipe = job.recipe
    prompts = recipe.train.batch // recipe.train.samples_per_prompt
    trainer = VisionPPOTrainer(
        args=trainer_arguments(recipe, run),
        processing_class=policy.processor,
        model=policy.model,
        reward_model=job.reward,
        train_dataset=Repeated(job.train, prompts),
        callbacks=[RunLog(run), ProgressReporter()],
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    every = recipe.logging.samples_every
    guard = build_guard(job, policy, trainer, run)

    def write_samples(step: int, rollout: Rollout) -> None:
        if guard is not None:
            rollout.watched.update(guard.watch(rollout))
        if every and (step % every == 0 or step == 1) and rollout.reward is not None:
            run.write_samples(step, rollout.captions, rollout.rows, rollout.reward, rollout.finished_B.tolist())

    trainer.on_rollout = write_samples
    trainer.add_callback(Checkpoints(run, policy, trainer, job))
    if recipe.eval.every:
        trainer.add_callback(PeriodicEvaluation(run, policy, job, trainer.interface))
    if guard is not None:
        trainer.add_callback(guard)
    return trainer


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
            console.print("no tripwire: pictures have neither references nor a scene graph", highlight=False)
        return None

    def save_best(folder: Path) -> None:
        save(folder, policy, trainer, job.reward, job.heldout[0])

    return RewardGuard(metric, config, run, trainer, save_best)


def trainer_arguments(recipe: Recipe, run: RunFolder) -> VisionPPOConfig:
    """A recipe's numbers under TRL's names."""
    t, a, g = recipe.train, recipe.algorithm, recipe.generation
    minibatch = t.batch // t.minibatches
    micro = t.micro_batch or minibatch
    return VisionPPOConfig(
        output_dir=str(run / "checkpoints"),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=t.batch // micro,
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
        local_rollout_forward_batch_size=t.batch,
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
        report_to=list(recipe.logging.report_to),
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


def _train(trainer: VisionPPOTrainer, console: Console) -> None:
    started = time.perf_counter()
    try:
        trainer.train()
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressReporter):
                callback.close()
    console.print(
        f"trained {trainer.state.global_step} steps in {time.perf_counter() - started:.0f} s", highlight=False
    )


class Checkpoints(TrainerCallback):
    """Every `train.save_every` steps: adapter, critic and reward under checkpoints/step-N, the newest `train.keep`."""

    def __init__(self, run: RunFolder, policy: Policy, trainer: VisionPPOTrainer, job: Job):
        self.run, self.policy, self.trainer, self.job = run, policy, trainer, job

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        every, keep = self.job.recipe.train.save_every, self.job.recipe.train.keep
        if not every or state.global_step % every:
            return
        folder = self.run / "checkpoints" / f"step-{state.global_step}"
        folder.mkdir(parents=True)
        save(folder, self.policy, self.trainer, self.job.reward, self.job.heldout[0])
        steps = sorted(folder.parent.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
        for old in steps[:-keep]:
            shutil.rmtree(old)


class PeriodicEvaluation(TrainerCallback):
    """Every `eval.every` steps: the means of the held-out metrics, as eval/* in metrics.jsonl."""

    def __init__(self, run: RunFolder, policy: Policy, job: Job, interface: Interface):
        self.run, self.policy, self.job, self.interface = run, policy, job, interface
        self.rows = eval_rows(job)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.job.recipe.eval.every:
            return
        captions, ended = caption_rows(self.policy, self.rows, self.job.recipe, self.interface)
        scores = evaluate_captions(captions, self.rows, self.job.reward, ended)
        self.run.log(state.global_step, {f"eval/{name}": np.nanmean(values) for name, values in scores.items()})


def save(folder: Path, policy: Policy, trainer: VisionPPOTrainer, reward: RewardFunction, row: Row) -> None:
    """Adapter (checked by reading it back), critic, and the reward's learned state, under `folder`."""
    interface = trainer.interface
    token = torch.full((1, 1), interface.pad_id, device=interface.device)
    probe = interface.pack([interface.builder(row)], token, torch.ones_like(token, dtype=torch.bool), share=False)
    save_adapter(policy.model, folder / "adapter", probe.inputs)
    for name in ("critic", "reward"):
        (folder / name).mkdir(exist_ok=True)
    module = trainer.accelerator.unwrap_model(trainer.model)
    head = {name: tensor.contiguous() for name, tensor in module.value_model.state_dict().items()}
    save_file(head, folder / "critic" / "value_head.safetensors")
    if module.critic_adapter:
        save_value_adapter(policy.model, folder / "critic" / "adapter")
    write_atomic(folder / "reward" / "state.json", json.dumps(reward.state_dict()).encode())


def eval_rows(job: Job) -> list[Row]:
    return [job.heldout[i] for i in range(min(len(job.heldout), job.recipe.eval.samples))]


def caption_rows(
    policy: Policy, rows: Sequence[Row], recipe: Recipe, interface: Interface | None = None
) -> tuple[list[str], list[bool]]:
    return caption(policy, rows, recipe.generation.max_new_tokens, recipe.eval.batch, interface)


def quiet_loading() -> None:
    """No bar for reading weights from disk where the log is quiet too (not under `--debug`); downloads keep theirs."""
    if transformers_logging.get_verbosity() >= transformers_logging.ERROR:
        transformers_logging.disable_progress_bar()
        enable_progress_bars()
