"""Captions of held-out pictures: before and after training, and on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import TrainerCallback

from mmft.config import Recipe
from mmft.eval.evaluator import evaluate_captions
from mmft.models.generation import caption
from mmft.models.interface import Interface
from mmft.models.policy import Policy
from mmft.report.folder import RunFolder
from mmft.rewards.combine import RewardFunction
from mmft.train.ranks import Ranks
from mmft.types import Row


def caption_rows(
    policy: Policy,
    rows: Sequence[Row],
    recipe: Recipe,
    interface: Interface | None = None,
    ranks: Ranks | None = None,
) -> tuple[list[str], list[bool]]:
    """Greedy captions of rows, and which ended by themselves; several processes share the work, and all know all."""
    count, index = (1, 0) if ranks is None else (ranks.count, ranks.index)
    mine = rows[len(rows) * index // count : len(rows) * (index + 1) // count]
    captions, ended = caption(policy, mine, recipe.generation.max_new_tokens, recipe.eval.batch, interface)
    return (captions, ended) if ranks is None else (ranks.gather_list(captions), ranks.gather_list(ended))


class PeriodicEvaluation(TrainerCallback):
    """Every `eval.every` steps: the means of the held-out metrics, as eval/* in metrics.jsonl."""

    def __init__(
        self,
        run: RunFolder,
        policy: Policy,
        rows: Sequence[Row],
        recipe: Recipe,
        reward: RewardFunction,
        interface: Interface,
        ranks: Ranks,
    ):
        self.run, self.policy, self.rows, self.recipe = run, policy, rows, recipe
        self.reward, self.interface, self.ranks = reward, interface, ranks

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.recipe.eval.every:
            return
        captions, ended = caption_rows(self.policy, self.rows, self.recipe, self.interface, self.ranks)
        if self.ranks.is_main:
            scores = evaluate_captions(captions, self.rows, self.reward, ended)
            self.run.log(state.global_step, {f"eval/{name}": np.nanmean(values) for name, values in scores.items()})
