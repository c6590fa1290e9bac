"""Rewards of captions: terms, and the function that normalises, weights and sums them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmft.rewards.combine import RewardFunction, build_reward
    from mmft.rewards.terms import TERMS, Term, register

__all__ = ["TERMS", "RewardFunction", "Term", "build_reward", "register"]


def __getattr__(name: str) -> Any:
    """Looked up when asked for (PEP 562): processes that compute a plain term start without torch."""
    if name in ("RewardFunction", "build_reward"):
        from mmft.rewards import combine

        return getattr(combine, name)
    if name in ("TERMS", "Term", "register"):
        from mmft.rewards import terms

        return getattr(terms, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
