"""Differentiable rewards: images and prompts in, one score per image out. `registry.py` explains their names."""

from alignprop_fast.rewards.mixture import WeightedSum
from alignprop_fast.rewards.registry import get_reward, reward_names
from alignprop_fast.rewards.reward import FunctionReward, Reward, as_reward

__all__ = ["FunctionReward", "Reward", "WeightedSum", "as_reward", "get_reward", "reward_names"]
