"""PPO for vision-language models: TRL's `PPOTrainer` with pictures, LoRA, a shared-trunk critic and an L2 anchor.

TRL gives the constructor, accelerator, optimizer, callbacks, saving and hub plumbing; rollout, scoring, update and
`train` are ours. Given text and a plain `PPOConfig`, the numbers are TRL's (tests/test_ppo_parity.py); given a
`VisionPPOConfig`, a run can be resumed to the bit, and its numbers do not depend on the number of processes.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from trl.experimental.ppo import PPOTrainer
from trl.experimental.utils import get_reward

from mmft.data.cursor import Shuffled
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
from mmft.models.selfcheck import check, most_cautious
from mmft.models.structure import context_length
from mmft.models.value_adapter import adapters_off, add_value_adapter, critic_parameters
from mmft.train import rollout as rollouts
from mmft.train.batches import NoRows, open_batches
from mmft.train.engine import Engine
from mmft.train.experience import Experience, ExperienceSettings, Rollout, make_experience
from mmft.train.metrics import TRL_NAMES, PhaseTimer, rollout_metrics
from mmft.train.ppo_config import VisionPPOConfig, setting
from mmft.train.randomness import Randomness
from mmft.train.ranks import Ranks
from mmft.train.sharding import allow_on_cpu
from mmft.train.undo import WholeSteps
from mmft.train.update import Scored, Updater
from mmft.train.zero import ZeroEngine, take_settings
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
        train_dataset: map-style, or a `mmft.data.cursor.RowCursor`; items are `mmft.types.Row`, or TRL's `input_ids`
            for text alone.
        value_model: None for a value head on the policy's own states, or TRL's second model (text alone).

    `on_rollout(step, rollout)`, if set, sees every batch of all processes before the update. `steps.signals`, if
    set, are looked at between micro-batches. `keep_batch`, if set, gets the batch of an update that is not finite.
    `mmft.train.trainer_state` carries a run over to another process.
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
        self.keep_batch: Callable[[bytes], Path] | None = None
        self.recipe_text: str | None = None  # goes with a kept batch
        self.loaded = False  # whether `train` goes on behind a step instead of beginning
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
        cursor = None
        if isinstance(args, VisionPPOConfig):
            ready = hasattr(train_dataset, "draw")
            cursor = train_dataset if ready else Shuffled(train_dataset, args.seed)
            train_dataset = NoRows() if ready else train_dataset
        # TRL would ask a processor for a tokenizer's eos_token_id, and whiten within one process's minibatch.
        stop_token, args.stop_token = args.stop_token, None
        whiten, args.whiten_rewards = args.whiten_rewards, False
        deepspeed = take_settings()
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
        args.stop_token, args.whiten_rewards = stop_token, whiten
        self.ranks = Ranks(self.accelerator, args.local_batch_size)
        self.steps = WholeSteps(self)
        self._take_model_back()
        self.engine = ZeroEngine(self, deepspeed) if deepspeed else Engine(self)
        self.sharding = self.engine.sharding
        self.randomness = Randomness(args.seed)
        self.policy_model.generation_config.eos_token_id = list(self.stops) or None
        self.kl = KLController(args.kl_coef, setting(args, "kl_target"), setting(args, "kl_horizon"))
        self.anchor = Anchor(self.policy_model, setting(args, "l2"), setting(args, "adapter_penalty"))
        self.interface.features.around = self.sharding.whole
        self.updater = Updater(self)
        self.timer = PhaseTimer(self.accelerator.device)
        self.batches = open_batches(args, cursor, self.ranks, self.dataloader, self.data_collator)

    def _stop_ids(self, args: Any, model: Any, processing_class: Any) -> tuple[int, ...]:
        if args.stop_token_id is not None:
            return (args.stop_token_id,)
        return eos_ids(model, processing_class) if args.stop_token == "eos" else ()

    def _leave_model_unwrapped(self) -> None:
        """TRL's constructor would wrap the model in DDP, which waits for gradients that a process may not have: those
        of the tower where its rows hold no picture. `Ranks` adds gradients up instead.
        """
        self._module = self.model
        allow_on_cpu(self.accelerator)
        if self.accelerator.distributed_type in (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
            self.model = SimpleNamespace(config=self.policy_model.config)

    def _take_model_back(self) -> None:
        if isinstance(self.model, SimpleNamespace):
            self.model = self.callback_handler.model = self._module.to(self.accelerator.device)

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        """TRL calls this when the policy is ready: the place to put our policy and critic in the place of its own
        wrapper.
        """
        args = self.args
        self.model = self._scorer(self.policy_model, self.value_model)
        self.model.config = self.policy_model.config
        if not isinstance(args, VisionPPOConfig) or self.optimizer is not None:
            super().create_optimizer_and_scheduler(num_training_steps)
            self._leave_model_unwrapped()
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
        self._leave_model_unwrapped()

    # The loop: sample, score, learn, log.

    def train(self) -> None:
        """Raises Stopped where `steps.signals` have come: everything is then as after the last whole step."""
        self._begin()
        try:
            for step in range(self.state.global_step + 1, self.args.num_total_batches + 1):
                self.steps.run(partial(self._step, step))
                if self.control.should_training_stop:
                    break
                self.steps.leave_if_asked()
        finally:
            self.batches.close()
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)

    def _step(self, step: int) -> None:
        self.timer.start()
        orders = self._orders(step)
        if self.sharding:  # what a process has forgotten it could not encode alone: the batch's pictures stay
            self.interface.features.clear()
            self.interface.features.budget = sys.maxsize
        with self.sharding.whole():
            local, scored = self._rollout(step, self.batches.next(), next(orders))
        local.potential_BT = self._potentials(local)
        rollout = self.ranks.everyone(local)
        if step == 1:
            self._centre_critic(rollout, local, scored)
        if self.on_rollout is not None:
            self.on_rollout(step, rollout)
        experience = make_experience(rollout, self._experience_settings())
        self.steps.weights_will_change()
        with self.timer("update"):
            stats = self.updater.update(local, experience, orders, scored)
        self._log_step(rollout, experience, stats)
        self.kl.update(float(experience.kl_BT.sum(1).mean()), self.args.batch_size)
        self.lr_scheduler.step()
        self._end_step()

    def _rollout(self, step: int, batch: dict[str, Any], order: list[Tensor]) -> tuple[Rollout, Scored]:
        """Samples a response for each row and scores it; old log-probabilities come from the first epoch's own
        micro-batches, of which the first keeps its graph for the update.
        """
        args, group = self.args, setting(self.args, "samples_per_prompt")
        prompts = [p for p in prompts_of(batch) for _ in range(group)]
        rows = [row for row in batch.get("rows", []) for _ in range(group)]
        policy = self.accelerator.unwrap_model(self.model).policy
        order = [self.ranks.own(rows) for rows in order]
        with self.timer("sample"), evaluating(policy):
            self._check(prompts)
            responses, mask, sampled = sample_responses(
                self.interface, prompts, self._sampling(), args.local_rollout_forward_batch_size, self._points(step),
                self.steps.between,
            )  # fmt: skip
            finished = ended(responses, mask, self.stops)
        with self.timer("score"):
            scored = self.updater.score(prompts, responses, mask, order)
        if step == 1 and setting(args, "top_p") == 1.0 and not setting(args, "top_k"):
            rollouts.check_sampling(sampled, scored.scores.logprobs_BT, mask, policy.dtype)
        with self.timer("reference"):
            reference = self._reference_logprobs(prompts, responses, mask, order)
        captions = decode(self.builder.tokenizer, responses, mask) if rows else []
        with self.timer("reward"):
            reward = self._reward(prompts, rows, responses, captions, finished)
        scores = scored.scores
        if not torch.isfinite(reward if isinstance(reward, Tensor) else torch.tensor(reward.total)).all():
            raise FloatingPointError(f"the reward of a response is not finite at step {step}; no weight was changed")
        rollout = Rollout(
            prompts, rows, responses, mask, finished, scores.logprobs_BT, reference, scores.value_BT,
            reward if isinstance(reward, Tensor) else torch.tensor(reward.total, device=mask.device),
            captions, None if isinstance(reward, Tensor) else reward,
        )  # fmt: skip
        return rollout, scored

    def _check(self, prompts: list[Prompt]) -> None:
        """The start-up check, each process on its own prompts; all go on the way that holds for each. Raises UserError
        for a prompt that leaves no room for its response.
        """
        room, longest = context_length(self.interface.base), max(map(len, prompts))
        if room is not None and longest + self.args.response_length > room:
            raise UserError(
                f"a prompt of {longest} tokens and a response of {self.args.response_length} do not fit the model's "
                f"{room}; shorten questions, data.prompt or generation.max_new_tokens"
            )
        seen = dict(self.interface.kinds)
        check(self.interface, prompts)
        if self.ranks.any(self.interface.kinds.keys() != seen.keys()):
            states = self.ranks.gather_list([self.interface.state_dict()])
            together = most_cautious(states)
            if any(state != together for state in states):
                self.interface.load_state_dict(together)

    def _points(self, step: int) -> Tensor | None:
        if not isinstance(self.args, VisionPPOConfig):
            return None
        return self.randomness.points(step, self.args.batch_size, self.args.response_length)[self.ranks.rows]

    def _centre_critic(self, rollout: Rollout, local: Rollout, scored: Scored) -> None:
        """A fresh value head starts at the mean score of the first batch; TRL's settings leave it where it is."""
        critic = self.accelerator.unwrap_model(self.model).value_model
        if isinstance(critic, ValueHead) and isinstance(self.args, VisionPPOConfig):
            mean = float(rollout.scores_B[rollout.kept_B].mean())
            critic.centre(mean)
            for values in {id(r): r.value_BT for r in (rollout, local)}.values():
                values += mean
            self.engine.weights_changed()
            if scored.live is not None and scored.live.value_BT is not None:
                scored.live = dataclasses.replace(scored.live, value_BT=scored.live.value_BT + mean)

    # What the loop is made of.

    def _orders(self, step: int) -> Iterator[list[Tensor]]:
        """Shuffled epochs without end: minibatches of indices of the global batch's rows.

        The first order is given twice: to the scoring of old log-probabilities, then to the first epoch of the update.
        """
        for epoch in itertools.count():
            minibatches = self._order(step, epoch)
            if epoch == 0:
                yield minibatches
            yield minibatches

    def _order(self, step: int, epoch: int) -> list[Tensor]:
        """Where responses share their prompt's pass, prompts are shuffled, and a prompt's rows stay together."""
        args, device = self.args, self.accelerator.device
        if not isinstance(args, VisionPPOConfig):
            rows = torch.from_numpy(np.random.permutation(args.local_batch_size)).to(device)
            return list((rows + self.ranks.rows.start).split(args.local_mini_batch_size))
        together = args.samples_per_prompt if self.interface.share_prompts else 1
        order = self.randomness.order(step, epoch, args.batch_size, args.num_mini_batches, together)
        return [rows.to(device) for rows in order]

    def _sampling(self) -> Sampling:
        args = self.args
        return Sampling(
            args.response_length, args.temperature + 1e-7, setting(args, "top_k"), setting(args, "top_p"),
            setting(args, "min_new_tokens"), stops=tuple(self.stops), banned=tuple(self.banned),
            as_transformers=not isinstance(args, VisionPPOConfig),
        )  # fmt: skip

    def _scorer(self, policy: Any, critic: nn.Module) -> PolicyWithCritic:
        args = self.args
        own_pass = isinstance(critic, ValueHead) and setting(args, "critic") == "adapter"
        early, temperature = setting(args, "min_new_tokens"), args.temperature + 1e-7
        return PolicyWithCritic(policy, critic, self.banned, temperature, self.stops, early, own_pass)

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
            self.steps.between()
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
        if not self.loaded:
            state.global_step = state.episode = 0
        self.loaded = False
        state.max_steps, state.num_train_epochs = args.num_total_batches, args.total_episodes / self.train_dataset_len
        for name in ("logging_steps", "eval_steps", "save_steps"):
            if (value := getattr(args, name)) is not None:
                setattr(state, name, max(1, int(np.ceil(state.max_steps * value))) if value < 1 else value)
        self.control = self.callback_handler.on_train_begin(args, state, self.control)

    def _end_step(self) -> None:
        self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)
        if self.control.should_save:
            self._save_checkpoint(self.model, trial=None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _log_step(self, rollout: Rollout, experience: Experience, stats: dict[str, float]) -> None:
        args, device = self.args, rollout.mask_BT.device
        metrics = rollout_metrics(rollout, experience, args.missing_eos_penalty, args.gamma)
        metrics |= {TRL_NAMES.get(name, name): torch.tensor(value, device=device) for name, value in stats.items()}
        names = sorted(metrics)
        means = torch.stack([metrics[name].float() for name in names]).tolist()
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
