"""Options of a plan, applied to modules for the length of a `with` block."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from alignprop_fast.ops.kept import first_and_again

STEP_OPTIONS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "keep": {},
    "norms": {"transformers": ("attention", "out", "qkv", "geglu")},
    "geglu": {"transformers": ("attention", "out", "qkv")},
    "qkv": {"transformers": ("attention", "out")},
    "attention": {"transformers": ("attention",)},
    "recompute": {"transformers": (), "residuals": ()},
}
"""Options of a denoising step, each named for what it gives up beside all before it, from the fastest to the leanest.

An option lists the groups of modules that run again in the backward pass, with the kinds of results (`ops.kept`) that
they keep of their first run: "norms" repeats the transformer blocks' norms alone, "geglu" also the GEGLU projection,
"qkv" also the attention's input projections; "attention" keeps of a block its input and the attention outputs, and
"recompute" of every block its input. Per token of a block of width C that is 19 C, 17 C, 9 C, 5 C, 3 C and C.
"""


@contextmanager
def step_kept_as(option: str, groups: Mapping[str, Sequence[nn.Module]]) -> Iterator[None]:
    """Inside the block the modules of a denoising step, by group, keep what the option (of `STEP_OPTIONS`) says.

    Raises:
        ValueError: an unknown option.
    """
    if option not in STEP_OPTIONS:
        raise ValueError(f"unknown option {option!r} of a step: use {', '.join(STEP_OPTIONS)}")
    with ExitStack() as stack:
        for group, kinds in STEP_OPTIONS[option].items():
            stack.enter_context(checkpointed(groups.get(group, ()), kinds))
        yield


@contextmanager
def checkpointed(modules: Sequence[nn.Module], kinds: Sequence[str] = ()) -> Iterator[None]:
    """Inside the block each module keeps its input and results of these kinds, and runs again in its backward pass.

    The modules are left as they were found: names, parameters and hooks are not touched. None may lie inside another.
    """
    found = [(module, module.__dict__.get("forward")) for module in modules]
    contexts = partial(first_and_again, kinds)
    for module in modules:
        module.forward = partial(
            checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
        )
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
