"""Options of a plan, applied to modules for the length of a `with` block."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def checkpointed(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Inside the block each module keeps only its input and runs again in its backward pass.

    The modules are left as they were found: names, parameters and hooks are not touched.
    """
    found = [(module, module.__dict__.get("forward")) for module in modules]
    for module in modules:
        module.forward = partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for module, own_forward in found:
            del module.forward
            if own_forward is not None:
                module.forward = own_forward


def apply_by_image(
    fn: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, option: str, modules: Sequence[nn.Module] = ()
) -> torch.Tensor:
    """fn(x) for a function that treats the images of a batch x [B, ...] alike, kept as the option says.

    keep: everything, for the whole batch. image: the input only; the backward pass runs fn again, one image at a time.
    block: as image, and within it each of `modules` is recomputed by itself.
    """
    if option == "keep" or not torch.is_grad_enabled():
        return fn(x)
    if option not in ("image", "block"):
        raise ValueError(f"unknown decoder option {option!r}: use keep, image or block")

    def one(image: torch.Tensor) -> torch.Tensor:
        with checkpointed(modules if option == "block" else ()):
            return fn(image)

    return torch.cat([checkpoint(one, image, use_reentrant=False, preserve_rng_state=False) for image in x.split(1)])
