"""Evaluations of the denoiser faster than launched one by one: compiled, recorded as CUDA graphs, or both."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

import torch

from alignprop_fast.models.pipeline_adapter import Conditioning
from alignprop_fast.runtime import CompiledBlocks, GraphedCalls

Predict = Callable[[torch.Tensor, torch.Tensor, Conditioning], torch.Tensor]


class FastPredict:
    """What a model's `predict` computes; compiled only where no gradient is wanted. Not tried on a real GPU yet.

    model: an adapter of `models`. graphs, compiled: what does it; None: not that.
    """

    def __init__(self, model: Any, graphs: GraphedCalls | None, compiled: CompiledBlocks | None):
        self.model, self.graphs, self.compiled = model, graphs, compiled

    def for_chain(self) -> Predict:
        """`predict` without gradient, for as long as no weight moves.

        Raises:
            ValueError: graphs under autocast, whose casts of the weights a graph would not make again.
        """
        if self.graphs is None:
            return self._once
        graphs, state = self.graphs, self._state()

        def predict(x: torch.Tensor, timestep: torch.Tensor, cond: Conditioning) -> torch.Tensor:
            run, inputs, own = _as_function(self._once, x, timestep, cond)
            return graphs(run, inputs, (state, own))

        return predict

    def for_replays(self, how: Hashable) -> Predict | None:
        """`predict` with gradient, recorded forward and back, for as long as no weight moves; None without graphs.

        how: what the blocks keep for the backward pass at the time of the call.

        Raises:
            ValueError: as `for_chain`.
        """
        if self.graphs is None:
            return None
        graphs, state, parameters = self.graphs, self._state(), self.model.trainable()

        def predict(x: torch.Tensor, timestep: torch.Tensor, cond: Conditioning) -> torch.Tensor:
            run, inputs, own = _as_function(self.model.predict, x, timestep, cond)
            return graphs.with_gradient(run, inputs, parameters, (state, own), how)

        return predict

    def _state(self) -> Hashable:
        if torch.is_autocast_enabled("cuda"):
            raise ValueError("cuda_graphs does not go with autocast: train adapters on a bf16 model, or leave it out")
        return self.model.fingerprint()

    def _once(self, x: torch.Tensor, timestep: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        if self.compiled is None:
            return self.model.predict(x, timestep, cond)
        with self.compiled.in_place():
            return self.model.predict(x, timestep, cond)


def _as_function(
    predict: Predict, x: torch.Tensor, timestep: torch.Tensor, cond: Conditioning
) -> tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...], Hashable]:
    """predict(x, timestep, cond) as a function of tensors, those tensors, and what else it depends on."""
    names, values = zip(*cond.added.items(), strict=True) if cond.added else ((), ())

    def run(x: torch.Tensor, timestep: torch.Tensor, embeds: torch.Tensor, *added: torch.Tensor) -> torch.Tensor:
        of_added = dict(zip(names, added, strict=True)) if names else cond.added
        return predict(x, timestep, replace(cond, embeds=embeds, added=of_added))

    return run, (x, timestep, cond.embeds, *values), (cond.branches, cond.embedded_guidance, names)
