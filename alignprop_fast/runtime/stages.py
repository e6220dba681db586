"""Stages of a plan: the decoder on all images, one image or bands at a time; the reward on the batch or in chunks."""

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
    """fn(x), run in the given stage, for a function that treats each image of a batch x [B, ...] separately.

    batch: all images at once. image: only the input is kept, and the backward pass runs fn again, one image at a time.
    bands: as image, with `banded`, which computes fn in less memory. In the first two each of `blocks` keeps what its
    option says.

    Raises:
        ValueError: the stage is unknown.
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
    """score(images [B, ...], *lists) -> (scores [B], info) in chunks of the batch; the backward pass runs each again.

    For a score that treats each image separately. In the infos, tensors with one entry per image are joined. A number
    is the mean over the chunks, anything else is the first chunk's.
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
