"""Faster runs of the denoiser: compiled, recorded as CUDA graphs, or both."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from alignprop_fast.models.conditioning import Conditioning
from alignprop_fast.models.lean.text_projections import TextProjections
from alignprop_fast.runtime import CompiledBlocks, GraphedCalls, step_gradients

CUDA_GRAPHS = ("auto", "on", "off")
Predict = Callable[[torch.Tensor, torch.Tensor, Conditioning], torch.Tensor]
Guide = Callable[[torch.Tensor], torch.Tensor]


class FastPredict:
    """Faster forms of a model's `predict`. Compiled blocks run only in predictions without gradient.

    Args:
        model: an adapter of `models`.
        graphs: records predictions as CUDA graphs; None: kernels are launched one by one.
        compiled: runs the blocks through torch.compile, whose results differ by rounding; None: blocks are not
            compiled.
        by_order: whether graphs are used even if they measure no faster.

    Attributes:
        compiled_pays: whether compiled blocks are used.
    """

    def __init__(
        self, model: Any, graphs: GraphedCalls | None, compiled: CompiledBlocks | None, by_order: bool = False
    ):
        self.model, self.graphs, self.compiled = model, graphs, compiled
        self.by_order, self.compiled_pays = by_order, True

    @classmethod
    def wanted(cls, model: Any, cuda_graphs: str, compiled: bool) -> FastPredict | None:
        """From the options of a sampler; None if all are off.

        Raises:
            ValueError: cuda_graphs is none of auto, on and off, or an option needs a GPU and the model is on the CPU.
        """
        if cuda_graphs not in CUDA_GRAPHS:
            raise ValueError(f"cuda_graphs is {cuda_graphs!r}: use {', '.join(CUDA_GRAPHS)}")
        for name, asked in (("cuda_graphs", cuda_graphs == "on"), ("compiled", compiled)):
            if asked and model.device.type == "cpu":
                raise ValueError(f"{name} needs a GPU, but the model is on the CPU: leave it out")
        graphs = None if cuda_graphs == "off" or model.device.type == "cpu" else GraphedCalls()
        if graphs is None and not compiled:
            return None
        blocks = CompiledBlocks(model.step_groups()["transformers"]) if compiled else None
        return cls(model, graphs, blocks, by_order=cuda_graphs == "on")

    def state(self) -> Hashable:
        """The state for which a recording is valid: addresses of weights, and settings. Pass it to all calls.

        None: nothing is recorded. Under autocast that is so because it casts weights, which a graph would not repeat.
        """
        if self.graphs is None or torch.is_autocast_enabled("cuda"):
            return None
        kernels = torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.matmul.allow_tf32
        return self.model.fingerprint(), kernels

    def sample(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        cond: Conditioning,
        texts: TextProjections,
        state: Hashable = None,
        precision: str = "exact",
    ) -> torch.Tensor:
        """`predict` without gradient, as a recording if there is a state. The result holds until the next call.

        texts: the projections of cond's text, which the caller has in place. precision: the one that the caller has in
        place; each has its own recording.
        """
        if self.graphs is not None and state is not None:
            tensors = [*cond.tensors(), *texts.tensors()]
            run = partial(_sample, self._compiled, _StandIns(cond, texts, list(map(id, tensors))))
            kind = "sample", precision, self.compiled_pays, cond.branches, cond.extent
            found = self.graphs(run, (x, timestep, *tensors), (state, cond.settings()), kind)
            if found is not None and found[0] is not None:
                return found[0]
        return self._compiled(x, timestep, cond)

    def gradients(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        cond: Conditioning,
        texts: TextProjections,
        guide: Guide,
        gy: torch.Tensor,
        parameters: Sequence[torch.Tensor],
        state: Hashable,
        kind: Hashable,
    ) -> Sequence[torch.Tensor | None] | None:
        """Gradients of the parameters and, if x requires one, of x, from the gradient gy of guide(predict(x)).

        Forward and backward pass are one recording, so what the backward pass needs never leaves it. The results hold
        until the next call. None: there is no memory for the recording.

        texts: the projections of cond's text. kind: what guide does, and what the blocks now keep for the backward
        pass; each has its own recording.
        """
        assert self.graphs is not None
        tensors, wants_gx = [*cond.tensors(), *texts.tensors()], x.requires_grad
        stand_ins = _StandIns(cond, texts, list(map(id, tensors)))
        run = partial(_gradients, self.model.predict, stand_ins, guide, parameters, wants_gx)
        # The gradient is last: both kinds of recording have the others at the same places, and share their memory.
        inputs = (x.detach(), timestep, *tensors, gy)
        whole_kind = "gradients", kind, wants_gx, cond.branches, cond.extent
        return self.graphs(run, inputs, (state, cond.settings()), whole_kind)

    def forget_recordings(self) -> None:
        """Free the memory of all recordings; they are made again when needed."""
        if self.graphs is not None:
            self.graphs = GraphedCalls()

    def _compiled(self, x: torch.Tensor, timestep: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        if self.compiled is None or not self.compiled_pays:
            return self.model.predict(x, timestep, cond)
        with self.compiled.in_place():
            return self.model.predict(x, timestep, cond)


@dataclass(frozen=True)
class _StandIns:
    """Runs a prediction with static tensors in the place of a chain's own, whose ids are `ids`."""

    cond: Conditioning
    texts: TextProjections
    ids: Sequence[int]

    def predict(
        self, predict: Predict, x: torch.Tensor, timestep: torch.Tensor, tensors: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        others = dict(zip(self.ids, tensors, strict=True))
        with self.texts.exchanged(others).in_place():
            return predict(x, timestep, self.cond.exchanged(others))


# The recorded functions.


@torch.inference_mode()
def _sample(
    predict: Predict, stand_ins: _StandIns, x: torch.Tensor, timestep: torch.Tensor, *tensors: torch.Tensor
) -> tuple[torch.Tensor]:
    return (stand_ins.predict(predict, x, timestep, tensors),)


@torch.enable_grad()
def _gradients(
    predict: Predict,
    stand_ins: _StandIns,
    guide: Guide,
    parameters: Sequence[torch.Tensor],
    wants_gx: bool,
    x: torch.Tensor,
    timestep: torch.Tensor,
    *tensors_and_gy: torch.Tensor,
) -> tuple[torch.Tensor | None, ...]:
    *tensors, gy = tensors_and_gy
    x = x.detach().requires_grad_(wants_gx)
    y = guide(stand_ins.predict(predict, x, timestep, tensors))
    wanted = [*parameters, x] if wants_gx else parameters
    return tuple(step_gradients(y, wanted, gy))
