"""The update of PPO: which rows go through the model together, and what is done with their gradients."""

from __future__ import annotations

import itertools
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from mmft.models.packing import groups_of
from mmft.models.prompts import Prompt
from mmft.models.scoring import TokenScores
from mmft.train import rollout as rollouts
from mmft.train.experience import Experience, Rollout, ppo_loss
from mmft.train.metrics import add_up
from mmft.train.ppo_config import VisionPPOConfig, setting
from mmft.train.replay import NonFiniteUpdate, packed_batch

if TYPE_CHECKING:
    from mmft.train.ppo import VisionPPOTrainer

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass
class Scored:
    """Old log-probabilities and values of a batch; `live`: those of the first micro-batch with their graph, which the
    update's first pass would only compute again.
    """

    scores: TokenScores
    live: TokenScores | None = None


class Updater:
    """Runs a trainer's optimizer over a rollout. `micro_batch` rows go through the model at once; it is halved where
    memory runs out, and the gradients of a minibatch stay what they are.
    """

    def __init__(self, trainer: VisionPPOTrainer):
        self.trainer = trainer
        self.micro_batch: int = trainer.args.per_device_train_batch_size
        self.scored: Scored | None = None

    def micro_batches(self, order: list[Tensor], prompts: Sequence[Prompt], mask_BT: Tensor) -> list[list[Tensor]]:
        """Each minibatch cut into micro-batches, rows of one prompt and of like length beside each other.

        TRL's settings keep the order drawn. The sum over a minibatch does not depend on it.
        """
        if isinstance(self.trainer.args, VisionPPOConfig):
            lengths = mask_BT.sum(1).tolist()
            place = {i: g for g, group in enumerate(groups_of(prompts)) for i in group}
            if not self.trainer.interface.share_prompts:
                place = dict.fromkeys(place, 0)
            longest: dict[int, int] = defaultdict(int)
            for i, g in place.items():
                longest[g] = max(longest[g], len(prompts[i]) + lengths[i])

            def like(i: int) -> tuple[int, int, int, int]:
                return -longest[place[i]], place[i], -(len(prompts[i]) + lengths[i]), i

            order = [rows.new_tensor(sorted(rows.tolist(), key=like)) for rows in order]
        return [list(rows.split(self.micro_batch)) if len(rows) else [] for rows in order]

    def score(self, prompts: list[Prompt], responses_BT: Tensor, mask_BT: Tensor, order: list[Tensor]) -> Scored:
        """Scores of all rows before the update, in its first epoch's micro-batches."""
        trainer = self.trainer
        arguments = (trainer.model, trainer.interface, prompts, responses_BT, mask_BT)

        def attempt() -> Scored:
            minibatches = self.micro_batches(order, prompts, mask_BT)
            micro = list(itertools.chain.from_iterable(minibatches))
            # Of the first minibatch no row is here; or parts of weights are gathered for one pass and its backward.
            if not minibatches[0] or trainer.sharding:
                return Scored(rollouts.score(*arguments, micro, between=trainer.steps.between))
            first, *rest = micro
            scores = rollouts.score(*arguments, rest, between=trainer.steps.between)
            live = rollouts.forward(*arguments, first, entropy_grad=self._entropy_grad)
            rollouts.put(scores, first, live, mask_BT)
            return Scored(scores, live)

        self.scored = self.halving(attempt)
        return self.scored

    def score_by(
        self, model: Any, prompts: list[Prompt], responses_BT: Tensor, mask_BT: Tensor, order: list[Tensor]
    ) -> Tensor:
        """Log-probabilities under another policy, in the same micro-batches."""

        def attempt() -> Tensor:
            micro = list(itertools.chain.from_iterable(self.micro_batches(order, prompts, mask_BT)))
            interface = self.trainer.interface
            arguments = (model, interface, prompts, responses_BT, mask_BT, micro)
            return rollouts.score(*arguments, values=False, between=self.trainer.steps.between).logprobs_BT

        return self.halving(attempt)

    def halving(self, attempt: Callable[[], T]) -> T:
        """What `attempt` gives, with half as many rows at once where memory runs out, until it does not."""
        while True:
            try:
                return attempt()
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not _out_of_memory(error) or self.micro_batch == 1 or self.trainer.sharding.cut:
                    raise  # while weights lie in parts, all processes make the same passes
            self.trainer.engine.clear()
            if self.scored is not None:  # its graph takes memory, and its rows are no micro-batch any longer
                self.scored.live = None
            self.micro_batch = (self.micro_batch + 1) // 2
            logger.warning("out of memory: going on with %d rows at once; the gradients are the same", self.micro_batch)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    @property
    def _entropy_grad(self) -> bool:
        return bool(setting(self.trainer.args, "entropy_coef"))

    def update(
        self, rollout: Rollout, experience: Experience, orders: Iterator[list[Tensor]], scored: Scored
    ) -> dict[str, float]:
        """`num_ppo_epochs` passes, an optimizer step a minibatch; stops early where the policy has moved past
        `target_kl`. `rollout` is this process's, `experience` that of the global batch, whose rows `orders` name.
        """
        args = self.trainer.args
        stats: dict[str, list[float]] = defaultdict(list)
        epochs = itertools.islice(orders, args.num_ppo_epochs)
        for order in itertools.chain.from_iterable(epochs):
            try:
                approx_kl = self._gradients(rollout, experience, order, stats, scored)
                target = setting(args, "target_kl")
                if target is not None and approx_kl > target:
                    self.trainer.engine.clear()
                    stats["update/stopped_early"] = [1.0]
                    break
                self._step(stats)
            except NonFiniteUpdate as error:
                raise self._kept(rollout, experience, order, str(error)) from None
        means = {name: float(np.mean(values)) for name, values in stats.items()}
        ratios = stats["policy/ratio_mean"]
        extra = {
            "policy/ratio_first": ratios[0],
            "policy/ratio_max": max(stats["policy/ratio_max"]),
            "ratio_var": float(np.var(ratios, ddof=1)) if len(ratios) > 1 else 0.0,
        }
        return means | extra | {"update/minibatches": float(len(stats["policy/grad_norm"]))}

    def _kept(self, rollout: Rollout, experience: Experience, order: Tensor, reason: str) -> NonFiniteUpdate:
        """The error to raise, once the batch is where it can be replayed from."""
        trainer = self.trainer
        trainer.engine.clear()
        reason = f"{reason} at step {trainer.state.global_step + 1}; no weight was changed"
        rows = trainer.ranks.own(order)
        mine = experience.part(trainer.ranks.rows, rollout.mask_BT.shape[1])
        if trainer.keep_batch is not None:
            path = trainer.keep_batch(packed_batch(trainer, rollout, mine, rows, reason))
            reason += f". The batch is kept: mmft replay {path}"
        return NonFiniteUpdate(reason)

    def _gradients(
        self, rollout: Rollout, experience: Experience, rows: Tensor, stats: dict[str, list[float]], scored: Scored
    ) -> float:
        """Gradients of one minibatch; what was computed beforehand serves the first attempt."""

        return self.halving(lambda: self._accumulate(rollout, experience, rows, stats, scored))

    def _accumulate(
        self, rollout: Rollout, experience: Experience, rows: Tensor, stats: dict[str, list[float]], scored: Scored
    ) -> float:
        """Gradients of one minibatch, micro-batch by micro-batch, equal to those of the minibatch in one piece."""
        trainer, args = self.trainer, self.trainer.args
        tokens = max(1, int(experience.mask_BT[rows].sum()))
        value_tokens = max(1, int(experience.value_mask_BT[rows].sum()))
        mine = experience.part(trainer.ranks.rows, rollout.mask_BT.shape[1])
        (minibatch,) = self.micro_batches([trainer.ranks.own(rows)], rollout.prompts, rollout.mask_BT)
        here, passes = len(minibatch), max(1, len(minibatch))
        if trainer.sharding:  # a pass gathers weights from all processes, so all make equally many
            passes = int(trainer.ranks.total(torch.tensor(passes), "max"))
        minibatch += [rows.new_zeros(1)] * (passes - here)  # rows that go along and count nothing
        scale = trainer.ranks.count if trainer.engine.averages else 1
        totals: dict[str, float] = defaultdict(float)
        for i, index in enumerate(minibatch):
            trainer.steps.between()
            scores, scored.live = scored.live, None  # nobody else may hold a graph that does not fit
            if scores is None:
                scores = rollouts.forward(
                    trainer.model, trainer.interface, rollout.prompts, rollout.responses_BT, rollout.mask_BT, index,
                    entropy_grad=self._entropy_grad,
                )  # fmt: skip
            share = (i < here) * int(mine.mask_BT[index].sum()) / tokens
            value_share = (i < here) * int(mine.value_mask_BT[index].sum()) / value_tokens
            out = ppo_loss(
                scores, mine, index, args.cliprange, args.cliprange_value, args.vf_coef,
                setting(args, "entropy_coef"), share, value_share,
            )  # fmt: skip
            loss = out.loss * scale
            if i + 1 == len(minibatch):  # once a minibatch: the penalty depends on weights, not on rows
                penalty = trainer.anchor.penalty()
                loss = loss + penalty.loss.to(loss.device) * scale / trainer.ranks.count
                for name, value in penalty.metrics.items():
                    totals[name] = float(value) / trainer.ranks.count
            trainer.engine.backward(loss)
            add_up(totals, out.metrics if i < here else dict.fromkeys(out.metrics, 0.0), share, value_share)
            totals["loss/total"] += loss.item() / scale
        self._over_processes(totals)
        if not np.isfinite(totals["loss/total"]):
            raise NonFiniteUpdate(f"the loss is {totals['loss/total']}")
        for name, value in totals.items():
            stats[name].append(value)
        return totals["policy/approx_kl"]

    def _over_processes(self, totals: dict[str, float]) -> None:
        """Each process's part of the metrics added up, or their largest."""
        ranks = self.trainer.ranks
        if ranks.count == 1:
            return
        for how, names in (
            ("sum", sorted(name for name in totals if not name.endswith("_max"))),
            ("max", sorted(name for name in totals if name.endswith("_max"))),
        ):
            values = ranks.total(torch.tensor([totals[name] for name in names], dtype=torch.float64), how)
            totals.update(zip(names, values.tolist(), strict=True))

    def _step(self, stats: dict[str, list[float]]) -> None:
        args = self.trainer.args
        norm = self.trainer.engine.clip(args.max_grad_norm if setting(args, "clip_gradients") else float("inf"))
        if not np.isfinite(norm):
            raise NonFiniteUpdate(f"the gradient is {norm}")
        stats["policy/grad_norm"].append(norm)
        self.trainer.engine.step()


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
