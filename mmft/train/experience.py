"""From what was sampled and scored to what the update learns from: token rewards, advantages, returns. Pure
functions.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from mmft.functional.masked import last_index, masked_mean, masked_whiten
from mmft.functional.policy import kl_estimate, ppo_clip_loss
from mmft.functional.returns import credit_score, gae, td_loss
from mmft.functional.value import clipped_value_loss
from mmft.models.prompts import Prompt
from mmft.models.scoring import TokenScores
from mmft.rewards.shaping import shaped_reward
from mmft.types import LossOutput, RewardOutput, Row


@dataclass
class Rollout:
    """One batch of sampled responses with all that was measured of them. See the legend in `mmft.types`.

    responses_BT: sampled tokens, padding after the end; mask_BT: the response up to and including EOS.
    logprobs_BT, ref_logprobs_BT: under the sampling and the reference policy (None where no KL is asked for);
    value_BT: V(s_t).
    scores_B: the reward of each response, before penalties; finished_B: whether it ended with EOS.
    potential_BT: Phi(s_t) where the reward is shaped. watched: metrics that are logged with the batch.
    """

    prompts: list[Prompt]
    rows: list[Row]
    responses_BT: Tensor
    mask_BT: Tensor
    finished_B: Tensor
    logprobs_BT: Tensor
    ref_logprobs_BT: Tensor | None
    value_BT: Tensor
    scores_B: Tensor
    captions: list[str] = field(default_factory=list)
    reward: RewardOutput | None = None
    potential_BT: Tensor | None = None
    watched: dict[str, float] = field(default_factory=dict)

    @property
    def kept_B(self) -> Tensor:
        """Rows that have a reward: all but those on which a term failed (`reward.on_error: drop`)."""
        kept_B = torch.ones_like(self.finished_B)
        if self.reward is not None and self.reward.dropped:
            kept_B[list(self.reward.dropped)] = False
        return kept_B


@dataclass
class Experience:
    """What the update reads: value_mask_BT is mask_BT, or one position longer in TRL's layout."""

    mask_BT: Tensor
    value_mask_BT: Tensor
    logprobs_BT: Tensor
    value_BT: Tensor
    advantage_BT: Tensor
    return_BT: Tensor
    kl_BT: Tensor
    non_score_reward_BT: Tensor
    reward_BT: Tensor
    td_loss: Tensor

    def part(self, rows: slice, width: int) -> Experience:
        """Rows of the batch, `width` positions of each."""
        tensors = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Experience(**{name: t[rows, :width] if t.dim() == 2 else t for name, t in tensors.items()})


@dataclass(frozen=True)
class ExperienceSettings:
    """How rewards become advantages; `VisionPPOTrainer` fills it from its arguments."""

    kl_coef: float
    kl_estimator: Literal["k1", "k3"]
    gamma: float
    lam: float
    whiten_rewards: bool
    whiten_advantages: bool
    missing_eos_penalty: float | None
    eos_credit: Literal["own", "next"]
    shaping_beta: float = 0.0


@torch.no_grad()
def make_experience(rollout: Rollout, settings: ExperienceSettings) -> Experience:
    """Token rewards (-coef * KL everywhere, the score at the end, the shaping of both), then GAE.

    `eos_credit="own"` credits the score at the last token of the response, which is EOS where there is one: the
    action that ended the response earns what the response is worth. `"next"` is TRL's layout, one position later
    where there is room.
    """
    mask_BT = rollout.mask_BT & rollout.kept_B[:, None]
    scores_B = penalised_scores(rollout.scores_B, rollout.finished_B, settings.missing_eos_penalty)
    reference_BT = rollout.logprobs_BT if rollout.ref_logprobs_BT is None else rollout.ref_logprobs_BT
    kl_BT = kl_estimate(rollout.logprobs_BT, reference_BT, mask_BT, settings.kl_estimator)
    non_score_BT = -settings.kl_coef * kl_BT
    value_mask_BT = mask_BT if settings.eos_credit == "own" else one_longer(mask_BT)
    reward_BT = credit_score(non_score_BT, scores_B, last_index(value_mask_BT))
    if rollout.potential_BT is not None:
        potential_BT = rollout.potential_BT.masked_fill(~mask_BT, 0.0)
        reward_BT = shaped_reward(reward_BT, potential_BT, value_mask_BT, settings.shaping_beta, settings.gamma)
    if settings.whiten_rewards:
        reward_BT = masked_whiten(reward_BT, value_mask_BT, shift_mean=False)
    value_BT = rollout.value_BT.masked_fill(~value_mask_BT, 0.0)
    advantage_BT, return_BT = gae(reward_BT, value_BT, value_mask_BT, settings.gamma, settings.lam)
    next_value_BT = torch.cat([value_BT[:, 1:], torch.zeros_like(value_BT[:, :1])], 1)
    td = td_loss(reward_BT, value_BT, next_value_BT, value_mask_BT, settings.gamma)
    if settings.whiten_advantages:
        advantage_BT = masked_whiten(advantage_BT, mask_BT)
    return Experience(
        mask_BT, value_mask_BT, rollout.logprobs_BT, value_BT, advantage_BT.masked_fill(~mask_BT, 0.0), return_BT,
        kl_BT, non_score_BT, reward_BT, td.loss,
    )  # fmt: skip


def penalised_scores(scores_B: Tensor, finished_B: Tensor, missing_eos_penalty: float | None) -> Tensor:
    """Scores, less the penalty where a response did not end by itself."""
    if missing_eos_penalty is None:
        return scores_B
    return scores_B - missing_eos_penalty * (~finished_B).to(scores_B.dtype)


def one_longer(mask_BT: Tensor) -> Tensor:
    """Each row's mask with one more position, where the row has room."""
    return torch.cat([torch.ones_like(mask_BT[:, :1]), mask_BT[:, :-1]], 1)


def ppo_loss(
    scores: TokenScores,
    experience: Experience,
    index: Tensor,
    clip_range: float,
    value_clip_range: float,
    value_coef: float,
    entropy_coef: float,
    share: float = 1.0,
    value_share: float = 1.0,
) -> LossOutput:
    """PPO's loss on the rows `index` of a batch: clipped policy loss + value_coef * value loss - entropy_coef *
    entropy.

    Equation: E12, E14. Every mean is over kept tokens. `scores` holds the current policy's numbers for these rows.
    Where the rows are a part of a minibatch, `share` and `value_share` are their part of its tokens, so that the
    parts' losses add up to its own.
    """
    mask_BT, value_mask_BT = experience.mask_BT[index], experience.value_mask_BT[index]
    policy = ppo_clip_loss(
        scores.logprobs_BT, experience.logprobs_BT[index], experience.advantage_BT[index], mask_BT, clip_range
    )
    value = clipped_value_loss(
        scores.value_BT, experience.value_BT[index], experience.return_BT[index], value_mask_BT, value_clip_range
    )
    loss = share * policy.loss + value_share * value_coef * value.loss
    metrics = {
        **policy.metrics,
        **value.metrics,
        "loss/policy": policy.loss.detach(),
        "loss/value": value.loss.detach(),
    }
    if scores.entropy_BT is not None:
        entropy = masked_mean(scores.entropy_BT, mask_BT)
        loss = loss - share * entropy_coef * entropy if entropy_coef else loss
        metrics["policy/entropy"] = entropy.detach()
    return LossOutput(loss, metrics)
