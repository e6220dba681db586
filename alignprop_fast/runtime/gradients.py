"""The gradients of one step, in the width in which a chain adds them up, and their sums."""

from collections import defaultdict
from collections.abc import Sequence

import torch


def step_gradients(y: torch.Tensor, wanted: Sequence[torch.Tensor], gy: torch.Tensor) -> list[torch.Tensor | None]:
    """Gradients of the wanted tensors in fp32 or wider, from the gradient gy of y; None for those that y lacks."""
    return widened(torch.autograd.grad(y, wanted, gy, allow_unused=True))


def widened(found: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """The gradients in fp32 or wider. Those in 16 bits are widened in one call: there are a thousand, all small."""
    narrow = {k: grad for k, grad in enumerate(found) if grad is not None and grad.dtype.itemsize < 4}
    wide = dict(enumerate(found))
    if narrow:
        grads = list(narrow.values())
        flat = grads[0].new_empty(sum(grad.numel() for grad in grads), dtype=torch.float32)
        pieces = flat.split([grad.numel() for grad in grads])
        views = [piece.view(grad.shape) for piece, grad in zip(pieces, grads, strict=True)]
        torch._foreach_copy_(views, grads)
        wide.update(zip(narrow, views, strict=True))
    return list(wide.values())


class GradientSums:
    """Sums of gradients over the steps of a chain, in fp32 or wider, because many terms in 16 bits lose the small ones.

    Parameters that fill one storage have sums that fill one, at the same places. So an optimizer that sees the storage
    as one tensor finds its gradient whole (`training.flat_parameters`).

    Attributes:
        tensors: the sum of each receiver; None before its first gradient.

    Args:
        parameters: they get the sums of the first receivers.
        count: of receivers.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], count: int):
        self.tensors: list[torch.Tensor | None] = [None] * count
        self._buffers: dict[int, torch.Tensor] = {}
        by_storage: dict[int, list[int]] = defaultdict(list)
        for k, parameter in enumerate(parameters):
            by_storage[_storage(parameter)].append(k)
        groups = [[(k, parameters[k]) for k in group] for group in by_storage.values()]
        self._placed = dict(item for group in groups if _fill_one(group) for item in group)

    def add(self, grads: Sequence[torch.Tensor | None], static: bool = False) -> None:
        """Add the gradients of one step. static: they are overwritten later, so a sum may not hold one of them."""
        found = [(k, grad) for k, grad in enumerate(grads) if grad is not None]
        added = [(total, grad) for k, grad in found if (total := self.tensors[k]) is not None]
        first = [(k, grad) for k, grad in found if self.tensors[k] is None]
        if added:
            terms = widened([grad for _, grad in added])
            torch._foreach_add_([total for total, _ in added], [term for term in terms if term is not None])
        placed = [(self._place(k), grad) for k, grad in first if k in self._placed]
        if placed:
            torch._foreach_copy_([place for place, _ in placed], [grad for _, grad in placed])
        loose = [(k, grad) for k, grad in first if k not in self._placed]
        taken: set[int] = set()
        for (k, grad), wide in zip(loose, widened([grad for _, grad in loose]), strict=True):
            # A copy, because autograd may give one tensor twice.
            copied = wide is grad and (static or grad.data_ptr() in taken)
            self.tensors[k] = grad.clone() if copied else wide
            taken.add(grad.data_ptr())

    def _place(self, k: int) -> torch.Tensor:
        """The memory of the sum of receiver k, not yet written."""
        parameter = self._placed[k]
        key = _storage(parameter)
        if key not in self._buffers:
            numbers = parameter.untyped_storage().nbytes() // parameter.itemsize
            wide = torch.promote_types(parameter.dtype, torch.float32)
            self._buffers[key] = parameter.new_empty(numbers, dtype=wide)
        place = self._buffers[key].as_strided(parameter.shape, parameter.stride(), parameter.storage_offset())
        self.tensors[k] = place
        return place


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _fill_one(group: Sequence[tuple[int, torch.Tensor]]) -> bool:
    """Whether several parameters together fill the storage that they share."""
    return len(group) > 1 and sum(p.nbytes for _, p in group) == group[0][1].untyped_storage().nbytes()
