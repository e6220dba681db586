"""What a reward is to this package. A plain function is enough; a subclass of `Reward` can say more about itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from alignprop_fast.ops.versions import versions

RewardFunction = Callable[..., Any]
"""(images [B, 3, H, W], prompts, metadata) -> scores [B], or (scores, info)."""


class Reward(ABC):
    """Scores pictures, differentiably. Only the call must be written; everything else has a default.

    A reward that is an `nn.Module` as well (`class Sharpness(Reward, nn.Module)`) has its weights counted and watched.

    Example, a reward with weights of its own that scores each image by itself:

        class Sharpness(Reward):
            by_image = True

            def __init__(self):
                self.network = load_network().cuda()

            def __call__(self, images, prompts, metadata):
                return self.network(images).mean(dim=(1, 2, 3)), {}

            def weight_bytes(self):
                return sum(p.numel() * p.element_size() for p in self.network.parameters())

            def state(self):
                return versions([self.network])

    Attributes:
        by_image: it scores each image by itself, so a batch may be scored in pieces to save memory.
        observes: it wants `observe` to be called.
    """

    by_image: bool = False
    observes: bool = False

    @abstractmethod
    def __call__(
        self, images_BCHW: Tensor, prompts: Sequence[str], metadata: Sequence[Any]
    ) -> tuple[Tensor, Mapping[str, Any]]:
        """images_BCHW: [B, 3, H, W] in [0, 1], on the reward's device. B prompts, and each one's metadata.

        Returns scores [B], higher is better, differentiable in the images; and what else is worth logging, by name.
        It is called again in the backward pass where the batch is scored in pieces, so a call must change nothing.
        """

    def weight_bytes(self) -> int:
        """What the weights take on the device, for the memory plan. Default: those of an `nn.Module`, else 0."""
        tensors = [t for network in self._networks() for t in (*network.parameters(), *network.buffers())]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def state(self) -> Hashable:
        """What the scores depend on beside the images, to be compared: changes where a weight does.

        A backward pass that scores pieces again raises an error if it has changed. Default: the weights of an
        `nn.Module`, else nothing.
        """
        return versions(self._networks())

    def _networks(self) -> list[nn.Module]:
        return [self] if isinstance(self, nn.Module) else []

    def observe(self, info: Mapping[str, Any]) -> None:
        """Take note of a training batch of all processes: {name: scores [B]}, the call's tensors with one per image.

        Called once for each micro-batch in training, after it was scored, where `observes`.
        """
        raise NotImplementedError("a reward that observes defines it")


class FunctionReward(Reward):
    """A function (images, prompts, metadata) -> scores [B], or (scores, info), as a reward.

    Args:
        function: a plain function, or an `nn.Module`, whose weights then count in the memory plan.
        by_image: whether it scores each image by itself.
    """

    def __init__(self, function: RewardFunction, by_image: bool = False):
        self.function, self.by_image = function, by_image

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Any:
        result = self.function(images_BCHW, prompts, metadata)
        return result if isinstance(result, tuple) else (result, {})

    def _networks(self) -> list[nn.Module]:
        return [self.function] if isinstance(self.function, nn.Module) else []


def check_gradient(name: str, scores_B: Tensor, images_BCHW: Tensor) -> None:
    """Raises ValueError, naming the reward, for scores that have lost the images' gradient: nothing would learn."""
    if torch.is_grad_enabled() and images_BCHW.requires_grad and not scores_B.requires_grad:
        raise ValueError(
            f"reward {name!r} returned scores without gradient; compute them from the images by differentiable torch "
            "operations, without detach(), no_grad(), numpy or PIL"
        )


def as_reward(reward: Reward | RewardFunction, by_image: bool = False) -> Reward:
    """A `Reward` as it is; a function wrapped into one. by_image: of a function, see `Reward`."""
    return reward if isinstance(reward, Reward) else FunctionReward(reward, by_image)
