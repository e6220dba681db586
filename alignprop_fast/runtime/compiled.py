"""Regional compilation: torch.compile of each block separately, only for evaluations without gradient.

Experimental: not yet tried on a GPU. With gradient the compiler's partitioner, not the plan, would decide what is
kept. Blocks of one class and shape share their code, so a model of 70 equal blocks is compiled a few times, not 70.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class CompiledBlocks:
    """Inside `with blocks.in_place():` the modules' forward passes are compiled.

    backend: of torch.compile. Blocks are compiled at first use, and again for another shape or adapter setting. Above
    torch's limit of versions (`torch._dynamo.config.recompile_limit`) they run uncompiled.
    """

    def __init__(self, modules: Sequence[nn.Module], backend: str | Callable[..., Any] = "inductor"):
        self._forwards = {
            module: torch.compile(module.forward, backend=backend, fullgraph=True, dynamic=False) for module in modules
        }

    @contextmanager
    def in_place(self) -> Iterator[None]:
        for module, forward in self._forwards.items():
            module.forward = forward
        try:
            yield
        finally:
            for module in self._forwards:
                vars(module).pop("forward", None)
