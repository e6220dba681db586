"""Differentiable rewards: images and prompts in, one score per image out. See `registry.py` for how they are named."""

from .mixture import Reward, WeightedSum
from .registry import get_reward, reward_names

__all__ = ["Reward", "WeightedSum", "get_reward", "reward_names"]
