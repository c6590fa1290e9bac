"""Captions of held-out pictures: before and after training, and on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import TrainerCallback

from mmft.config import Recipe
from mmft.eval.evaluator import evaluate_captions
from mmft.models.generation import caption
from mmft.models.policy import Policy
from mmft.report.folder import RunFolder
from mmft.rewards.combine import RewardFunction
from mmft.train.ppo import VisionPPOTrainer
from mmft.types import Row


def caption_rows(
    policy: Policy, rows: Sequence[Row], recipe: Recipe, trainer: VisionPPOTrainer | None = None
) -> tuple[list[str], list[bool]]:
    """Greedy captions of rows, and which ended by themselves. With a trainer, in its way of feeding the model, and its
    processes share the work: all take part, and all know all.
    """
    limit, batch = recipe.generation.max_new_tokens, recipe.eval.batch
    if trainer is None:
        return caption(policy, rows, limit, batch)
    ranks = trainer.ranks
    mine = rows[len(rows) * ranks.index // ranks.count : len(rows) * (ranks.index + 1) // ranks.count]
    with trainer.sharding.whole():
        captions, ended = caption(policy, mine, limit, batch, trainer.interface)
    return ranks.gather_list(captions), ranks.gather_list(ended)


class PeriodicEvaluation(TrainerCallback):
    """Every `eval.every` steps: the means of the held-out metrics, as eval/* in metrics.jsonl."""

    def __init__(
        self,
        run: RunFolder,
        policy: Policy,
        rows: Sequence[Row],
        recipe: Recipe,
        reward: RewardFunction,
        trainer: VisionPPOTrainer,
    ):
        self.run, self.policy, self.rows, self.recipe = run, policy, rows, recipe
        self.reward, self.trainer = reward, trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.recipe.eval.every:
            return
        captions, ended = caption_rows(self.policy, self.rows, self.recipe, self.trainer)
        if self.trainer.ranks.is_main:
            scores = evaluate_captions(captions, self.rows, self.reward, ended)
            means = {f"eval/{name}": np.nanmean(v) for name, v in scores.items() if not np.isnan(v).all()}
            self.run.log(state.global_step, means)
