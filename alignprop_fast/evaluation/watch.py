"""Watches a reward that is not trained for, on the same prompts and seeds each time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from alignprop_fast.evaluation.evaluate import BASE, DIVERSITY, REWARD, Evaluation, draw, tasks_of
from alignprop_fast.generate.sampler import DifferentiableSampler
from alignprop_fast.prompts.rows import PromptRow
from alignprop_fast.rewards.mixture import WeightedSum

IMAGES_PER_PROMPT = 2  # the fewest that give a diversity


@dataclass(frozen=True)
class Watched:
    """The result of one evaluation.

    reward: mean over the pictures. parts: the mean of each part of the reward. diversity: CLIP distance of the pictures
    of a prompt, mean over the prompts.
    """

    reward: float
    diversity: float
    parts: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_log(self) -> dict[str, float]:
        """All numbers in one dictionary, for a tracker."""
        parts = {f"watch/{name}": value for name, value in self.parts.items()}
        return {"watch/reward": self.reward, "watch/diversity": self.diversity, **parts}


class Watch:
    """Draws pictures of fixed prompts and seeds and scores them, without changing training's random numbers.

    Args:
        reward: the reward to watch.
        rows: prompts, IMAGES_PER_PROMPT pictures each; picture i has seed + i.
        embed: images -> normalised embeddings [B, E], for the diversity.
    """

    def __init__(
        self,
        reward: WeightedSum,
        rows: Sequence[PromptRow],
        embed: Callable[[Tensor], Tensor],
        *,
        seed: int,
        batch_size: int,
        negative_prompt: str | None = None,
    ):
        self.reward, self.embed = reward, embed
        self.batch_size, self.negative_prompt = batch_size, negative_prompt
        self.tasks = tasks_of("watched", rows, IMAGES_PER_PROMPT, seed)

    def weight_bytes(self, trained: Any = None) -> int:
        """Bytes of the weights of reward and embedding, without those shared with the trained reward."""
        modules = [part.reward for part in self.reward.parts] if self.reward is not trained else []
        found = [module for module in (*modules, self.embed) if isinstance(module, nn.Module)]
        return sum(t.numel() * t.element_size() for m in found for t in (*m.parameters(), *m.buffers()))

    def look(self, sampler: DifferentiableSampler) -> Watched:
        """The scores with the sampler's current adapters."""
        names = [part.name for part in self.reward.parts]
        evaluation = Evaluation(self.reward, names if len(names) > 1 else (), self.embed)
        prompts, seeds = [task.prompt for task in self.tasks], [task.seed for task in self.tasks]
        for i, images in enumerate(draw(sampler, prompts, seeds, self.batch_size, self.negative_prompt)):
            evaluation.add(BASE, self.tasks[i * self.batch_size :][: self.batch_size], images)
        means = {summary.part: summary.mean for summary in evaluation.summaries()}
        return Watched(means.pop(REWARD), means.pop(DIVERSITY), means)
