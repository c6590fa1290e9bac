"""PPO for vision-language models: TRL's `PPOTrainer` with pictures, LoRA, a shared-trunk critic and an L2 anchor.

TRL gives the constructor, accelerator, optimizer, callbacks, saving and hub plumbing; rollout, scoring, update and
`train` are ours. Given text and a plain `PPOConfig`, the numbers are TRL's (tests/test_ppo_parity.py). Left out here:
resuming, several models in one process, DeepSpeed ZeRO-3.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import GenerationConfig
from trl.experimental.ppo import PPOTrainer
from trl.experimental.utils import get_reward

from mmft.functional.policy import KLController
from mmft.functional.schedule import learning_rate_factor
from mmft.models.anchor import Anchor
from mmft.models.critic import ValueHead
from mmft.models.generation import decode, evaluating, prefixes_of
from mmft.models.policy import eos_ids, picture_token_ids
from mmft.models.prompts import Prompt, PromptBuilder, pad_prompts, prompts_of
from mmft.models.scoring import PolicyWithCritic
from mmft.train import rollout as rollouts
from mmft.train.experience import Experience, ExperienceSettings, Rollout, make_experience, ppo_loss
from mmft.train.metrics import TRL_NAMES, add_up, rollout_metrics
from mmft.train.ppo_config import VisionPPOConfig, setting
from mmft.types import RewardOutput, Row, UserError

RewardCallable = Callable[..., RewardOutput]


class CallableReward(nn.Module):
    """A reward function `(captions, rows, finished) -> RewardOutput` where TRL expects a module."""

    def __init__(self, function: RewardCallable):
        super().__init__()
        self.function = function


class VisionPPOTrainer(PPOTrainer):
    """TRL's `PPOTrainer` for models that see.

    Args beyond TRL's meaning:
        args: a `VisionPPOConfig`, or TRL's `PPOConfig` for TRL's behaviour.
        processing_class: a processor, or a tokenizer for text alone.
        reward_model: a callable `(captions, rows, finished) -> RewardOutput`, or TRL's sequence classifier.
        train_dataset: map-style; items are `mmft.types.Row`, or TRL's `input_ids` for text alone.
        value_model: None for a value head on the policy's own states, or TRL's second model (text alone).

    `on_rollout(step, rollout)`, if set, sees every batch before the update.
    """

    _tag_names: ClassVar = ["mmft", "trl", "ppo"]

    def __init__(
        self,
        args: Any,
        processing_class: Any,
        model: Any,
        ref_model: Any = None,
        reward_model: Any = None,
        train_dataset: Any = None,
        value_model: Any = None,
        data_collator: Any = None,
        **kwargs: Any,
    ):
        self.builder = PromptBuilder(processing_class)
        self.stops = self._stop_ids(args, model, processing_class)
        self.banned = picture_token_ids(model, processing_class)
        self.on_rollout: Callable[[int, Rollout], None] | None = None
        if value_model is None:
            value_model = ValueHead(model.get_output_embeddings().weight.shape[1])
        if data_collator is None and not _is_tokenized(train_dataset):
            data_collator = self.builder.collate
        if not isinstance(reward_model, nn.Module):
            reward_model = CallableReward(reward_model)
        # TRL's own handling would ask a processor for a tokenizer's eos_token_id.
        stop_token, args.stop_token = args.stop_token, None
        super().__init__(
            args,
            self.builder.tokenizer if data_collator is None else processing_class,
            model,
            ref_model,
            reward_model,
            train_dataset,
            value_model,
            data_collator=data_collator,
            **kwargs,
        )
        args.stop_token = stop_token
        self.policy_model.generation_config.eos_token_id = list(self.stops) or None
        self.kl = KLController(args.kl_coef, setting(args, "kl_target"), setting(args, "kl_horizon"))
        self.anchor = Anchor(self.policy_model, setting(args, "l2"), setting(args, "adapter_penalty"))
        self._set_up_data()

    def _stop_ids(self, args: Any, model: Any, processing_class: Any) -> tuple[int, ...]:
        if args.stop_token_id is not None:
            return (args.stop_token_id,)
        return eos_ids(model, processing_class) if args.stop_token == "eos" else ()

    def _set_up_data(self) -> None:
        """Groups of `samples_per_prompt` come from a loader of fewer rows; too small a data set would never fill a
        batch.
        """
        args, group = self.args, setting(self.args, "samples_per_prompt")
        rows = args.local_batch_size // group
        if len(self.train_dataset) < rows * args.world_size:
            raise UserError(f"the data has {len(self.train_dataset)} rows, fewer than the {rows} that one batch needs")
        if group > 1:
            loader = DataLoader(self.train_dataset, rows, shuffle=True, collate_fn=self.data_collator, drop_last=True)
            torch.manual_seed(args.seed)
            self.dataloader = self.accelerator.prepare(loader)
            torch.manual_seed(self.local_seed)

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        """TRL calls this when the policy is ready: the place to put our policy and critic in the place of its own
        wrapper.
        """
        args = self.args
        self.model = self._scorer(self.policy_model, self.value_model)
        self.model.config = self.policy_model.config
        if not isinstance(args, VisionPPOConfig) or self.optimizer is not None:
            super().create_optimizer_and_scheduler(num_training_steps)
            return
        critic = [p for p in self.value_model.parameters() if p.requires_grad]
        policy = [p for p in self.policy_model.parameters() if p.requires_grad]
        groups = [
            {"params": policy, "lr": args.learning_rate},
            {"params": critic, "lr": args.value_learning_rate or args.learning_rate},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon, weight_decay=args.weight_decay
        )
        self.lr_scheduler = LambdaLR(
            self.optimizer, lambda step: learning_rate_factor(args.schedule, step, num_training_steps, args.warmup)
        )

    # The loop: sample, score, learn, log.

    def train(self) -> None:
        self._begin()
        batches = self._batches()
        for step in range(1, self.args.num_total_batches + 1):
            started = time.perf_counter()
            orders = self._orders()
            rollout = self._rollout(next(batches), next(orders))
            rollout.potential_BT = self._potentials(rollout)
            if self.on_rollout is not None:
                self.on_rollout(step, rollout)
            experience = make_experience(rollout, self._experience_settings())
            stats = self._update(rollout, experience, orders)
            self._log_step(rollout, experience, stats, time.perf_counter() - started)
            kl = self.accelerator.reduce(experience.kl_BT.sum(1).mean(), "mean")
            self.kl.update(kl.item(), self.args.batch_size)
            self.lr_scheduler.step()
            self._end_step()
            if self.control.should_training_stop:
                break
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)

    def _rollout(self, batch: dict[str, Any], order: list[list[Tensor]]) -> Rollout:
        """Samples a response for each row and scores it; old log-probabilities come from the first epoch's own
        micro-batches.
        """
        args, pad_id = self.args, self.builder.pad_id
        group = setting(args, "samples_per_prompt")
        prompts = [p for p in prompts_of(batch) for _ in range(group)]
        rows = [row for row in batch.get("rows", []) for _ in range(group)]
        policy = self.accelerator.unwrap_model(self.model).policy
        first = self.state.global_step == 0
        size = args.local_rollout_forward_batch_size
        with evaluating(policy):
            responses, mask, finished, sampled = rollouts.sample(
                policy, prompts, self._generation_config(), self.stops, pad_id, size, first
            )
        micro = [index for minibatch in order for index in minibatch]
        scores = rollouts.score(self.model, prompts, responses, mask, micro, pad_id)
        if first and sampled is not None and setting(args, "top_p") == 1.0 and not setting(args, "top_k"):
            rollouts.check_sampling(sampled, scores.logprobs_BT, mask, policy.dtype)
        reference = self._reference_logprobs(prompts, responses, mask, micro)
        captions = decode(self.builder.tokenizer, responses, mask) if rows else []
        reward = self._reward(prompts, rows, responses, captions, finished)
        rollout = Rollout(
            prompts, rows, responses, mask, finished, scores.logprobs_BT, reference, scores.value_BT,
            reward if isinstance(reward, Tensor) else torch.tensor(reward.total, device=mask.device),
            captions, None if isinstance(reward, Tensor) else reward,
        )  # fmt: skip
        if first:
            self._centre_critic(rollout)
        return rollout

    def _centre_critic(self, rollout: Rollout) -> None:
        """A fresh value head starts at the mean score of the first batch; TRL's settings leave it where it is."""
        critic = self.accelerator.unwrap_model(self.model).value_model
        if isinstance(critic, ValueHead) and isinstance(self.args, VisionPPOConfig):
            mean = float(self.accelerator.reduce(rollout.scores_B.mean(), "mean"))
            critic.centre(mean)
            rollout.value_BT += mean

    def _update(
        self, rollout: Rollout, experience: Experience, orders: Iterator[list[list[Tensor]]]
    ) -> dict[str, float]:
        """`num_ppo_epochs` passes, an optimizer step a minibatch; stops early where the policy has moved past
        `target_kl`.
        """
        stats: dict[str, list[float]] = defaultdict(list)
        for minibatch in itertools.chain.from_iterable(itertools.islice(orders, self.args.num_ppo_epochs)):
            approx_kl = self._accumulate(rollout, experience, minibatch, stats)
            target = setting(self.args, "target_kl")
            if target is not None and approx_kl > target:
                self.optimizer.zero_grad()
                stats["update/stopped_early"] = [1.0]
                break
            self._step(stats)
        means = {name: float(np.mean(values)) for name, values in stats.items()}
        ratios = stats["policy/ratio_mean"]
        extra = {
            "policy/ratio_first": ratios[0],
            "policy/ratio_max": max(stats["policy/ratio_max"]),
            "ratio_var": _var(ratios),
        }
        return means | extra | {"update/minibatches": float(len(stats["policy/grad_norm"]))}

    def _accumulate(
        self, rollout: Rollout, experience: Experience, minibatch: list[Tensor], stats: dict[str, list[float]]
    ) -> float:
        """Gradients of one minibatch, micro-batch by micro-batch, equal to those of the minibatch in one piece."""
        args, pad_id = self.args, self.builder.pad_id
        tokens = sum(int(experience.mask_BT[index].sum()) for index in minibatch)
        value_tokens = sum(int(experience.value_mask_BT[index].sum()) for index in minibatch)
        totals: dict[str, float] = defaultdict(float)
        for i, index in enumerate(minibatch):
            last = i + 1 == len(minibatch)
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                scores = rollouts.forward(
                    self.model, rollout.prompts, rollout.responses_BT, rollout.mask_BT, index, pad_id
                )
                share = int(experience.mask_BT[index].sum()) / tokens
                value_share = int(experience.value_mask_BT[index].sum()) / value_tokens
                out = ppo_loss(
                    scores, experience, index, args.cliprange, args.cliprange_value, args.vf_coef,
                    setting(args, "entropy_coef"), share, value_share,
                )  # fmt: skip
                loss = out.loss
                if last:  # once a minibatch: the penalty depends on weights, not on rows
                    penalty = self.anchor.penalty()
                    loss = loss + penalty.loss.to(loss.device)
                    totals.update({name: float(value) for name, value in penalty.metrics.items()})
                # accelerate divides by the accumulation steps; shares have done that already
                self.accelerator.backward(loss * self.accelerator.gradient_accumulation_steps)
            add_up(totals, out.metrics, share, value_share)
            totals["loss/total"] += loss.item()
        if not np.isfinite(totals["loss/total"]):
            raise FloatingPointError(
                f"the loss is {totals['loss/total']} at step {self.state.global_step + 1}; no weight was changed"
            )
        for name, value in totals.items():
            stats[name].append(value)
        approx_kl = torch.tensor(totals["policy/approx_kl"], device=self.accelerator.device)
        return float(self.accelerator.reduce(approx_kl, "mean"))

    def _step(self, stats: dict[str, list[float]]) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        limit = self.args.max_grad_norm if setting(self.args, "clip_gradients") else float("inf")
        norm = float(self.accelerator.clip_grad_norm_(parameters, limit))
        if not np.isfinite(norm):
            raise FloatingPointError(
                f"the gradient is {norm} at step {self.state.global_step + 1}; no weight was changed"
            )
        stats["policy/grad_norm"].append(norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    # What the loop is made of.

    def _batches(self) -> Iterator[dict[str, Any]]:
        while True:
            yield from self.dataloader

    def _orders(self) -> Iterator[list[list[Tensor]]]:
        """Shuffled epochs without end: minibatches, each a list of micro-batches of row indices.

        The first order is given twice: to the scoring of old log-probabilities, then to the first epoch of the update.
        """
        args = self.args
        device = self.accelerator.device
        for epoch in itertools.count():
            order = torch.from_numpy(np.random.permutation(args.local_batch_size)).to(device)
            size = args.per_device_train_batch_size
            minibatches = [list(rows.split(size)) for rows in order.split(args.local_mini_batch_size)]
            if epoch == 0:
                yield minibatches
            yield minibatches

    def _generation_config(self) -> GenerationConfig:
        args = self.args
        return GenerationConfig(
            max_new_tokens=args.response_length,
            min_new_tokens=setting(args, "min_new_tokens") or None,
            temperature=args.temperature + 1e-7,
            top_k=setting(args, "top_k"),
            top_p=setting(args, "top_p"),
            repetition_penalty=1.0,  # what a checkpoint sets here would sample from another policy than the one trained
            do_sample=True,
            eos_token_id=list(self.stops) or None,
            pad_token_id=self.builder.pad_id,
            suppress_tokens=self.banned or None,
        )

    def _scorer(self, policy: Any, critic: nn.Module) -> PolicyWithCritic:
        args = self.args
        early = setting(args, "min_new_tokens")
        return PolicyWithCritic(policy, critic, self.banned, args.temperature + 1e-7, self.stops, early)

    def _reference_logprobs(
        self, prompts: list[Prompt], responses: Tensor, mask: Tensor, micro: list[Tensor]
    ) -> Tensor:
        """The reference policy's: the adapter switched off, or the second model where one was given."""
        if self.ref_model is None:
            with self.null_ref_context():
                return rollouts.score(
                    self.model, prompts, responses, mask, micro, self.builder.pad_id, values=False
                ).logprobs_BT
        reference = self._scorer(self.ref_model, nn.Identity()).to(responses.device)
        return rollouts.score(reference, prompts, responses, mask, micro, self.builder.pad_id, values=False).logprobs_BT

    def _reward(
        self, prompts: list[Prompt], rows: list[Row], responses: Tensor, captions: list[str], finished: Tensor
    ) -> RewardOutput | Tensor:
        if isinstance(self.reward_model, CallableReward):
            return self.reward_model.function(captions, rows, finished.tolist())
        pad_id = self.builder.pad_id
        queries = pad_prompts(prompts, pad_id, "left")["input_ids"].to(responses.device)
        with torch.no_grad():
            _, scores, _ = get_reward(self.reward_model, torch.cat([queries, responses], 1), pad_id, queries.shape[1])
        return scores.float()

    def _potentials(self, rollout: Rollout) -> Tensor | None:
        """Phi(s_t) of the caption before each token, where the reward is shaped."""
        function = getattr(self.reward_model, "function", None)
        if getattr(function, "shaping", None) is None or not rollout.rows:
            return None
        mask_BT = rollout.mask_BT
        prefixes = prefixes_of(self.builder.tokenizer, rollout.responses_BT, mask_BT)
        phi = function.potentials(prefixes, rollout.rows)
        return torch.tensor(phi, dtype=rollout.scores_B.dtype, device=mask_BT.device)

    def _experience_settings(self) -> ExperienceSettings:
        args = self.args
        shaping = getattr(getattr(self.reward_model, "function", None), "shaping", None)
        return ExperienceSettings(
            self.kl.coef, args.kl_estimator, args.gamma, args.lam, args.whiten_rewards,
            setting(args, "whiten_advantages"), args.missing_eos_penalty, setting(args, "eos_credit"),
            shaping.beta if shaping is not None else 0.0,
        )  # fmt: skip

    def _begin(self) -> None:
        args, state = self.args, self.state
        # Dropout is off anyway; in training mode frozen batch norms would learn, and rows depend on their batch. Only
        # recomputed activations need it.
        self.model.train(bool(getattr(self.policy_model, "is_activation_checkpointing", False)))
        state.global_step = state.episode = 0
        state.max_steps = args.num_total_batches
        state.num_train_epochs = args.total_episodes / self.train_dataset_len
        for name in ("logging_steps", "eval_steps", "save_steps"):
            value = getattr(args, name)
            if value is not None:
                setattr(state, name, max(1, int(np.ceil(state.max_steps * value))) if value < 1 else value)
        self.control = self.callback_handler.on_train_begin(args, state, self.control)

    def _end_step(self) -> None:
        self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)
        if self.control.should_save:
            self._save_checkpoint(self.model, trial=None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _log_step(self, rollout: Rollout, experience: Experience, stats: dict[str, float], seconds: float) -> None:
        args, device = self.args, rollout.mask_BT.device
        local = rollout_metrics(rollout, experience, args.missing_eos_penalty, args.gamma)
        local |= {TRL_NAMES.get(name, name): torch.tensor(value, device=device) for name, value in stats.items()}
        names = sorted(local)
        means = self.accelerator.reduce(torch.stack([local[name].float() for name in names]), "mean").tolist()
        self.state.episode += args.batch_size
        self.state.epoch = self.state.episode / self.train_dataset_len
        self.state.global_step += 1
        ends = self.stops or eos_ids(self.policy_model, self.builder.tokenizer)  # counted even where nothing stops
        eos = torch.isin(rollout.responses_BT, torch.tensor(ends, device=device)) & rollout.mask_BT
        self.log(
            dict(zip(names, means, strict=True))
            | {
                "kl/coef": self.kl.coef,
                "val/num_eos_tokens": int(eos.sum()),
                "lr": self.lr_scheduler.get_last_lr()[0],
                "episode": self.state.episode,
                "time/step": seconds,
            }
        )


def _var(values: list[float]) -> float:
    return float(np.var(values, ddof=1)) if len(values) > 1 else 0.0


def _is_tokenized(dataset: Any) -> bool:
    """Whether items are TRL's `input_ids` rather than rows."""
    return "input_ids" in (getattr(dataset, "column_names", None) or [])
