"""Adapters as views into one flat parameter, so that an optimizer sees one large tensor in place of many small ones.

Why: bitsandbytes keeps tensors under 4096 elements in 32 bit, and an adapter of rank 4 on 320 channels has 1280; one
tensor is also one launch, one reduction over processes and one norm.

Gradients of bf16 adapters are held in fp32 (torch's `grad_dtype`): a chain's sums over its steps arrive unrounded, and
those of many micro-batches add up without losing bits. While gradients accumulate this is 2 bytes more per parameter.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

import torch
from torch import nn


class FlatParameters:
    """Trainable parameters, laid end to end in one flat parameter for each dtype and device.

    Nothing changes for their modules: the parameters are the same objects, with the same names, shapes and strides, and
    their data are now views. A chain sums their gradients in memory of the same layout (`runtime.gradients`), which
    becomes the flat gradient as it is. No buffer lives all the time: it would lie beside the chain's sums at the peak.

    Attributes:
        parameters: the parameters, as given.
        tensors: what the optimizer steps: one flat parameter [N] for each dtype and device; without `merge` the
            parameters themselves.

    Args:
        parameters: dense tensors (any memory format).
        merge: lay them together. Not worth it for a whole model, which it would hold twice for a moment.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], merge: bool = True):
        self.parameters = list(parameters)
        groups: dict[tuple, list[nn.Parameter]] = {}
        for parameter in self.parameters:
            groups.setdefault((parameter.dtype, parameter.device), []).append(parameter)
        self._merged = [(_lay_together(group), group) for group in groups.values()] if merge else []
        self.tensors = [flat for flat, _ in self._merged] if merge else self.parameters
        for tensor in (*self.parameters, *self.tensors):
            tensor.grad_dtype = torch.promote_types(tensor.dtype, torch.float32)

    @torch.no_grad()
    def join_gradients(self) -> None:
        """Give `tensors` their gradients, of which the parameters' are then views.

        A parameter without a gradient gets zeros. Gradients that do not lie as the parameters do are copied.

        Raises:
            ValueError: a parameter is no view any more, so that the optimizer would step something else.
        """
        for flat, group in self._merged:
            if any(_storage(parameter) != _storage(flat) for parameter in group):
                raise ValueError(
                    "the adapters were moved or cast after the trainer was made: place and load the model first"
                )
            whole = _whole(group)
            if whole is None:
                whole = torch.zeros_like(flat, dtype=flat.grad_dtype)
                views = [_view(whole, parameter, int(parameter.storage_offset())) for parameter in group]
                learned = [(view, p.grad) for view, p in zip(views, group, strict=True) if p.grad is not None]
                if learned:
                    torch._foreach_copy_([view for view, _ in learned], [grad for _, grad in learned])
                for view, parameter in zip(views, group, strict=True):
                    parameter.grad = view
            flat.grad = whole

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for tensor in (*self.parameters, *self.tensors):
            tensor.grad = None


def _lay_together(group: list[nn.Parameter]) -> nn.Parameter:
    first = group[0]
    flat = torch.empty(sum(p.numel() for p in group), dtype=first.dtype, device=first.device)
    for parameter, offset in zip(group, accumulate([0, *(p.numel() for p in group[:-1])]), strict=True):
        view = _view(flat, parameter, offset)
        view.copy_(parameter.detach())
        parameter.data = view
    return nn.Parameter(flat)


def _whole(group: list[nn.Parameter]) -> torch.Tensor | None:
    """All gradients of the group as one, if they lie end to end as their parameters do."""
    first = group[0].grad
    for parameter in group:
        grad = parameter.grad
        if first is None or grad is None or _storage(grad) != _storage(first) or grad.dtype != first.dtype:
            return None
        if (grad.storage_offset(), grad.stride()) != (parameter.storage_offset(), parameter.stride()):
            return None
    return None if first is None else first.as_strided((sum(p.numel() for p in group),), (1,))


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _view(flat: torch.Tensor, parameter: nn.Parameter, offset: int) -> torch.Tensor:
    return flat.as_strided(parameter.size(), parameter.stride(), offset)
