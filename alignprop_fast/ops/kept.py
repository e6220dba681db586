"""What a segment that runs again keeps of its first run, so that its costliest results are not computed twice.

A checkpointed segment keeps its input and repeats everything in its backward pass. Inside it an op may hand its result
to `kept`: where the segment's option names that kind of result, the first run stores it, and the repetition takes it
from there while still recording its place in the graph. Between "keep everything" and "keep the input alone" this gives
every grade of selective recomputation (Korthikanti et al. 2022) at no cost for operators that do not take part.
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
    """Results of one run of one segment, first in first out. A context: inside it `kept` writes, or reads."""

    def __init__(self, kinds: Collection[str], results: deque[tuple[Any, ...]], reading: bool, move: Callable):
        self.kinds, self.results, self.reading, self.move = kinds, results, reading, move

    def __enter__(self) -> None:
        _stores.open.append(self)

    def __exit__(self, *exception: Any) -> None:
        _stores.open.remove(self)


def _as_it_is(x: torch.Tensor) -> Any:
    return x


def first_and_again(
    kinds: Collection[str],
    away: Callable[[torch.Tensor], Any] = _as_it_is,
    back: Callable[[Any], torch.Tensor] = _as_it_is,
) -> tuple[_Store, _Store]:
    """Two contexts, for the first run of a segment and for its repetition, that keep results of these kinds.

    away, back: where a result waits meanwhile, if it is to wait elsewhere.
    """
    results: deque[tuple[Any, ...]] = deque()
    return _Store(kinds, results, False, away), _Store(kinds, results, True, back)


def kept(kind: Kind | None, compute: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    """compute(), or what it returned in the segment's first run. For use inside an autograd function's forward."""
    store = _stores.open[-1] if _stores.open else None
    if store is None or kind not in store.kinds:
        return compute()
    if store.reading:
        return tuple(store.move(result) for result in store.results.popleft())
    results = compute()
    # Detached: the tensor that is returned will carry the graph, and the graph this store.
    store.results.append(tuple(store.move(result.detach()) for result in results))
    return results
