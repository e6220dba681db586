"""Faster predictions of the denoiser: compiled, recorded as CUDA graphs, or both.

Experimental: tested on an emulated GPU, not yet measured on a real one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from alignprop_fast.models.pipeline_adapter import Conditioning
from alignprop_fast.runtime import CompiledBlocks, GraphedCalls

Predict = Callable[[torch.Tensor, torch.Tensor, Conditioning], torch.Tensor]


class FastPredict:
    """A faster form of a model's `predict`. Compiled blocks run only in predictions without gradient.

    Args:
        model: an adapter of `models`.
        graphs: records predictions as CUDA graphs; None: kernels are launched one by one.
        compiled: runs the blocks through torch.compile, whose results differ by rounding; None: blocks are not
        compiled.
    """

    def __init__(self, model: Any, graphs: GraphedCalls | None, compiled: CompiledBlocks | None):
        self.model, self.graphs, self.compiled = model, graphs, compiled

    @classmethod
    def wanted(cls, model: Any, cuda_graphs: bool, compiled: bool) -> FastPredict | None:
        """From the options of a sampler; None if both are off.

        Raises:
            ValueError: one is on, but the model is on the CPU.
        """
        for name, on in (("cuda_graphs", cuda_graphs), ("compiled", compiled)):
            if on and model.device.type == "cpu":
                raise ValueError(f"{name} needs a GPU, but the model is on the CPU: leave it out")
        if not cuda_graphs and not compiled:
            return None
        blocks = CompiledBlocks(model.step_groups()["transformers"]) if compiled else None
        return cls(model, GraphedCalls() if cuda_graphs else None, blocks)

    def state(self) -> Hashable:
        """The state for which a recording is valid: addresses of weights, settings of adapters. Pass it to both calls.

        Raises:
            ValueError: graphs are on under autocast, which casts weights; a graph would not cast them again.
        """
        if self.graphs is None:
            return None
        if torch.is_autocast_enabled("cuda"):
            raise ValueError("cuda_graphs does not support autocast: train adapters on a bf16 model, or leave it out")
        return self.model.fingerprint()

    def sample(
        self, x: torch.Tensor, timestep: torch.Tensor, cond: Conditioning, state: Hashable, precision: str
    ) -> torch.Tensor:
        """`predict` without gradient. The result holds until the next call.

        precision: the one that the caller has in place; each has its own recording.
        """
        if self.graphs is None:
            return self._compiled(x, timestep, cond)
        run, inputs, own = _as_function(self._compiled, x, timestep, cond)
        return self.graphs(run, inputs, (state, own), precision)

    def replay(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        cond: Conditioning,
        state: Hashable,
        parameters: Sequence[torch.Tensor],
        kept: Hashable,
    ) -> torch.Tensor:
        """`predict` with gradient for x, if it requires one, and for the parameters; both passes are recorded.

        kept: what the blocks now keep for the backward pass; each value has its own recording.
        """
        if self.graphs is None:
            return self.model.predict(x, timestep, cond)
        run, inputs, own = _as_function(self.model.predict, x, timestep, cond)
        return self.graphs.with_gradient(run, inputs, parameters, (state, own), kept)

    def forget_recordings(self) -> None:
        """Free the memory of all recordings; they are made again when needed."""
        if self.graphs is not None:
            self.graphs = GraphedCalls()

    def _compiled(self, x: torch.Tensor, timestep: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        if self.compiled is None:
            return self.model.predict(x, timestep, cond)
        with self.compiled.in_place():
            return self.model.predict(x, timestep, cond)


def _as_function(
    predict: Predict, x: torch.Tensor, timestep: torch.Tensor, cond: Conditioning
) -> tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...], Hashable]:
    """predict(x, timestep, cond) as a function of tensors, those tensors, and everything else that it depends on."""
    names, values = zip(*cond.added.items(), strict=True) if cond.added else ((), ())
    run = partial(_predict_from_tensors, predict, cond, names)
    return run, (x, timestep, cond.embeds, *values), (cond.branches, cond.embedded_guidance, names)


def _predict_from_tensors(
    predict: Predict,
    cond: Conditioning,
    names: Sequence[str],
    x: torch.Tensor,
    timestep: torch.Tensor,
    embeds: torch.Tensor,
    *added: torch.Tensor,
) -> torch.Tensor:
    """predict(x, timestep, cond) with these embeddings, and these added conditions by name, in place of cond's own."""
    of_added = dict(zip(names, added, strict=True)) if names else cond.added
    return predict(x, timestep, replace(cond, embeds=embeds, added=of_added))
