"""Options of a plan, applied to blocks for the length of a `with` block, and stages, run at once or piece by piece."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from alignprop_fast.ops.kept import first_and_again
from alignprop_fast.planner import option_of
from alignprop_fast.runtime.offload import Offloader

STEP_OPTIONS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "keep": {},
    "norms": {"transformers": ("attention", "out", "qkv", "geglu")},
    "geglu": {"transformers": ("attention", "out", "qkv")},
    "qkv": {"transformers": ("attention", "out")},
    "attention": {"transformers": ("attention",)},
    "recompute": {"transformers": (), "residuals": (), "decoder": ()},
}
"""Options of a block, each named for what it gives up beside all before it, from the fastest to the leanest.

An option says what a block of each group that runs again in the backward pass keeps of its first run, by kind of result
(`ops.kept`); a group that it does not name keeps everything. "norms" repeats the transformer blocks' norms alone,
"geglu" also the GEGLU projection, "qkv" also the attention's input projections; "attention" keeps of a block its input
and the attention outputs, and "recompute" of every block its input. Per token of a transformer block of width C that is
19 C, 17 C, 9 C, 5 C, 3 C and C. With "+offload" behind it, what the option keeps waits in host memory.
"""
OFFLOAD = "+offload"


@dataclass(frozen=True)
class Block:
    """A module that can be kept or run again by itself, and the group of `STEP_OPTIONS` that it belongs to."""

    name: str
    module: nn.Module
    group: str

    def options(self) -> list[str]:
        """The options that differ for this block, the leanest first."""
        return [option for option in STEP_OPTIONS if option == "keep" or self.group in STEP_OPTIONS[option]][::-1]


@contextmanager
def kept_as(options: Mapping[str, str], blocks: Sequence[Block], offloader: Offloader | None = None) -> Iterator[None]:
    """Inside the block each of `blocks` keeps what its option says; one without an option keeps everything.

    options: option by name of a block, or "*" for all. The modules are left as they were found: names, parameters and
    hooks are not touched. None may lie inside another.

    Raises:
        ValueError: an unknown option.
    """
    found = [(block.module, block.module.__dict__.get("forward")) for block in blocks]
    for block in blocks:
        forward = _forward(block, option_of(options, block.name), offloader)
        if forward is not None:
            block.module.forward = forward
    try:
        yield
    finally:
        for module, own_forward in found:
            vars(module).pop("forward", None)
            if own_forward is not None:
                module.forward = own_forward


def _forward(block: Block, option: str, offloader: Offloader | None) -> Callable[..., Any] | None:
    """The block's forward under the option; None for its own, which keeps everything."""
    grade = option.removesuffix(OFFLOAD)
    if grade not in STEP_OPTIONS:
        raise ValueError(f"unknown option {option!r} of a block: use {', '.join(STEP_OPTIONS)}, or one with {OFFLOAD}")
    kinds, own = STEP_OPTIONS[grade].get(block.group), block.module.forward
    if option == grade or offloader is None:
        return None if kinds is None else _again(own, kinds)
    return offloader.offloaded(block.module, lambda move: _again(own, kinds, *move))


def _again(forward: Callable[..., Any], kinds: Sequence[str] | None, *move: Callable[..., Any]) -> Callable[..., Any]:
    """forward, run again in its backward pass but for the kinds of results that it keeps (None: everything)."""
    if kinds is None:
        return forward
    contexts = partial(first_and_again, kinds, *move)
    return partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def by_image(
    fn: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    stage: str,
    options: Mapping[str, str],
    blocks: Sequence[Block] = (),
    banded: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """fn(x) for a function that treats the images of a batch x [B, ...] alike, run as the stage says.

    batch: all images at once. image: the input alone is kept; the backward pass runs fn again, one image at a time.
    bands: as image, by `banded`, which does what fn does in less memory. In the first two each of `blocks` keeps what
    its option says.

    Raises:
        ValueError: an unknown stage.
    """
    if stage not in ("batch", "image", "bands"):
        raise ValueError(f"unknown stage {stage!r} of the decoder: use batch, image or bands")

    def run(images: torch.Tensor) -> torch.Tensor:
        if stage == "bands" and banded is not None:
            return banded(images)
        with kept_as(options, blocks):
            return fn(images)

    if stage == "batch":
        return run(x)
    if not torch.is_grad_enabled():
        return torch.cat([run(image) for image in x.split(1)])
    return torch.cat([checkpoint(run, image, use_reentrant=False, preserve_rng_state=False) for image in x.split(1)])


def in_chunks(
    score: Callable[..., tuple[torch.Tensor, Any]], chunk: int, images: torch.Tensor, *lists: Sequence[Any]
) -> tuple[torch.Tensor, Any]:
    """score(images [B, ...], *lists) -> (scores [B], info) over chunks of the batch, each run again to go back.

    For a score that treats each image by itself. Of the infos, tensors with one entry per image are joined; anything
    else is the mean over the chunks if it is a number, else the first chunk's.
    """
    results = []
    for k, part in enumerate(images.split(chunk)):
        arguments = (part, *(values[k * chunk : k * chunk + len(part)] for values in lists))
        if torch.is_grad_enabled():
            results.append(checkpoint(score, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            results.append(score(*arguments))
    sizes = [len(scores) for scores, _ in results]
    infos = [info for _, info in results]
    if not all(isinstance(info, Mapping) for info in infos):
        return torch.cat([scores for scores, _ in results]), infos[0]
    joined = {name: _joined([info[name] for info in infos], sizes) for name in infos[0]}
    return torch.cat([scores for scores, _ in results]), joined


def _joined(values: Sequence[Any], sizes: Sequence[int]) -> Any:
    if all(isinstance(value, torch.Tensor) and value.ndim for value in values):
        return torch.cat(list(values))
    if all(isinstance(value, int | float | torch.Tensor) for value in values):
        return sum(value * size for value, size in zip(values, sizes, strict=True)) / sum(sizes)
    return values[0]
