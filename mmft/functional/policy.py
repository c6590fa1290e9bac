"""Policy losses and the KL divergence to the reference policy."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mmft.functional.masked import masked_mean
from mmft.types import LossOutput

CLIP_FRACTION = "policy/clip_fraction"
APPROX_KL = "policy/approx_kl"
RATIO_MEAN = "policy/ratio_mean"
RATIO_MAX = "policy/ratio_max"


def ppo_clip_loss(
    logprobs_BT: Tensor, old_logprobs_BT: Tensor, advantage_BT: Tensor, mask_BT: Tensor, clip_range: float
) -> LossOutput:
    """Clipped surrogate objective, negated to be minimised.

    Equation: E12
        L = -E[ min(r_t A_t, clip(r_t, 1 - eps, 1 + eps) A_t) ],   r_t = pi(a_t|s_t) / pi_old(a_t|s_t)

    Args:
        logprobs_BT: log pi(a_t|s_t), differentiable.
        old_logprobs_BT: log pi_old(a_t|s_t) of the rollout.
        advantage_BT: A_t, usually whitened.
        mask_BT: bool, the response including EOS.
        clip_range: eps.

    Returns:
        The loss, averaged over kept tokens, with `policy/clip_fraction` (tokens whose clipped term decides),
        `policy/approx_kl` (half the mean squared log ratio), `policy/ratio_mean` and `policy/ratio_max`. All are
        means over kept tokens; TRL averages the last three over padding too.

    Source: Schulman et al. 2017, "Proximal Policy Optimization Algorithms", eq. 7.
    """
    # Replaced before exp: padding may hold any number, and exp of it could be inf, which makes gradients NaN.
    log_ratio_BT = (logprobs_BT - old_logprobs_BT).masked_fill(~mask_BT, 0.0)
    ratio_BT = log_ratio_BT.exp()
    loss_BT = -advantage_BT * ratio_BT
    clipped_loss_BT = -advantage_BT * ratio_BT.clamp(1.0 - clip_range, 1.0 + clip_range)
    loss = masked_mean(torch.maximum(loss_BT, clipped_loss_BT), mask_BT)
    with torch.no_grad():
        metrics = {
            CLIP_FRACTION: masked_mean((clipped_loss_BT > loss_BT).float(), mask_BT),
            APPROX_KL: 0.5 * masked_mean(log_ratio_BT.square(), mask_BT),
            RATIO_MEAN: masked_mean(ratio_BT, mask_BT),
            RATIO_MAX: ratio_BT.masked_fill(~mask_BT, 0.0).amax(),
        }
    return LossOutput(loss, metrics)


def kl_estimate(
    logprobs_BT: Tensor, ref_logprobs_BT: Tensor, mask_BT: Tensor, estimator: Literal["k1", "k3"] = "k1"
) -> Tensor:
    """Per-token estimate of KL(pi || pi_ref) from tokens sampled by pi.

        log r = log pi_ref(a) - log pi(a)
        k1 = -log r               unbiased, can be negative
        k3 = r - 1 - log r        unbiased, never negative, lower variance near r = 1

    Returns kl_BT, 0 outside the mask; summed over T it estimates the divergence of the whole response.
    Source: Schulman 2020, "Approximating KL Divergence", http://joschu.net/blog/kl-approx.html.
    """
    log_r_BT = (ref_logprobs_BT - logprobs_BT).masked_fill(~mask_BT, 0.0)
    if estimator == "k1":
        return -log_r_BT
    if estimator == "k3":
        return torch.expm1(log_r_BT) - log_r_BT
    raise ValueError(f"unknown KL estimator {estimator!r}: use 'k1' or 'k3'")


class KLController:
    """The KL penalty's coefficient, held fixed or steered towards a target divergence.

        e    = clip(KL / target - 1, -0.2, 0.2)
        coef = coef (1 + e n / horizon)

    n counts samples since the last update, `horizon` is the time constant in samples. `target=None` keeps `coef`.
    Source: Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", section 2.2.
    """

    def __init__(self, coef: float, target: float | None = None, horizon: int = 10_000) -> None:
        if target is not None and target <= 0:
            raise ValueError(f"the KL target must be positive, got {target}")
        if horizon <= 0:
            raise ValueError(f"the KL horizon must be positive, got {horizon}")
        self.coef = coef
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, n_steps: int) -> float:
        """Adapt to the mean divergence `kl` (nats a response) of `n_steps` samples; returns the new coefficient."""
        if self.target is not None:
            error = min(max(kl / self.target - 1.0, -0.2), 0.2)
            # At most 20% an update: with a horizon far below the batch the factor would reach 0 and stay there.
            self.coef *= 1.0 + error * min(n_steps / self.horizon, 1.0)
        return self.coef

    def state_dict(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coef = state["coef"]
