"""Runs of equal blocks on meta tensors: the first, the second and the last one run, and the second stands for the rest.

In a run each block has the kind (`work.Call`) of the one before and takes all its results. So all but the first and
the last have the same neighbours and cost the same. A block that does not run returns the results of the one before. In
the backward pass it makes the gradients of its leaves, which are alive while earlier blocks go back.
"""

import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch

from alignprop_fast.runtime.blocks import Block


class EqualBlocks:
    """Decides, call by call, which blocks run. Each call is a `begin`, a `run` and an `end`.

    Attributes:
        stands: index of a call that did not run -> index of the call that stands for it.

    Args:
        blocks: of the network. That "blocks.4" is the last of a run shows in the kind of "blocks.5".
        leaves: tensors that get a gradient. Those of equal blocks lie at equal distances.
        kind_of: as `Work.kind_of`.
    """

    def __init__(
        self, blocks: Sequence[Block], leaves: Sequence[torch.Tensor], kind_of: Callable[[torch.nn.Module], Hashable]
    ):
        self.stands: dict[int, int] = {}
        self._kind_of = kind_of
        self._blocks = {block.name: block for block in blocks}
        self._leaves, self._places = leaves, {id(leaf): place for place, leaf in enumerate(leaves)}
        self._kind: Hashable = None
        self._read: list[list[int]] = []  # of the first two blocks of the run: the places of their leaves
        self._length = 0  # of the run
        self._inputs: list[torch.Tensor] = []
        self._results: list[weakref.ref[torch.Tensor]] = []  # of the call before
        self._passed_on: Any = None

    def begin(self, index: int, block: Block, kind: Hashable, inputs: list[torch.Tensor]) -> bool:
        """Whether the block runs."""
        results, given = [reference() for reference in self._results], {id(tensor) for tensor in inputs}
        if not results or kind != self._kind or not all(id(result) in given for result in results):
            self._length, self._read = 0, []
        self._kind, self._inputs, self._passed_on = kind, inputs, None
        if self._length > 1 and self._has_next(block):
            leaves = self._leaves_of(self._length)
            if leaves is not None:
                self.stands[index] = index - self._length + 1
                self._passed_on = _passed_on([result for result in results if result is not None], leaves)
        self._length += 1
        return self._passed_on is None

    def run(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """forward(*args, **kwargs), or the results of the call before, if this block does not run."""
        return forward(*args, **kwargs) if self._passed_on is None else self._passed_on

    def end(self, out: Any) -> None:
        """The block has returned out: a tensor or a tuple of tensors. After anything else a run ends."""
        results = out if isinstance(out, tuple) else (out,)
        are_tensors = all(isinstance(result, torch.Tensor) for result in results)
        if are_tensors and self._length < 3:
            self._read.append(sorted(self._places_read(results)))
        self._results = [weakref.ref(result) for result in results] if are_tensors else []
        self._inputs, self._passed_on = [], None

    def _has_next(self, block: Block) -> bool:
        """Whether the block after this one in the network's list has the same settings and weights."""
        path, _, number = block.name.rpartition(".")
        following = self._blocks.get(f"{path}.{int(number) + 1}") if number.isdecimal() else None
        return following is not None and self._kind_of(following.module) == self._kind_of(block.module)

    def _leaves_of(self, place: int) -> list[torch.Tensor] | None:
        """The leaves of the block at this place of the run; None if they cannot be known."""
        first, second = self._read
        distances = {two - one for one, two in zip(first, second, strict=False)}
        if len(first) != len(second) or len(distances) > 1:
            return None
        shift = (place - 1) * distances.pop() if distances else 0
        if second and second[-1] + shift >= len(self._leaves):
            return None
        like = [(self._leaves[k], self._leaves[k + shift]) for k in second]
        same = all((one.shape, one.dtype) == (other.shape, other.dtype) for one, other in like)
        return [other for _, other in like] if same else None

    def _places_read(self, results: Sequence[torch.Tensor]) -> Iterator[int]:
        """The places of the leaves between the block's inputs and its results in autograd's graph."""
        seen = {tensor.grad_fn for tensor in self._inputs if tensor.grad_fn is not None}
        nodes = [result.grad_fn for result in results if result.grad_fn is not None]
        while nodes:
            node = nodes.pop()
            if node in seen:
                continue
            seen.add(node)
            place = self._places.get(id(getattr(node, "variable", None)))
            if place is not None and not any(self._leaves[place] is tensor for tensor in self._inputs):
                yield place
            nodes += [following for following, _ in node.next_functions if following is not None]


def _passed_on(results: Sequence[torch.Tensor], leaves: Sequence[torch.Tensor]) -> Any:
    """The results, with a graph that also reaches the leaves."""
    with_graph = [result for result in results if result.requires_grad]
    passed_on = dict(zip(map(id, with_graph), _PassOn.apply(len(leaves), *leaves, *with_graph), strict=True))
    found = tuple(passed_on.get(id(result), result) for result in results)
    return found if len(found) > 1 else found[0]


class _PassOn(torch.autograd.Function):
    """Passes tensors on, and back their gradients, beside new gradients of leaves."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.leaves = tensors[:count]
        return tuple(tensor.view_as(tensor) for tensor in tensors[count:])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *(torch.empty_like(leaf) for leaf in ctx.leaves), *grads
