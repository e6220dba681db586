"""Stages of a plan: the decoder all at once, by image or by bands; the reward all at once or by chunks of the batch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from alignprop_fast.planner import Options
from alignprop_fast.runtime.blocks import Block, apply_options


def run_decoder_stage(
    fn: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    stage: str,
    options: Options,
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
        with apply_options(options, blocks):
            return fn(images)

    if stage == "batch":
        return run(x)
    if not torch.is_grad_enabled():
        return torch.cat([run(image) for image in x.split(1)])
    return torch.cat([checkpoint(run, image, use_reentrant=False, preserve_rng_state=False) for image in x.split(1)])


def score_in_chunks(
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
