"""Costs of the parts of a training step for the planner's table: denoising step, decoder, reward.

On a device the parts are run and timed. On meta tensors their operators are counted.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch

from alignprop_fast.ops.errors import unless_out_of_memory
from alignprop_fast.planner import Segment, Stage, Time
from alignprop_fast.runtime.block_costs import segments
from alignprop_fast.runtime.blocks import Block
from alignprop_fast.runtime.chain import Chain
from alignprop_fast.runtime.gradients import step_gradients
from alignprop_fast.runtime.measure import Workspaces
from alignprop_fast.runtime.told import Told, nobody, within
from alignprop_fast.runtime.trace import trace
from alignprop_fast.runtime.work import Trace, Work

logger = logging.getLogger(__name__)

DECODER_STAGES = ("batch", "image", "bands")


@dataclass(frozen=True)
class StepCosts:
    """Costs of one denoising step.

    segments: of a step with gradient. sampling_bytes, sampling_seconds: transient bytes and time of an evaluation
    without. closed_bytes, closed_seconds: of one inside `Chain.approximation`; None if that changes nothing.
    workspace_bytes: memory that libraries keep from now on.
    """

    segments: tuple[Segment, ...]
    sampling_bytes: int
    sampling_seconds: Time
    workspace_bytes: int
    closed_bytes: int | None = None
    closed_seconds: Time | None = None


def step_costs(chain: Chain, x: torch.Tensor, offload: bool = False, told: Told = nobody) -> StepCosts:
    """Costs of one step of the chain at latents x [B, ...]; runs the prediction of step 0 and draws no random number.

    offload: whether blocks can move tensors to host memory. told: is told which share of the work is done.
    """
    x = chain.start(x)
    start = x.detach().requires_grad_()
    work = Work(
        forward=partial(chain.predict, 0, start),
        pull=_all_at_once if chain.gradient_sink is None else _one_by_one,
        leaves=[start, *chain.receivers],
        blocks=chain.blocks,
        device=x.device,
        around_block=chain.around_block,
    )
    with Workspaces(x.device) as held, chain.reading():
        sampling = trace(replace(work, forward=partial(_sample, chain, x), pull=None), {})
        closed = None
        if chain.approximates:
            with chain.approximation():
                closed = trace(replace(work, forward=partial(_sample, chain, x), pull=None, kinds={}), {})
        told(0.1)
        options = segments(work, offload, within(told, 0.1, 1))
    costs = StepCosts(options, sampling.peak_bytes, sampling.seconds, held.size_bytes)
    return costs if closed is None else replace(costs, closed_bytes=closed.peak_bytes, closed_seconds=closed.seconds)


@torch.inference_mode()
def _sample(chain: Chain, x: torch.Tensor) -> torch.Tensor:
    return chain.predict(0, x)


def _all_at_once(y: torch.Tensor, leaves: Sequence[torch.Tensor]) -> None:
    """A backward pass that keeps all gradients until its end."""
    step_gradients(y, leaves, torch.ones_like(y))


def _one_by_one(y: torch.Tensor, leaves: Sequence[torch.Tensor]) -> None:
    """A backward pass into a `GradientSink`, which frees each gradient once it is added or stepped."""
    before = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    handles = [leaf.register_post_accumulate_grad_hook(_drop_grad) for leaf in leaves]
    try:
        torch.autograd.backward(y, torch.ones_like(y), inputs=list(leaves))
    finally:
        for handle in handles:
            handle.remove()
        for leaf, grad in zip(leaves, before, strict=True):
            leaf.grad = grad


def _drop_grad(leaf: torch.Tensor) -> None:
    leaf.grad = None


class DecoderCosts:
    """Measures a decoder. What one image costs is measured once, for all batch sizes.

    Args:
        decode, banded: from latents [B, ...] to images; banded in less memory.
        blocks: of `decode`.
        one_image: the stages of a batch of one that are known already.
    """

    def __init__(
        self,
        decode: Callable[[torch.Tensor], torch.Tensor],
        banded: Callable[[torch.Tensor], torch.Tensor],
        blocks: Sequence[Block],
        one_image: Sequence[Stage] = (),
    ):
        self._ways: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], Sequence[Block]]]
        self._ways = {"image": (decode, blocks), "bands": (banded, ())}
        self._one = {stage.name: stage for stage in one_image}

    def stages(self, x: torch.Tensor, image_bytes: int) -> tuple[Stage, ...]:
        """The decoder on latents x [B, ...]: all images at once, or one by one or by bands, which recompute to go back.

        image_bytes: of all B decoded images. Stages for which the device lacks memory are left out.

        Raises:
            torch.OutOfMemoryError: the device lacks memory for all stages.
        """
        again = {name: partial(self._again, name, x, image_bytes) for name in self._ways}
        return _that_fit("decoder", {"batch": partial(self._batch, x), **again})

    def _batch(self, x: torch.Tensor) -> Stage:
        return Stage("batch", self._one_image("image", x).segments if len(x) == 1 else segments(self._work("image", x)))

    def _again(self, name: str, x: torch.Tensor, image_bytes: int) -> Stage:
        one = self._one_image(name, x[:1])
        # While one image is decoded again, all images and the gradients of the others are alive.
        others_bytes = image_bytes * (len(x) - 1) // len(x)
        higher = tuple(_with_more_transient(segment, others_bytes) for segment in one.segments)
        return Stage(name, higher, len(x), True, one.forward_bytes, one.forward_seconds * len(x))

    def _one_image(self, name: str, x: torch.Tensor) -> Stage:
        """One image, decoded without graph, and again in the backward pass."""
        if name not in self._one:
            work = self._work(name, x)
            found, forward = segments(work), _without_graph(work)
            self._one[name] = Stage(name, found, 1, True, forward.peak_bytes, forward.seconds)
        return self._one[name]

    def _work(self, name: str, x: torch.Tensor) -> Work:
        start = x.detach().requires_grad_()
        decode, blocks = self._ways[name]
        return Work(
            forward=partial(decode, start),
            pull=_all_at_once,
            leaves=[start],
            blocks=blocks,
            device=x.device,
            output_kept=False,
        )


def reward_stages(
    score: Callable[..., tuple[torch.Tensor, Any]],
    images: torch.Tensor,
    *lists: Sequence[Any],
    by_image: bool = False,
) -> tuple[Stage, ...]:
    """The reward score(images [B, 3, H, W], *lists): the whole batch at once and, if allowed, in chunks.

    Stages for which the device lacks memory are left out.

    Raises:
        torch.OutOfMemoryError: the device lacks memory for all stages.
    """

    def work(count: int) -> Work:
        part = images[:count].detach().requires_grad_()
        arguments = [values[:count] for values in lists]
        return Work(
            forward=lambda: score(part, *arguments)[0],
            pull=_all_at_once,
            leaves=[part],
            blocks=(),
            device=images.device,
        )

    @cache
    def whole(count: int) -> tuple[Segment, ...]:
        return segments(work(count))

    def chunked(chunk: int) -> Stage:
        runs = -(-len(images) // chunk)
        forward = _without_graph(work(chunk))
        found = tuple(_with_more_transient(segment, image_bytes) for segment in whole(chunk))
        return Stage(f"chunk:{chunk}", found, runs, True, forward.peak_bytes, forward.seconds * runs)

    image_bytes = images.numel() * images.element_size()
    ways = {"batch": lambda: Stage("batch", whole(len(images)))}
    chunk = 1
    while by_image and (chunk == 1 or chunk < len(images)):
        ways[f"chunk:{chunk}"] = partial(chunked, chunk)
        chunk *= 2
    return _that_fit("reward", ways)


def _that_fit(part: str, ways: Mapping[str, Callable[[], Stage]]) -> tuple[Stage, ...]:
    """The stages that fit in the device's memory; each of the others gets a line in the log."""
    stages: list[Stage] = []
    for name, measure in ways.items():
        found = unless_out_of_memory(measure)
        if isinstance(found, Stage):
            stages.append(found)
        else:
            logger.info("the %s by %s does not fit and is left out: %s", part, name, found.reason)
    if not stages:
        raise torch.OutOfMemoryError(f"out of memory: the {part} fits neither at once nor in pieces")
    return tuple(stages)


def _without_graph(work: Work) -> Trace:
    """The forward pass in the stage's first run, where checkpointing drops what autograd would keep."""

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return work.forward()

    return trace(replace(work, forward=forward, pull=None), {})


def _with_more_transient(segment: Segment, by_bytes: int) -> Segment:
    """The segment with this many more bytes at the worst moment of each option."""
    return replace(
        segment,
        options=tuple(replace(option, transient_bytes=option.transient_bytes + by_bytes) for option in segment.options),
    )
