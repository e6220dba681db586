"""DifferentiableSampler: prompts to images, with the reward's gradient back into the denoiser's adapters.

    prompts -> text embeddings -> T denoising steps -> decode -> images [0, 1] -> (your reward)

Here the two halves of the package meet: `sampling` says what a step computes, `runtime` under a `planner` plan how it
is carried to the backward pass.
"""

from collections.abc import Iterable
from typing import Any

import torch

from alignprop_fast.models import adapt
from alignprop_fast.models.stable_diffusion import Conditioning, Generator
from alignprop_fast.planner import CostTable, Option, Plan, leanest, parse_bytes, solve
from alignprop_fast.runtime import (
    Chain,
    apply_by_image,
    measure_chain,
    measure_option,
    measure_segment,
    run_penalised_chain,
)
from alignprop_fast.sampling import (
    StepTable,
    Truncation,
    ddim_table,
    draw_gates,
    draw_truncation,
    guided_step,
    guided_step_adjoint,
    rescaled_guidance,
    trl_gates,
)

__all__ = ["DifferentiableSampler", "Truncation", "draw_gates", "draw_truncation", "trl_gates"]


class DifferentiableSampler:
    """Sample images through the whole denoising chain, differentiable in the trainable parameters of the denoiser.

    Source: Prabhudesai et al. 2023, "Aligning Text-to-Image Diffusion Models with Reward Backpropagation".

    Args:
        pipe: a `StableDiffusionPipeline` or `StableDiffusionXLPipeline` with a `DDIMScheduler`. Give its denoiser
            adapters with `pipe.unet.add_adapter(...)`; decoder and text encoders are frozen here.
        num_inference_steps: steps T of the chain.
        guidance_scale: classifier-free guidance; 1 or less turns it off.
        eta: DDIM noise, 0 (none) to 1 (as DDPM).
        memory_budget: what live tensors may take on the device in all, weights included: bytes or "24GiB". None: no
            measuring, every gradient step is replayed, which is the leanest way to run.
        guidance_rescale: phi of Lin et al. 2023; 0 turns it off.
        height, width: pixels; the model's own size where None.
        draw_unused_noise: draw step noise even at eta = 0, as trl does: of no effect but for the random state.
        reserve: bytes (or "2GiB") of the budget to leave to what the sampler cannot see, the reward model above all.
        compare_with_base: measure `base_mse`: the mean squared difference of the (guided) prediction to that of the
            base model, adapters switched off, over the gradient steps; differentiable, a regulariser to add to the
            loss. Costs an evaluation without gradient per gradient step, and one with gradient more where the
            gradient passes through the step's input.

    The regulariser is that of DPOK (Fan et al. 2023) up to the weights of the steps: two Gaussian kernels of one step
    with means a x + b y and a x + b y' and deviation sigma > 0 have KL divergence b^2 |y - y'|^2 / (2 sigma^2). As
    there, the latents x of a step are constants in its term, and no second copy of the model is held.

    Raises:
        ValueError: a pipeline, scheduler or option that is not supported; the message names the remedy.
    """

    def __init__(
        self,
        pipe: Any,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        eta: float = 1.0,
        memory_budget: int | str | None = None,
        *,
        guidance_rescale: float = 0.0,
        height: int | None = None,
        width: int | None = None,
        draw_unused_noise: bool = False,
        reserve: int | str = 0,
        compare_with_base: bool = False,
    ):
        self.model = adapt(pipe)
        self.size = self.model.image_size(height, width)
        self.table = ddim_table(**self.model.schedule(num_inference_steps), eta=eta)
        self.guidance_scale, self.guidance_rescale = guidance_scale, guidance_rescale
        self.draw_noise = self.table.noisy or draw_unused_noise
        self.budget_bytes = None if memory_budget is None else parse_bytes(memory_budget)
        self.reserve_bytes = parse_bytes(reserve) if reserve else 0
        if compare_with_base and not self.model.has_adapters():
            raise ValueError("a comparison with the base model needs adapters that can be switched off: add a LoRA")
        self.compare_with_base = compare_with_base
        self.base_mse: torch.Tensor | None = None
        self.plan: Plan | None = None
        self.truncation: Truncation | None = None
        self.latents: torch.Tensor | None = None
        self._cost_tables: dict[tuple, CostTable] = {}

    def __call__(
        self,
        prompts: str | list[str],
        negative_prompts: str | list[str] | None = None,
        generator: Generator = None,
        grad_steps: Iterable[int] | None = None,
        latents: torch.Tensor | None = None,
        plan: Plan | None = None,
        truncation: Truncation | str | None = None,
    ) -> torch.Tensor:
        """Images [B, 3, H, W] in [0, 1], fp32. In fp32 they equal those of diffusers' own pipeline.

        Then `self.plan`, `self.truncation`, `self.latents` (what was decoded, [B, C, h, w], detached) and, if asked
        for, `self.base_mse` (a scalar with gradient, to be used in the same backward pass) are this call's.

        Args:
            prompts: B texts.
            negative_prompts: one for all or one each.
            generator: consumed as diffusers' pipeline consumes it; None: the global generator.
            grad_steps: indices (0 = noisiest) of the steps whose prediction carries gradient; None: all. The others are
                detached: gradient passes by their affine path only. Under `torch.no_grad()` none is taken.
            latents: initial latents [B, C, h, w] instead of drawn ones; if they require grad they receive it.
            plan: run under this plan, with the gradient steps that it names, instead of choosing one.
            truncation: a rule of `draw_truncation` or what it drew, in place of grad_steps. Its `renoisings` are for
                the caller, who asks for each by `renoise`.

        Raises:
            BudgetInfeasible: no plan keeps the memory budget; raised before the chain runs.
            ValueError: a gradient step outside the chain, prompts of different numbers, or dropout in the denoiser.
        """
        if isinstance(truncation, str):
            truncation = draw_truncation(truncation, len(self.table))
        if truncation is None:
            truncation = Truncation(tuple(range(len(self.table)) if grad_steps is None else grad_steps))
        elif grad_steps is not None:
            raise ValueError("grad_steps and truncation both say which steps carry gradient: give one of them")
        self.truncation, last = truncation, truncation.last_step
        table = self.table if last is None else self.table.ending_at(last)
        prompts, cond = self._encode(prompts, negative_prompts)
        chain = self._chain(cond, generator, table, truncation.input_gradient)
        self.plan = plan or self._make_plan(chain, cond, len(prompts), self._grad_steps(truncation.grad_steps, chain))
        x = self.model.initial_latents(len(prompts), self.size, generator, latents)
        return self._run(chain, self.plan, x)

    def renoise(
        self,
        latents: torch.Tensor,
        prompts: str | list[str],
        negative_prompts: str | list[str] | None = None,
        generator: Generator = None,
    ) -> torch.Tensor:
        """Images [B, 3, H, W] of latents noised to the level of the chain's last step and denoised by that step alone.

        The step predicts the clean latents and carries gradient. Source: Clark et al. 2024, DRaFT-LV; equation in
        `draw_truncation`.

        Args:
            latents: [B, C, h, w] of a finished chain, such as `self.latents`; taken as constants.
            prompts, negative_prompts, generator: as for the sampler itself; the generator gives the noise.
        """
        prompts, cond = self._encode(prompts, negative_prompts)
        chain = self._chain(cond, generator, self.table.last_alone(), True)
        plan = self._make_plan(chain, cond, len(prompts), self._grad_steps((0,), chain))
        signal, level = self.table.last_level()
        x = latents.detach()
        return self._run(chain, plan, signal * x + level * self.model.noise(x, generator))

    def _encode(
        self, prompts: str | list[str], negative_prompts: str | list[str] | None
    ) -> tuple[list[str], Conditioning]:
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        _check_prompts(prompts, negative_prompts)
        if isinstance(negative_prompts, str):
            negative_prompts = [negative_prompts] * len(prompts)
        return prompts, self.model.encode(prompts, negative_prompts, self.guidance_scale > 1, self.size)

    def _run(self, chain: Chain, plan: Plan, x: torch.Tensor) -> torch.Tensor:
        x, penalty = run_penalised_chain(chain, plan, x)
        if self.compare_with_base:
            self.base_mse = penalty / max(1, len(plan.resident_steps) + len(plan.replayed_steps))
        self.latents = x.detach()
        return self._decode(x, plan.decoder_options["decoder"])

    def _chain(self, cond: Conditioning, generator: Generator, table: StepTable, input_gradient: bool) -> Chain:
        model, scale = self.model, self.guidance_scale
        timesteps = torch.tensor(table.timesteps, device=model.device)
        combined = cond.branches == 1 or self.guidance_rescale > 0
        blend = (1.0,) if combined else (1 - scale, scale)
        weights = [tuple(b * share for share in blend) for b in table.b]

        def network(i: int, x: torch.Tensor) -> torch.Tensor:
            y = model.predict(x, timesteps[i], cond)
            return rescaled_guidance(y, scale, self.guidance_rescale) if combined and cond.branches == 2 else y

        def advance(i: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            noise = model.noise(x, generator) if self.draw_noise else None
            return guided_step(x, y, noise, table.a[i], weights[i], table.sigma[i])

        def adjoint(i: int, g: torch.Tensor, y_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
            return guided_step_adjoint(g, table.a[i], weights[i], y_dtype)

        def off_base(i: int, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            with torch.inference_mode(), model.adapters_off():
                base = network(i, x)
            wide = torch.promote_types(y.dtype, torch.float32)
            delta = guided_step(torch.zeros_like(x), y.to(wide) - base.to(wide), None, 0.0, blend)
            _, gradient = guided_step_adjoint(2 / delta.numel() * delta, 0.0, blend, wide)
            return delta.square().mean(), gradient

        penalty = off_base if self.compare_with_base else None
        groups = model.step_groups()
        return Chain(len(table), network, advance, adjoint, model.trainable(), groups, input_gradient, penalty)

    def _decode(self, x: torch.Tensor, option: str) -> torch.Tensor:
        modules = [module for group in self.model.decoder_segments().values() for module in group]
        return apply_by_image(self.model.decode, x, option, modules)

    def _grad_steps(self, grad_steps: Iterable[int], chain: Chain) -> list[int]:
        """Ascending gradient steps; none where nothing could receive a gradient."""
        steps = sorted(set(grad_steps))
        if steps and not 0 <= steps[0] <= steps[-1] < chain.num_steps:
            raise ValueError(f"gradient steps {steps} lie outside the chain: use 0 to {chain.num_steps - 1}")
        return steps if torch.is_grad_enabled() and chain.parameters else []

    def _make_plan(self, chain: Chain, cond: Conditioning, batch: int, grad_steps: list[int]) -> Plan:
        if self.budget_bytes is None or not torch.is_grad_enabled():
            return leanest(chain.num_steps, grad_steps)
        key = (batch, cond.embeds.shape, cond.embeds.dtype, len(chain.parameters))
        if key not in self._cost_tables:
            self._cost_tables[key] = self._measure(chain, batch, self.budget_bytes)
        return solve(self._cost_tables[key], chain.num_steps, grad_steps, self.budget_bytes)

    def _measure(self, chain: Chain, batch: int, budget_bytes: int) -> CostTable:
        """The cost table at this batch size, from running each option once; draws no random numbers."""
        device = self.model.device
        scale = self.model.pipe.vae_scale_factor
        x = torch.zeros(batch, self.model.latent_channels, *(side // scale for side in self.size))
        x = x.to(device=device, dtype=torch.promote_types(self.model.dtype, torch.float32))

        def decode(option: str) -> Option:
            start = x.detach().requires_grad_()
            return measure_option(
                option,
                lambda: self._decode(start, option),
                lambda images: torch.autograd.grad(images, start, torch.ones_like(images)),
                device,
            )

        trained_bytes = sum(p.numel() * p.element_size() for p in chain.parameters)
        # Gradient, its sum over the steps and two optimizer moments in fp32 for each trainable parameter.
        fixed_bytes = self._weight_bytes() + 2 * trained_bytes + 8 * sum(p.numel() for p in chain.parameters)
        limit_bytes = budget_bytes - fixed_bytes
        sampling, step = measure_chain(chain, x, limit_bytes)
        return CostTable(
            fixed_bytes=fixed_bytes,
            latent_bytes=x.numel() * x.element_size(),
            step=(step,),
            decoder=(measure_segment("decoder", ("block", "image", "keep"), decode, limit_bytes),),
            sampling_bytes=sampling.transient_bytes,
            sampling_seconds=sampling.seconds,
            reward_bytes=self.reserve_bytes,
        )

    def _weight_bytes(self) -> int:
        tensors = [t for module in self.model.modules() for t in (*module.parameters(), *module.buffers())]
        return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def _check_prompts(prompts: list[str], negative_prompts: str | list[str] | None) -> None:
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("prompts must be one text or more, and nothing but texts")
    if isinstance(negative_prompts, list) and len(negative_prompts) != len(prompts):
        raise ValueError(f"{len(negative_prompts)} negative prompts for {len(prompts)} prompts: give one, or one each")
