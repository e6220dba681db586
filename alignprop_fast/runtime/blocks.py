"""Blocks of a network, and the options of a plan, which apply to them inside a `with` block."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from alignprop_fast.ops.reuse import checkpoint_contexts
from alignprop_fast.planner import GRADES, BlockOption, Options, option_of
from alignprop_fast.runtime.offload import Offloader

KEPT: Mapping[BlockOption, Mapping[str, tuple[str, ...]]] = {
    BlockOption.KEEP: {},
    BlockOption.NORMS: {"transformers": ("attention", "out", "qkv", "geglu")},
    BlockOption.GEGLU: {"transformers": ("attention", "out", "qkv")},
    BlockOption.QKV: {"transformers": ("attention", "out")},
    BlockOption.ATTENTION: {"transformers": ("attention",)},
    BlockOption.RECOMPUTE: {"transformers": (), "residuals": (), "decoder": ()},
}
"""The results that a recomputed block keeps from its first run, by grade and group.

Results are named by kind (`ops.reuse`); a group without an entry keeps everything. "norms" repeats only the norms of
transformer blocks, "geglu" also the GEGLU projection, "qkv" also the attention's input projections. "attention" keeps
a block's input and the attention outputs, "recompute" only its input. Per token of a transformer block of width C, the
grades keep 19 C, 17 C, 9 C, 5 C, 3 C and C.
"""


@dataclass(frozen=True)
class Block:
    """A module that can be kept or recomputed separately, and its group in `KEPT`."""

    name: str
    module: nn.Module
    group: str

    def grades(self) -> list[BlockOption]:
        """The grades that differ for this block, the leanest first."""
        return [grade for grade in GRADES if grade is BlockOption.KEEP or self.group in KEPT[grade]][::-1]


def blocks_of(root: nn.Module, groups: Mapping[str, Sequence[nn.Module]]) -> list[Block]:
    """The modules of each group as blocks, with their names in root."""
    names = {module: name for name, module in root.named_modules()}
    return [Block(names[module], module, group) for group, modules in groups.items() for module in modules]


@contextmanager
def apply_options(options: Options, blocks: Sequence[Block], offloader: Offloader | None = None) -> Iterator[None]:
    """Inside the `with` block each of `blocks` keeps what its option says; a block without an option keeps everything.

    options: option by name of a block, or "*" for all. Names, parameters and hooks of the modules are not touched. No
    block may be inside another.
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


def _forward(block: Block, option: BlockOption, offloader: Offloader | None) -> Callable[..., Any] | None:
    """The block's forward under the option; None for the original, which keeps everything."""
    kinds, own = KEPT[option.grade].get(block.group), block.module.forward
    if not option.offload or offloader is None:
        return None if kinds is None else _checkpointed(own, kinds)
    return offloader.offloaded(block.module, lambda move: _checkpointed(own, kinds, *move))


def _checkpointed(
    forward: Callable[..., Any], kinds: Sequence[str] | None, *move: Callable[..., Any]
) -> Callable[..., Any]:
    """forward, recomputed in its backward pass except for the kinds of results that it keeps (None: everything)."""
    if kinds is None:
        return forward
    contexts = partial(checkpoint_contexts, kinds, *move)
    return partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
