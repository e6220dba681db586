"""Evaluations of the denoiser without gradient, faster than one by one: compiled, recorded as CUDA graphs, or both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from alignprop_fast.models.pipeline_adapter import Conditioning
from alignprop_fast.runtime import CompiledBlocks, GraphedCalls

Predict = Callable[[torch.Tensor, torch.Tensor, Conditioning], torch.Tensor]


class FastPredict:
    """What a model's `predict` computes, where no gradient is wanted. Not tried on a GPU yet.

    model: an adapter of `models`. graphs, compiled: what does it; None: not that.
    """

    def __init__(self, model: Any, graphs: GraphedCalls | None, compiled: CompiledBlocks | None):
        self.model, self.graphs, self.compiled = model, graphs, compiled

    def for_chain(self) -> Predict:
        """`predict` for as long as no weight moves.

        Raises:
            ValueError: graphs under autocast, whose casts of the weights a graph would not make again.
        """
        if self.graphs is None:
            return self._once
        if torch.is_autocast_enabled("cuda"):
            raise ValueError("cuda_graphs does not go with autocast: train adapters on a bf16 model, or leave it out")
        graphs, weights = self.graphs, self.model.fingerprint()

        def predict(x: torch.Tensor, timestep: torch.Tensor, cond: Conditioning) -> torch.Tensor:
            names, values = zip(*cond.added.items(), strict=True) if cond.added else ((), ())

            def run(
                x: torch.Tensor, timestep: torch.Tensor, embeds: torch.Tensor, *added: torch.Tensor
            ) -> torch.Tensor:
                of_added = dict(zip(names, added, strict=True)) if names else cond.added
                return self._once(x, timestep, replace(cond, embeds=embeds, added=of_added))

            state = weights, cond.branches, cond.embedded_guidance, names
            return graphs(run, (x, timestep, cond.embeds, *values), state)

        return predict

    def _once(self, x: torch.Tensor, timestep: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        if self.compiled is None:
            return self.model.predict(x, timestep, cond)
        with self.compiled.in_place():
            return self.model.predict(x, timestep, cond)
