"""What a step logs. Names that TRL's PPO also logs mean what they mean there; docs/metrics.md explains each."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmft.functional.masked import masked_mean
from mmft.functional.returns import discounted_return
from mmft.functional.value import explained_variance
from mmft.train.experience import Experience, Rollout, penalised_scores

# What the update measures, under the names of TRL's PPO where TRL has one.
TRL_NAMES = {
    "policy/approx_kl": "policy/approxkl_avg",
    "policy/clip_fraction": "policy/clipfrac_avg",
    "loss/policy": "loss/policy_avg",
    "loss/value": "loss/value_avg",
    "value/clip_fraction": "val/clipfrac_avg",
    "policy/entropy": "policy/entropy_avg",
    "policy/ratio_mean": "val/ratio",
    "ratio_var": "val/ratio_var",
}


def rollout_metrics(
    rollout: Rollout, experience: Experience, missing_eos_penalty: float | None, gamma: float
) -> dict[str, Tensor]:
    """Means over the responses of all processes, name -> 0-d tensor; those without a reward are left out."""
    kept_B = rollout.kept_B
    mask_BT = rollout.mask_BT[kept_B]
    scores = penalised_scores(rollout.scores_B, rollout.finished_B, missing_eos_penalty)[kept_B].mean()
    non_score = experience.non_score_reward_BT[kept_B].sum(1).mean()
    returns_B = discounted_return(experience.reward_BT, experience.value_mask_BT, gamma)
    metrics = {
        "objective/entropy": (-rollout.logprobs_BT[kept_B] * mask_BT).sum(1).mean(),
        "objective/non_score_reward": non_score,
        "objective/rlhf_reward": non_score + scores,
        "objective/scores": scores,
        "objective/return": returns_B[kept_B].mean(),
        "value/mean": masked_mean(rollout.value_BT[kept_B], mask_BT),
        "value/td_loss": experience.td_loss,
        "value/explained_variance": explained_variance(
            experience.value_BT, experience.return_BT, experience.value_mask_BT
        ),
        "response/tokens": mask_BT.sum(1).float().mean(),
        "response/finished": rollout.finished_B[kept_B].float().mean(),
    }
    if rollout.ref_logprobs_BT is not None:
        metrics["objective/kl"] = experience.kl_BT[kept_B].sum(1).mean()
    metrics |= {name: torch.tensor(value, device=mask_BT.device) for name, value in rollout.watched.items()}
    if rollout.reward is not None:
        for kind in ("raw", "normalized", "weighted"):
            for term, values in getattr(rollout.reward, kind).items():
                metrics[f"reward/{kind}/{term}"] = torch.tensor(values, device=mask_BT.device)[kept_B].mean()
        if not bool(kept_B.all()):
            metrics["reward/dropped"] = (~kept_B).float().sum()
    return metrics


def add_up(totals: dict[str, float], metrics: Mapping[str, Any], share: float, value_share: float) -> None:
    """Adds a micro-batch's metrics to its minibatch's: means by their share of the tokens, maxima as maxima."""
    for name, value in metrics.items():
        if name.endswith("_max"):
            totals[name] = float(np.maximum(totals[name], float(value)))  # NaN stays
        else:
            weight = value_share if name.startswith(("value/", "loss/value")) else share
            totals[name] += weight * float(value)


class PhaseTimer:
    """Seconds that the parts of a step take, as `time/*`."""

    def __init__(self, device: torch.device):
        self.device = device
        self.start()

    def start(self) -> None:
        self._spent: dict[str, float] = defaultdict(float)
        self._began = self._now()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began = self._now()
        try:
            yield
        finally:
            self._spent[phase] += self._now() - began

    def stop(self) -> dict[str, float]:
        """`time/step` since `start`, and `time/PHASE` of each phase within."""
        return {"time/step": self._now() - self._began} | {f"time/{k}": v for k, v in self._spent.items()}

    def _now(self) -> float:
        if self.device.type == "cuda":  # kernels run behind the program that launches them
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
