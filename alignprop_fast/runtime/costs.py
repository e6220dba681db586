"""Costs of the parts of a training step, as the planner's table wants them: denoising step, decoder, reward.

On a device the parts are run and timed. On meta tensors they are counted, with a formula for an operator's seconds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from alignprop_fast.planner import Segment, Stage
from alignprop_fast.runtime.chain import Chain
from alignprop_fast.runtime.measure import Workspaces
from alignprop_fast.runtime.segments import Block
from alignprop_fast.runtime.trace import Operator, Trace, Work, segments, trace


@dataclass(frozen=True)
class StepCosts:
    """One denoising step: segments with gradient, spike and seconds without; what libraries hold on to from now on."""

    segments: tuple[Segment, ...]
    sampling_bytes: int
    sampling_seconds: float
    workspace_bytes: int


def step_costs(
    chain: Chain, x: torch.Tensor, operator_seconds: Operator | None = None, link: float | None = None
) -> StepCosts:
    """Costs of one step of the chain at latents x [B, ...]; runs the network of step 0 and draws no random number.

    operator_seconds: estimates instead of timing (on meta tensors). link: bytes a second to host memory, for offload.
    """
    x = chain.start(x)
    start = x.detach().requires_grad_()
    wanted = [start, *chain.parameters]

    def backward(y: torch.Tensor) -> None:
        if chain.sink is None:
            torch.autograd.grad(y, wanted, torch.ones_like(y), allow_unused=True)
        else:
            _one_by_one(y, start, chain.parameters)

    work = Work(
        forward=lambda: chain.network(0, start),
        backward=backward,
        blocks=chain.blocks,
        device=x.device,
        operator_seconds=operator_seconds,
    )

    @torch.inference_mode()
    def sample() -> torch.Tensor:
        return chain.network(0, x)

    with Workspaces(x.device) as held:
        sampling = trace(replace(work, forward=sample, backward=None), {})
        options = segments(work, link)
    return StepCosts(options, sampling.peak_bytes, sampling.seconds, held.size_bytes)


def _one_by_one(y: torch.Tensor, start: torch.Tensor, parameters: Sequence[torch.Tensor]) -> None:
    """Backward pass into a `Chain.sink`: each parameter's gradient is gone as soon as it has been added, or stepped."""

    def drop(parameter: torch.Tensor) -> None:
        parameter.grad = None

    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    handles = [parameter.register_post_accumulate_grad_hook(drop) for parameter in parameters]
    try:
        torch.autograd.backward(y, torch.ones_like(y), inputs=[*parameters, start])
    finally:
        for handle in handles:
            handle.remove()
        for parameter, grad in zip(parameters, before, strict=True):
            parameter.grad = grad
        start.grad = None


def decoder_stages(
    decode: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    blocks: Sequence[Block],
    banded: Callable[[torch.Tensor], torch.Tensor] | None = None,
    operator_seconds: Operator | None = None,
) -> tuple[Stage, ...]:
    """The decoder on latents x [B, ...]: all images at once, one by one or by bands, run again to go back."""

    def work(fn: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, blocks: Sequence[Block]) -> Work:
        start = images.detach().requires_grad_()
        return Work(
            forward=lambda: fn(start),
            backward=lambda out: torch.autograd.grad(out, start, torch.ones_like(out)),
            blocks=blocks,
            device=x.device,
            operator_seconds=operator_seconds,
            output_kept=False,
        )

    def again(name: str, one: Work, segments: tuple[Segment, ...]) -> Stage:
        forward = _without_graph(one)
        # While one image is decoded again the gradients of all others are there, and so are the images.
        higher = tuple(raised(segment, others_bytes) for segment in segments)
        return Stage(name, higher, len(x), True, forward.peak_bytes, len(x) * forward.seconds)

    others_bytes = (len(x) - 1) * _output_bytes(lambda: decode(x[:1]))
    at_once = segments(work(decode, x, blocks))
    one = work(decode, x[:1], blocks)
    stages = [Stage("batch", at_once), again("image", one, segments(one) if len(x) > 1 else at_once)]
    if banded is not None:
        one = work(banded, x[:1], ())
        stages.append(again("bands", one, segments(one)))
    return tuple(stages)


def reward_stages(
    score: Callable[..., tuple[torch.Tensor, Any]],
    images: torch.Tensor,
    *lists: Sequence[Any],
    by_image: bool = False,
    operator_seconds: Operator | None = None,
) -> tuple[Stage, ...]:
    """The reward score(images [B, 3, H, W], *lists): the whole batch at once and, if it may be cut, by chunks of it.

    Chunks of one image are there at every batch size, so that a line can be drawn between tables.
    """

    def work(count: int) -> Work:
        part = images[:count].detach().requires_grad_()
        arguments = [values[:count] for values in lists]
        return Work(
            forward=lambda: score(part, *arguments)[0],
            backward=lambda scores: torch.autograd.grad(scores.sum(), part),
            blocks=(),
            device=images.device,
            operator_seconds=operator_seconds,
        )

    stages = [Stage("batch", segments(work(len(images))))]
    image_bytes = images.numel() * images.element_size()
    chunk = 1
    while by_image and (chunk == 1 or chunk < len(images)):
        runs = -(-len(images) // chunk)
        forward = _without_graph(work(chunk))
        chunked = tuple(raised(segment, image_bytes) for segment in segments(work(chunk)))
        stages.append(Stage(f"chunk:{chunk}", chunked, runs, True, forward.peak_bytes, runs * forward.seconds))
        chunk *= 2
    return tuple(stages)


def _without_graph(work: Work) -> Trace:
    """The forward pass as the stage's first run has it: checkpointing drops what it would keep."""

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return work.forward()

    return trace(replace(work, forward=forward, backward=None), {})


def raised(segment: Segment, by_bytes: int) -> Segment:
    """The segment with so many bytes more at the worst moment of each option."""
    return replace(
        segment, options=tuple(replace(option, spike_bytes=option.spike_bytes + by_bytes) for option in segment.options)
    )


def _output_bytes(fn: Callable[[], torch.Tensor]) -> int:
    with torch.no_grad():
        out = fn()
    return out.numel() * out.element_size()
