"""Results that a checkpointed block keeps of its first run, so that its costliest operators do not run twice.

A checkpointed block keeps its input and runs again in its backward pass. An op inside it computes its result through
`reuse_or_compute`. Where the block's option names that kind of result, the first run stores it. The second run takes
the stored one and only records the op in autograd's graph. This gives every grade of selective recomputation
(Korthikanti et al. 2022) between "keep everything" and "keep the input alone". Other operators pay nothing for it.
"""

import threading
from collections import deque
from collections.abc import Callable, Collection
from typing import Any, Literal

import torch

Kind = Literal["attention", "out", "qkv", "geglu"]
"""attention: output and logsumexp; out: output projections; qkv: their inputs' projections; geglu: its projection."""


class _Stores(threading.local):
    """The stores that are open in this thread: the backward pass of a GPU runs in a thread of its own."""

    def __init__(self) -> None:
        self.open: list[_Store] = []


_stores = _Stores()


class _Store:
    """Results of one run of one block, first in first out. A context: `reuse_or_compute` writes to it, or reads."""

    def __init__(self, kinds: Collection[str], results: deque[tuple[Any, ...]], reading: bool, move: Callable):
        self.kinds, self.results, self.reading, self.move = kinds, results, reading, move

    def __enter__(self) -> None:
        _stores.open.append(self)

    def __exit__(self, *exception: Any) -> None:
        _stores.open.remove(self)


def _as_it_is(x: torch.Tensor) -> Any:
    return x


def checkpoint_contexts(
    kinds: Collection[str],
    away: Callable[[torch.Tensor], Any] = _as_it_is,
    back: Callable[[Any], torch.Tensor] = _as_it_is,
) -> tuple[_Store, _Store]:
    """The contexts of a checkpointed block's first and second run: the second reuses results of these kinds.

    For `context_fn` of `torch.utils.checkpoint.checkpoint`.

    away, back: move a result to where it waits, and back from there. By default it stays where it is.
    """
    results: deque[tuple[Any, ...]] = deque()
    return _Store(kinds, results, False, away), _Store(kinds, results, True, back)


def reuse_or_compute(
    kind: Kind | None, compute: Callable[..., tuple[torch.Tensor, ...]], *arguments: Any
) -> tuple[torch.Tensor, ...]:
    """compute(*arguments), or what it returned in the block's first run. For use inside an autograd function's forward.

    kind: of the result; None: it is always computed.
    """
    store = _stores.open[-1] if kind is not None and _stores.open else None
    if store is None or kind not in store.kinds:
        return compute(*arguments)
    if store.reading:
        return tuple(store.move(result) for result in store.results.popleft())
    results = compute(*arguments)
    # Detached: the tensor that is returned will carry the graph, and the graph this store.
    store.results.append(tuple(store.move(result.detach()) for result in results))
    return results
