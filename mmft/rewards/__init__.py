"""Rewards of captions: terms, and the function that normalises, weights and sums them."""

from mmft.rewards.combine import RewardFunction, build_reward
from mmft.rewards.terms import TERMS, Term, register

__all__ = ["TERMS", "RewardFunction", "Term", "build_reward", "register"]
