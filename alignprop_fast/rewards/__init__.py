"""Differentiable rewards: images and prompts in, one score per image out. See `registry.py` for how they are named."""

from alignprop_fast.rewards.mixture import Reward, WeightedSum
from alignprop_fast.rewards.registry import get_reward, reward_names

__all__ = ["Reward", "WeightedSum", "get_reward", "reward_names"]
