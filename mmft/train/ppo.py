"""PPO for vision-language models: TRL's `PPOTrainer` with pictures, LoRA, a shared-trunk critic and an L2 anchor.

TRL gives the constructor, accelerator, optimizer, callbacks, saving and hub plumbing; rollout, scoring, update and
`train` are ours. Given text and a plain `PPOConfig`, the numbers are TRL's (tests/test_ppo_parity.py). Left out here:
resuming, several models in one process, DeepSpeed ZeRO-3.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from trl.experimental.ppo import PPOTrainer
from trl.experimental.utils import get_reward

from mmft.functional.policy import KLController
from mmft.functional.schedule import learning_rate_factor
from mmft.models.anchor import Anchor
from mmft.models.critic import ValueHead
from mmft.models.decoding import Sampling, sample_responses
from mmft.models.generation import decode, ended, prefixes_of
from mmft.models.interface import Interface, evaluating
from mmft.models.policy import eos_ids, picture_token_ids
from mmft.models.prompts import Prompt, PromptBuilder, pad_prompts, prompts_of
from mmft.models.scoring import PolicyWithCritic
from mmft.models.selfcheck import check
from mmft.models.value_adapter import adapters_off, add_value_adapter, critic_parameters
from mmft.train import rollout as rollouts
from mmft.train.experience import Experience, ExperienceSettings, Rollout, make_experience
from mmft.train.metrics import TRL_NAMES, PhaseTimer, rollout_metrics
from mmft.train.ppo_config import VisionPPOConfig, setting
from mmft.train.update import Scored, Updater
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
        shares = setting(args, "share_prompts") and (value_model is None or isinstance(value_model, ValueHead))
        budget = int(setting(args, "feature_cache_gb") * 2**30)
        self.interface = Interface(model, self.builder, setting(args, "encode_once"), budget, shares)
        if value_model is None:
            value_model = ValueHead(self.interface.hidden_size)
        if setting(args, "critic") == "adapter":
            add_value_adapter(model)
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
        self.updater = Updater(self)
        self.timer = PhaseTimer(self.accelerator.device)
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
        adapter = critic_parameters(self.policy_model)
        critic = [p for p in self.value_model.parameters() if p.requires_grad] + adapter
        own = {id(p) for p in adapter}
        policy = [p for p in self.policy_model.parameters() if p.requires_grad and id(p) not in own]
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
            self.timer.start()
            orders = self._orders()
            rollout, scored = self._rollout(next(batches), next(orders))
            rollout.potential_BT = self._potentials(rollout)
            if self.on_rollout is not None:
                self.on_rollout(step, rollout)
            experience = make_experience(rollout, self._experience_settings())
            with self.timer("update"):
                stats = self.updater.update(rollout, experience, orders, scored)
            self._log_step(rollout, experience, stats)
            kl = self.accelerator.reduce(experience.kl_BT.sum(1).mean(), "mean")
            self.kl.update(kl.item(), self.args.batch_size)
            self.lr_scheduler.step()
            self._end_step()
            if self.control.should_training_stop:
                break
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)

    def _rollout(self, batch: dict[str, Any], order: list[Tensor]) -> tuple[Rollout, Scored]:
        """Samples a response for each row and scores it; old log-probabilities come from the first epoch's own
        micro-batches, of which the first keeps its graph for the update.
        """
        args = self.args
        group = setting(args, "samples_per_prompt")
        prompts = [p for p in prompts_of(batch) for _ in range(group)]
        rows = [row for row in batch.get("rows", []) for _ in range(group)]
        policy = self.accelerator.unwrap_model(self.model).policy
        with self.timer("sample"), evaluating(policy):
            check(self.interface, prompts)
            responses, mask, sampled = sample_responses(
                self.interface, prompts, self._sampling(), args.local_rollout_forward_batch_size
            )
            finished = ended(responses, mask, self.stops)
        with self.timer("score"):
            scored = self.updater.score(prompts, responses, mask, order)
        if self.state.global_step == 0 and setting(args, "top_p") == 1.0 and not setting(args, "top_k"):
            rollouts.check_sampling(sampled, scored.scores.logprobs_BT, mask, policy.dtype)
        with self.timer("reference"):
            reference = self._reference_logprobs(prompts, responses, mask, order)
        captions = decode(self.builder.tokenizer, responses, mask) if rows else []
        with self.timer("reward"):
            reward = self._reward(prompts, rows, responses, captions, finished)
        scores = scored.scores
        rollout = Rollout(
            prompts, rows, responses, mask, finished, scores.logprobs_BT, reference, scores.value_BT,
            reward if isinstance(reward, Tensor) else torch.tensor(reward.total, device=mask.device),
            captions, None if isinstance(reward, Tensor) else reward,
        )  # fmt: skip
        if self.state.global_step == 0:
            self._centre_critic(rollout, scored)
        return rollout, scored

    def _centre_critic(self, rollout: Rollout, scored: Scored) -> None:
        """A fresh value head starts at the mean score of the first batch; TRL's settings leave it where it is."""
        critic = self.accelerator.unwrap_model(self.model).value_model
        if isinstance(critic, ValueHead) and isinstance(self.args, VisionPPOConfig):
            mean = float(self.accelerator.reduce(rollout.scores_B.mean(), "mean"))
            critic.centre(mean)
            rollout.value_BT += mean
            if scored.live is not None and scored.live.value_BT is not None:
                scored.live = dataclasses.replace(scored.live, value_BT=scored.live.value_BT + mean)

    # What the loop is made of.

    def _batches(self) -> Iterator[dict[str, Any]]:
        while True:
            yield from self.dataloader

    def _orders(self) -> Iterator[list[Tensor]]:
        """Shuffled epochs without end: minibatches of row indices.

        The first order is given twice: to the scoring of old log-probabilities, then to the first epoch of the update.
        """
        args = self.args
        for epoch in itertools.count():
            order = torch.from_numpy(self._permutation()).to(self.accelerator.device)
            minibatches = list(order.split(args.local_mini_batch_size))
            if epoch == 0:
                yield minibatches
            yield minibatches

    def _permutation(self) -> np.ndarray:
        """Rows shuffled; where responses share their prompt's pass, prompts are, and a prompt's rows stay together."""
        args, group = self.args, setting(self.args, "samples_per_prompt")
        if group == 1 or not self.interface.share_prompts:
            return np.random.permutation(args.local_batch_size)
        prompts = np.random.permutation(args.local_batch_size // group)
        return (prompts[:, None] * group + np.arange(group)).reshape(-1)

    def _sampling(self) -> Sampling:
        args = self.args
        return Sampling(
            args.response_length, args.temperature + 1e-7, setting(args, "top_k"), setting(args, "top_p"),
            setting(args, "min_new_tokens"), stops=tuple(self.stops), banned=tuple(self.banned),
            as_transformers=not isinstance(args, VisionPPOConfig),
        )  # fmt: skip

    def _scorer(self, policy: Any, critic: nn.Module) -> PolicyWithCritic:
        args = self.args
        early = setting(args, "min_new_tokens")
        own_pass = isinstance(critic, ValueHead) and setting(args, "critic") == "adapter"
        return PolicyWithCritic(policy, critic, self.banned, args.temperature + 1e-7, self.stops, early, own_pass)

    def _reference_logprobs(
        self, prompts: list[Prompt], responses: Tensor, mask: Tensor, order: list[Tensor]
    ) -> Tensor | None:
        """The reference policy's: the adapter switched off, or the second model where one was given. None where
        nothing asks for a KL.
        """
        if isinstance(self.args, VisionPPOConfig) and self.kl.coef == 0 and self.kl.target is None:
            return None
        if self.ref_model is None:
            with adapters_off(self.model):
                return self.updater.score_by(self.model, prompts, responses, mask, order)
        reference = self._scorer(self.ref_model, nn.Identity()).to(responses.device)
        return self.updater.score_by(reference, prompts, responses, mask, order)

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

    def _log_step(self, rollout: Rollout, experience: Experience, stats: dict[str, float]) -> None:
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
            }
            | self.timer.stop()
            | {"time/encode": self.interface.features.take_seconds()}
        )


def _is_tokenized(dataset: Any) -> bool:
    """Whether items are TRL's `input_ids` rather than rows."""
    return "input_ids" in (getattr(dataset, "column_names", None) or [])
