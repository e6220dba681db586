"""Denoising as a chain: what one step of a diffusion model computes in the forward and backward pass.

This module joins two halves of the package. `sampling` knows the updates but no network. `runtime` knows what is kept
for the backward pass but no diffusion.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from alignprop_fast.generate.fast_predict import FastPredict
from alignprop_fast.generate.guidance import Guidance
from alignprop_fast.models.lean.sampling_precision import SamplingPrecision
from alignprop_fast.models.pipeline_adapter import Conditioning, Generator
from alignprop_fast.planner import Options
from alignprop_fast.runtime import Block, Chain, GradientSink, version, versions
from alignprop_fast.sampling import StepTable, Update, rescaled_guidance


class DenoisingChain(Chain):
    """The denoising steps of a table, for one batch of conditioned prompts. `Chain` defines the methods.

    Args:
        model: an adapter of `models`.
        blocks: of its denoiser.
        table: coefficients of the steps.
        timesteps: [T], those of the table, on the model's device.
        cond: the denoiser's input besides latents and time.
        guidance: how its branches are combined.
        generator: draws the noise of each step; None: the global one.
        draw_noise: whether noise is drawn at each step.
        input_gradient, gradient_sink: as in `Chain`.
        compare_with_base: whether gradient steps have a penalty, the distance to the base model.
        fast: faster predictions without recording (experimental), or None.
        fast_replays: whether replays use `fast` too.
        precision: of steps without gradient in a run that has steps with gradient; None: exact.

    Raises:
        ValueError: something requires a gradient but cannot get one, or the denoiser has dropout or DoRA adapters.
    """

    def __init__(
        self,
        model: Any,
        blocks: Sequence[Block],
        table: StepTable,
        timesteps: torch.Tensor,
        cond: Conditioning,
        guidance: Guidance,
        generator: Generator,
        *,
        draw_noise: bool,
        input_gradient: bool,
        compare_with_base: bool = False,
        gradient_sink: GradientSink | None = None,
        fast: FastPredict | None = None,
        fast_replays: bool = False,
        precision: SamplingPrecision | None = None,
    ):
        conditions = _conditions(cond, guidance)
        if conditions and (compare_with_base or gradient_sink is not None):
            option = "compare_with_base" if compare_with_base else "an optimizer in the backward pass"
            raise ValueError(
                f"embeddings or guidance require a gradient, but {option} gives gradients only to the denoiser's "
                "parameters: leave one of the two out"
            )
        leaves = {id(tensor): tensor.detach().requires_grad_() for tensor in conditions}
        super().__init__(
            len(table),
            model.trainable(),
            blocks,
            gradient_sink=gradient_sink,
            input_gradient=input_gradient,
            has_penalty=compare_with_base,
            conditions=conditions,
            leaves=list(leaves.values()),
        )
        self.model, self.timesteps, self.generator, self.draw_noise = model, timesteps, generator, draw_noise
        self.guidance, self.given_cond = guidance, cond
        self.cond = cond.exchanged(leaves)
        self.scale, self.rescale = leaves.get(id(guidance.cfg_scale), guidance.cfg_scale), guidance.rescale
        # The update blends the two branches of a prediction. `predict` does it instead if guidance is not linear in
        # them or its scale learns.
        if isinstance(self.scale, torch.Tensor) or cond.branches == 1 or self.rescale > 0:
            self.combines, self.update = cond.branches == 2, Update(table, (1.0,))
        else:
            self.combines, self.update = False, Update(table, (1 - self.scale, self.scale))
        self.texts = model.text_projections(self.cond)
        # A recording would keep the graph of the conditions alive.
        self.fast = None if conditions else fast
        self.fast_replays, self.precision = fast_replays, precision
        self.fast_state = None if self.fast is None else self.fast.state()

    def last_alone(self) -> DenoisingChain:
        """A chain of only the last step, which predicts the clean latents. Gradients go to autograd, not to a sink."""
        return DenoisingChain(
            self.model,
            self.blocks,
            self.update.table.last_alone(),
            self.timesteps[-1:],
            self.given_cond,
            self.guidance,
            None,
            draw_noise=self.draw_noise,
            input_gradient=True,
            compare_with_base=self.has_penalty,
            fast=self.fast,
            fast_replays=self.fast_replays,
            precision=self.precision,
        )

    def predict(self, i: int, x: torch.Tensor) -> torch.Tensor:
        """The denoiser's output: [K * B, C, h, w], unconditional branch first; or already guided, [B, C, h, w]."""
        with self.texts.in_place():
            return self._predict(i, x)

    def _predict(self, i: int, x: torch.Tensor) -> torch.Tensor:
        return self._guided(self.model.predict(self.update.model_input(i, x), self.timesteps[i], self.cond))

    def sample(self, i: int, x: torch.Tensor) -> torch.Tensor:
        precision = self.precision if self.precision is not None and self.precision.is_in_place else None
        if self.fast is None or (precision is not None and not precision.in_graphs):
            return self.predict(i, x)
        name = "exact" if precision is None else precision.name
        seen, timestep = self.update.model_input(i, x), self.timesteps[i]
        return self._guided(self.fast.sample(seen, timestep, self.cond, self.fast_state, name))

    @property
    def approximates(self) -> bool:
        return self.precision is not None

    def approximation(self) -> AbstractContextManager[None]:
        return nullcontext() if self.precision is None else self.precision.in_place()

    def replay(self, i: int, x: torch.Tensor, options: Options) -> torch.Tensor:
        if self.fast is None or not self.fast_replays:
            return self.predict(i, x)
        kept = tuple(sorted(options.items()))
        seen, timestep = self.update.model_input(i, x), self.timesteps[i]
        return self._guided(self.fast.replay(seen, timestep, self.cond, self.fast_state, self.parameters, kept))

    def _guided(self, y: torch.Tensor) -> torch.Tensor:
        return rescaled_guidance(y, self.scale, self.rescale) if self.combines else y

    def advance(self, i: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The scheduler's update, with noise in the shape of the latents if the chain draws noise."""
        noise = self.model.noise(self.update.latents(x), self.generator) if self.draw_noise else None
        return self.update.advance(i, x, y, noise)

    def adjoint(self, i: int, g: torch.Tensor, y_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return self.update.adjoint(i, g, y_dtype)

    def penalty(self, i: int, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean squared difference between the guided predictions of the model and of the base model.

        Source: the regulariser of DPOK (Fan et al. 2023), up to the weights of the steps. Two Gaussian kernels of one
        step with means a x + b y and a x + b y' and deviation sigma > 0 have KL divergence
        b^2 |y - y'|^2 / (2 sigma^2). The base model is the model with its learning adapters off, not a second copy.
        """
        with torch.inference_mode(), self.model.adapters_off():
            base = self._predict(i, x)  # the texts' projections are those with adapters
        wide = torch.promote_types(y.dtype, torch.float32)
        delta = self.update.blended(y.to(wide) - base.to(wide))
        return delta.square().mean(), self.update.blended_adjoint(2 / delta.numel() * delta)

    def start(self, x: torch.Tensor) -> torch.Tensor:
        return self.update.start(x)

    def finish(self, x: torch.Tensor) -> torch.Tensor:
        return self.update.latents(x)

    def state(self) -> Hashable:
        read = [*self.cond.tensors(), *self.leaves]
        return versions([self.model.denoiser]), self.model.settings(), tuple(map(version, read))


def _conditions(cond: Conditioning, guidance: Guidance) -> list[torch.Tensor]:
    """The denoiser's inputs that require a gradient, other than latents and its own parameters."""
    scale = guidance.cfg_scale
    read = [*cond.tensors(), *([scale] if isinstance(scale, torch.Tensor) else ())]
    found = {id(tensor): tensor for tensor in read if tensor.requires_grad}.values()
    return list(found) if torch.is_grad_enabled() else []
