"""Denoising as a chain: what one step of a diffusion model computes in the forward and backward pass.

This module joins two halves of the package. `sampling` knows the updates but no network. `runtime` knows what is kept
for the backward pass but no diffusion.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from functools import partial
from typing import Any

import torch

from alignprop_fast.generate.fast_predict import FastPredict
from alignprop_fast.generate.guidance import Guidance, Scale
from alignprop_fast.generate.guided_updates import GuidedUpdates
from alignprop_fast.models.conditioning import Conditioning
from alignprop_fast.models.lean.sampling_precision import SamplingPrecision
from alignprop_fast.models.lora.learning import learning_adapters_off
from alignprop_fast.models.pipeline_adapter import Generator
from alignprop_fast.planner import Options
from alignprop_fast.runtime import Block, Chain, GradientSink, autocast_dtype, version, versions
from alignprop_fast.sampling import Leaps, StepTable, Truncation


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
        truncation: its gates and leaps; None: the chain's gates have weight 1.
        shift: what is added to the last latents.
        gradient_sink: as in `Chain`.
        compare_with_base: whether gradient steps have a penalty, the distance to the base model.
        fast: faster predictions, or None.
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
        truncation: Truncation | None = None,
        shift: torch.Tensor | None = None,
        compare_with_base: bool = False,
        gradient_sink: GradientSink | None = None,
        fast: FastPredict | None = None,
        precision: SamplingPrecision | None = None,
    ):
        scale = guidance.cfg_scale
        conditions = _conditions(cond, scale)
        if conditions and compare_with_base:
            raise _no_gradient_for_conditions("compare_with_base")
        if conditions and gradient_sink is not None:
            raise _no_gradient_for_conditions("an optimizer in the backward pass")
        leaves = {id(tensor): tensor.detach().requires_grad_() for tensor in conditions}
        parameters = model.trainable()
        # Autocast casts the adapters itself.
        self.copies = None if autocast_dtype(model.device) else model.adapter_copies()
        super().__init__(
            len(table),
            parameters,
            blocks,
            gradient_sink=gradient_sink,
            has_penalty=compare_with_base,
            stand_ins=None if self.copies is None else self.copies.stand_ins(parameters),
            conditions=conditions,
            leaves=list(leaves.values()),
        )
        self.model, self.table, self.timesteps, self.generator = model, table, timesteps, generator
        self.draw_noise, self.shift, self.precision = draw_noise, shift, precision
        self._refreshed = False  # whether `precision` knows the adapters of this chain
        self.gates = {} if truncation is None else {gate.step: gate for gate in truncation.gates}
        self.leaps = Leaps(truncation) if truncation is not None and truncation.leaps else None
        self.given_cond, self.cond = cond, cond.exchanged(leaves)
        self.updates = GuidedUpdates(table, guidance, leaves.get(id(scale), scale), cond.branches)
        self.texts = model.text_projections(self.cond)
        # A recording would keep the graph of the conditions alive, and would not follow a scale that is a tensor.
        self.fast = None if conditions else fast
        # Where shapes follow the length of a text exactly, nearly every batch would need one of its own.
        records = not isinstance(self.updates.scale, torch.Tensor) and cond.recurs
        self.fast_state = self.fast.state() if self.fast is not None and records else None

    def last_alone(self) -> DenoisingChain:
        """A chain of only the last step, which predicts the clean latents. Gradients go to autograd, not to a sink."""
        return DenoisingChain(
            self.model,
            self.blocks,
            self.table.alone(self.num_steps - 1)[0],
            self.timesteps[-1:],
            self.given_cond,
            self.updates.guidance,
            None,
            draw_noise=self.draw_noise,
            compare_with_base=self.has_penalty,
            fast=self.fast,
            precision=self.precision,
        )

    def of_longest_texts(self) -> DenoisingChain:
        """This chain with texts as long as the model reads, for plans that hold for every batch."""
        chain = copy(self)
        chain.cond, chain.given_cond = self.cond.longest(), self.given_cond.longest()
        return chain

    def reading(self) -> AbstractContextManager[None]:
        return nullcontext() if self.copies is None else self.copies.in_place()

    def predict(self, i: int, x: torch.Tensor) -> torch.Tensor:
        """The denoiser's output: [K * B, C, h, w], unconditional branch first; or already guided, [B, C, h, w]."""
        with self.texts.in_place():
            return self._predict(i, x)

    def _predict(self, i: int, x: torch.Tensor) -> torch.Tensor:
        y = self.model.predict(self._seen(i, x), self.timesteps[i], self.updates.cond(i, self.cond))
        return self.updates.guided(i, y)

    def sample(self, i: int, x: torch.Tensor, recorded: bool) -> torch.Tensor:
        precision = self.precision if self.precision is not None and self.precision.is_in_place else None
        if self.fast is None or (precision is not None and not precision.in_graphs):
            return self.predict(i, x)
        state, name = self.fast_state if recorded else None, "exact" if precision is None else precision.name
        seen, cond = self._seen(i, x), self.updates.cond(i, self.cond)
        with self.texts.in_place():
            return self.updates.guided(i, self.fast.sample(seen, self.timesteps[i], cond, self.texts, state, name))

    def around_block(self) -> AbstractContextManager[None]:
        return self.texts.in_place(of_any_text=True)

    @property
    def approximates(self) -> bool:
        return self.precision is not None

    def approximation(self) -> AbstractContextManager[None]:
        if self.precision is None:
            return nullcontext()
        if not self._refreshed:
            self.precision.refresh()
            self._refreshed = True
        return self.precision.in_place()

    def recorded_gradients(
        self, i: int, x: torch.Tensor, gy: torch.Tensor, options: Options
    ) -> Sequence[torch.Tensor | None] | None:
        if self.fast is None or self.fast_state is None:
            return None
        through_input = self.input_scale(i) != 0
        with torch.enable_grad():
            x = x.detach().requires_grad_(through_input)
            seen = self._seen(i, x)
        cond, kind = self.updates.cond(i, self.cond), (self.updates.kind, tuple(sorted(options.items())))
        found = self.fast.gradients(
            *(seen, self.timesteps[i], cond, self.texts, partial(self.updates.guided, i)),
            *(gy, self.stand_ins, self.fast_state, kind),
        )
        if found is None or not through_input:
            return found and [*found, None]
        *grads, g_seen = found
        return [*grads, *torch.autograd.grad(seen, x, g_seen)]

    def _seen(self, i: int, x: torch.Tensor) -> torch.Tensor:
        """The network's input at step i, [B, C, h, w]."""
        return self.updates.at(i).model_input(i, x)

    def advance(self, i: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The scheduler's update, with noise in the shape of the latents if the chain draws noise."""
        update = self.updates.at(i)
        noise = self.model.noise(update.latents(x), self.generator) if self.draw_noise else None
        if self.leaps is None:
            return update.advance(i, x, y, noise)
        self.leaps.see(i, x, update.blended(y))
        x_next = update.advance(i, x, y, noise)
        self.leaps.land(i + 1, x_next)
        return x_next

    def adjoint(self, i: int, g: torch.Tensor, y_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        gate = self.gates.get(i)
        return self.updates.at(i).adjoint(i, g, y_dtype, 1.0 if gate is None else gate.weight)

    def input_scale(self, i: int) -> float:
        gate = self.gates.get(i)
        return 1.0 if gate is None else gate.input_scale

    def weighted(self, g: torch.Tensor) -> torch.Tensor:
        return g if self.leaps is None else self.leaps.divided(g)

    def penalty(self, i: int, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean squared difference between the guided predictions of the model and of the base model.

        Source: the regulariser of DPOK (Fan et al. 2023), up to the weights of the steps. Two Gaussian kernels of one
        step with means a x + b y and a x + b y' and deviation sigma > 0 have KL divergence
        b^2 |y - y'|^2 / (2 sigma^2). The base model is the model with its learning adapters off, not a second copy.
        """
        with torch.inference_mode(), learning_adapters_off(self.model.denoiser):
            base = self._predict(i, x)  # the texts' projections are those with adapters
        wide = torch.promote_types(y.dtype, torch.float32)
        update = self.updates.at(i)
        delta = update.blended(y.to(wide) - base.to(wide))
        return delta.square().mean(), update.blended_adjoint(2 / delta.numel() * delta)

    def start(self, x: torch.Tensor) -> torch.Tensor:
        return self.updates.plain.start(x)

    def finish(self, x: torch.Tensor) -> torch.Tensor:
        x = self.updates.plain.latents(x)
        return x if self.shift is None else x + self.shift

    def state(self) -> Hashable:
        read = [*self.cond.tensors(), *self.leaves]
        return versions([self.model.denoiser]), self.model.settings(), tuple(map(version, read))


def _conditions(cond: Conditioning, scale: Scale) -> list[torch.Tensor]:
    """What requires a gradient of the denoiser's inputs and the guidance scale, without latents and parameters."""
    read = [*cond.tensors(), *([scale] if isinstance(scale, torch.Tensor) else ())]
    found = {id(tensor): tensor for tensor in read if tensor.requires_grad}.values()
    return list(found) if torch.is_grad_enabled() else []


def _no_gradient_for_conditions(option: str) -> ValueError:
    return ValueError(
        f"embeddings or guidance require a gradient, but {option} gives gradients only to the denoiser's parameters: "
        "leave one of the two out"
    )
