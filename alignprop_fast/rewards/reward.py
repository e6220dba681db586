"""The reward type. A plain function is enough as a reward; a subclass of `Reward` can declare more."""

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
    """Scores pictures, differentiably. Only `__call__` is required; everything else has a default.

    A reward that is an `nn.Module` as well (`class Sharpness(Reward, nn.Module)`) has its weights counted and watched.

    Example: a reward with its own weights that scores each image separately.

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
        by_image: whether it scores each image separately, so that a batch may be scored in chunks to save memory.
        observes: whether `observe` is called.
    """

    by_image: bool = False
    observes: bool = False

    @abstractmethod
    def __call__(
        self, images_BCHW: Tensor, prompts: Sequence[str], metadata: Sequence[Any]
    ) -> tuple[Tensor, Mapping[str, Any]]:
        """images_BCHW: [B, 3, H, W] in [0, 1], on the reward's device, with B prompts and their metadata.

        Returns scores [B], higher is better, differentiable in the images; and other values to log, by name. If the
        batch is scored in chunks, the backward pass calls it again, so a call must not change anything.
        """

    def weight_bytes(self) -> int:
        """Bytes of the weights on the device, for the memory plan. Default: those of an `nn.Module`, else 0."""
        tensors = [t for network in self._networks() for t in (*network.parameters(), *network.buffers())]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def state(self) -> Hashable:
        """Everything besides the images that the scores depend on, as a value that changes if a weight does.

        A backward pass that scores pieces again raises an error if it has changed. Default: the weights of an
        `nn.Module`, else nothing.
        """
        return versions(self._networks())

    def _networks(self) -> list[nn.Module]:
        return [self] if isinstance(self, nn.Module) else []

    def observe(self, info: Mapping[str, Any]) -> None:
        """Record the scores of a training batch, of all processes together: {name: scores [B]}.

        Called once per micro-batch in training, after it was scored, if `observes`.
        """
        raise NotImplementedError("a reward that observes defines it")


class FunctionReward(Reward):
    """Makes a reward from a function (images, prompts, metadata) -> scores [B] or (scores, info).

    Args:
        function: a plain function, or an `nn.Module`, whose weights then count in the memory plan.
        by_image: whether it scores each image separately.
    """

    def __init__(self, function: RewardFunction, by_image: bool = False):
        self.function, self.by_image = function, by_image

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Any:
        result = self.function(images_BCHW, prompts, metadata)
        return result if isinstance(result, tuple) else (result, {})

    def _networks(self) -> list[nn.Module]:
        return [self.function] if isinstance(self.function, nn.Module) else []


def check_gradient(name: str, scores_B: Tensor, images_BCHW: Tensor) -> None:
    """Raises ValueError, naming the reward, if the scores have no gradient to the images: nothing would learn."""
    if torch.is_grad_enabled() and images_BCHW.requires_grad and not scores_B.requires_grad:
        raise ValueError(
            f"reward {name!r} returned scores without gradient; compute them from the images by differentiable torch "
            "operations, without detach(), no_grad(), numpy or PIL"
        )


def as_reward(reward: Reward | RewardFunction, by_image: bool = False) -> Reward:
    """A `Reward` unchanged, or a function wrapped into one. by_image: for a function, see `Reward`."""
    return reward if isinstance(reward, Reward) else FunctionReward(reward, by_image)
