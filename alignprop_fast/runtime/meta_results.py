"""Remembers results of operators on meta tensors. PyTorch computes their shapes in Python, in about a millisecond per
operator, and a plan needs those of one block a dozen times.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from alignprop_fast.planner import Operator

_Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]
# Not `list | tuple`, which Python would build anew at each of a million uses.
SEQUENCES = (list, tuple)
_TENSORS = (torch.Tensor, torch.nn.Parameter)
# The type of the result and the layout of each tensor in it. An empty list means the first argument itself.
_Result = tuple[type, list[_Layout | None]]


@dataclass
class Known:
    """What is known of an operator on tensors of certain layouts with certain numbers.

    result: None: it must run. allocates: whether its result may have a storage that is not an argument's.
    counted: once somebody has counted it, what it computes and moves; None if it takes no time.
    """

    result: _Result | None
    allocates: bool = True
    counted: Operator | None = None
    is_counted: bool = False


_known: dict[Hashable, Known] | None = None


@contextmanager
def remembered_results() -> Iterator[None]:
    """Inside, `meta_result` remembers; at the end everything is forgotten."""
    global _known
    _known = {}
    try:
        yield
    finally:
        _known = None


def meta_result(func: Any, args: Any, kwargs: Any) -> tuple[Any, list[torch.Tensor] | None, Known | None]:
    """func(*args, **kwargs), the tensors of the result that are new (None: unknown), and what is known of the operator.

    Inside `remembered_results`, an operator on meta tensors runs once for tensors of the same layouts with the same
    numbers. It always runs if it returns a view, or changes a layout or a storage.
    """
    if _known is None:
        return func(*args, **kwargs), None, None
    key = _key(func, args, kwargs)
    known = _known.get(key)
    if known is not None and known.result is not None:
        kind, layouts = known.result
        if not layouts:
            return args[0], [], known
        made = [None if layout is None else _made(*layout) for layout in layouts]
        out = made[0] if kind is torch.Tensor else kind(made)
        return out, [tensor for tensor in made if tensor is not None], known
    out = func(*args, **kwargs)
    if known is not None:
        return out, None if known.allocates else [], known
    inputs = tensors_in(args, kwargs)
    if inputs and all(tensor.is_meta for tensor in inputs):
        # The tag is on set_, resize_ and their like, whose effect the layouts may not show.
        lasting = torch.Tag.inplace_view not in func.tags and key == _key(func, args, kwargs)
        known = _known[key] = Known(_described(func, args, out, inputs)) if lasting else Known(None)
        known.allocates = not lasting or bool(new_among(out, inputs))
    return out, None, known


@cache
def returns_views(func: Any) -> bool:
    """Whether all results of the operator are views of its arguments, or may be."""
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


@cache
def is_view(func: Any) -> bool:
    """Whether all results of the operator are always views. (A composite one, such as reshape, may copy.)"""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return returns_views(func) and not func.has_kernel_for_dispatch_key(key)


def new_among(out: Any, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors of a result whose storages are not those of the inputs."""
    taken = {id(tensor.untyped_storage()) for tensor in inputs}
    return [tensor for tensor in tensors_in(out) if id(tensor.untyped_storage()) not in taken]


def tensors_in(*trees: Any) -> list[torch.Tensor]:
    """The tensors among an operator's arguments or results. It handles only lists and dictionaries, as operators have,
    so it is several times faster than PyTorch's own walk."""
    found: list[torch.Tensor] = []
    for tree in trees:
        if isinstance(tree, torch.Tensor):
            found.append(tree)
        elif isinstance(tree, SEQUENCES):
            found += tensors_in(*tree)
        elif isinstance(tree, dict):
            found += tensors_in(*tree.values())
    return found


def _key(func: Any, args: Any, kwargs: Any) -> Hashable:
    """All that the layout of the result depends on."""
    return func, torch.get_default_dtype(), _signature(args), _signature(kwargs) if kwargs else None


def _signature(value: Any) -> Hashable:
    """Layouts of tensors, and numbers with their types: 1, 1.0 and True are equal but give different dtypes."""
    kind = type(value)
    if kind in _TENSORS:
        return value.shape, value.stride(), value.dtype, value.is_meta
    if value is None or kind is int:
        return value
    if kind in SEQUENCES:
        return tuple([_signature(item) for item in value])
    if isinstance(value, torch.Tensor):
        return kind, value.shape, value.stride(), value.dtype, value.is_meta
    if isinstance(value, SEQUENCES):
        return tuple([_signature(item) for item in value])
    if isinstance(value, dict):
        return tuple([(name, _signature(item)) for name, item in value.items()])
    return kind, value if value == value else "nan"


def _made(size: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device="meta")


def _described(func: Any, args: Any, out: Any, inputs: list[torch.Tensor]) -> _Result | None:
    """The data to make the result again; None unless it consists of new tensors or is the first argument."""
    if type(out) not in (torch.Tensor, tuple, list):
        return None
    if args and out is args[0]:
        return type(out), []
    layouts: list[_Layout | None] = []
    taken = {t.untyped_storage()._cdata for t in inputs}
    for result in [out] if type(out) is torch.Tensor else out:
        if result is None:
            layouts.append(None)
            continue
        if type(result) is not torch.Tensor or not result.is_meta or func._schema.is_mutable:
            return None
        layout, storage = (result.shape, result.stride(), result.dtype), result.untyped_storage()
        if storage._cdata in taken or storage.nbytes() != _made(*layout).untyped_storage().nbytes():
            return None
        taken.add(storage._cdata)
        layouts.append(layout)
    return type(out), layouts
