"""Settings of `VisionPPOTrainer`: TRL's `PPOConfig` and what it lacks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from trl.experimental.ppo import PPOConfig


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class VisionPPOConfig(PPOConfig):
    """TRL's `PPOConfig` with mmft's additions; a plain `PPOConfig` makes the trainer behave as TRL's own does.

    Where the two differ in a default, it is because TRL's would be wrong here: responses stop at EOS, and the score
    is credited at the EOS token itself rather than one position later.
    """

    stop_token: Literal["eos"] | None = _setting("eos", "What ends a response; the checkpoint's own EOS ids are used.")
    temperature: float = _setting(1.0, "Sampling temperature; log-probabilities use the same.")
    top_k: int = _setting(0, "Sample among the k likeliest tokens; 0: all.")
    top_p: float = _setting(1.0, "Sample among the likeliest tokens of this total probability.")
    min_new_tokens: int = _setting(0, "Tokens before a response may end.")
    bf16: bool | None = _setting(False, "Weights keep the type they were loaded in.")
    gradient_checkpointing: bool = _setting(False, "Recompute activations in the backward pass.")
    num_sample_generations: int = _setting(0, "TRL's sample table; samples.jsonl takes its place.")

    eos_credit: Literal["own", "next"] = _setting(
        "own", "Where the score is credited: at EOS, or one position later (TRL)."
    )
    whiten_advantages: bool = _setting(True, "Scale advantages to mean 0 and variance 1.")
    entropy_coef: float = _setting(0.0, "Weight of the entropy bonus.")
    target_kl: float | None = _setting(None, "Stop an update when its approximate KL passes this.")
    clip_gradients: bool = _setting(True, "Clip the gradient to `max_grad_norm` (TRL's PPO never does).")
    kl_target: float | None = _setting(None, "Nats a response to steer the KL to by adapting its coefficient.")
    kl_horizon: int = _setting(10_000, "Responses over which the coefficient adapts.")
    l2: float = _setting(0.0, "Weight of the squared distance to the pretrained weights (E22).")
    adapter_penalty: float = _setting(0.0, "Weight of the squared norm of the adapter's parameters (E25).")
    value_learning_rate: float | None = _setting(None, "Learning rate of the critic; None: the policy's.")
    schedule: Literal["constant", "linear", "cosine"] = _setting("cosine", "Learning rate over updates.")
    warmup: int = _setting(0, "Updates in which the learning rate rises.")
    samples_per_prompt: int = _setting(1, "Responses of each prompt in a batch.")
    critic: Literal["shared", "adapter"] = _setting(
        "shared", "Value head on the policy's states, or on those of a second adapter."
    )
    encode_once: Literal["auto", "on", "off"] = _setting("auto", "Encode each distinct picture once, if frozen.")
    feature_cache_gb: float = _setting(2.0, "Memory for features of pictures, in GiB.")
    share_prompts: bool = _setting(True, "Responses of one prompt share its forward and backward pass.")
    workers: int = _setting(0, "Threads that prepare the next batch while the model computes.")


# What a plain `PPOConfig` stands for: TRL's own behaviour.
_TRL: dict[str, Any] = {
    "top_k": 0, "top_p": 1.0, "min_new_tokens": 0, "eos_credit": "next", "whiten_advantages": True, "entropy_coef": 0.0,
    "target_kl": None, "clip_gradients": False, "kl_target": None, "kl_horizon": 10_000, "l2": 0.0,
    "adapter_penalty": 0.0, "value_learning_rate": None, "samples_per_prompt": 1,
    "critic": "shared", "encode_once": "auto", "feature_cache_gb": 2.0, "share_prompts": False,
}  # fmt: skip


def setting(args: PPOConfig, name: str) -> Any:
    """A setting of `VisionPPOConfig`, or what TRL does where `args` is a plain `PPOConfig`."""
    return getattr(args, name) if isinstance(args, VisionPPOConfig) else _TRL[name]
