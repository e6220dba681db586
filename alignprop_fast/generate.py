"""DifferentiableSampler: prompts to images, with the reward's gradient back into the denoiser's adapters.

    prompts -> text embeddings -> T denoising steps -> decode -> images [0, 1] -> (your reward)

Here the two halves of the package meet: `sampling` says what a step computes, `runtime` under a `planner` plan how it
is carried to the backward pass.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from alignprop_fast.models import adapt
from alignprop_fast.models.pipeline_adapter import Conditioning, Generator
from alignprop_fast.planner import CostTable, Option, Plan, leanest, parse_bytes, solve
from alignprop_fast.runtime import Chain, apply_by_image, measure_chain, measure_option, measure_segment, run_chain
from alignprop_fast.sampling import Update, draw_gates, make_table, rescaled_guidance, trl_gates

__all__ = ["DifferentiableSampler", "draw_gates", "trl_gates"]


class DifferentiableSampler:
    """Sample images through the whole denoising chain, differentiable in the trainable parameters of the denoiser.

    Source: Prabhudesai et al. 2023, "Aligning Text-to-Image Diffusion Models with Reward Backpropagation".

    Args:
        pipe: a `StableDiffusionPipeline` or `StableDiffusionXLPipeline` with a scheduler of DDIM, Euler, Euler
            ancestral or DPM-Solver++ 2M; a `StableDiffusion3Pipeline` or `FluxPipeline` with flow-match Euler. Give its
            denoiser adapters with `pipe.unet.add_adapter(...)` or `pipe.transformer.add_adapter(...)`; decoder and text
            encoders are frozen here.
        num_inference_steps: steps T of the chain.
        guidance_scale: classifier-free guidance; 1 or less turns it off. FLUX: the distilled guidance that its denoiser
            is told.
        eta: DDIM noise, 0 (none) to 1 (as DDPM); other schedulers have none to choose.
        memory_budget: what live tensors may take on the device in all, weights included: bytes or "24GiB". None: no
            measuring, every gradient step is replayed, which is the leanest way to run.
        guidance_rescale: phi of Lin et al. 2023; 0 turns it off.
        true_cfg_scale: FLUX: classifier-free guidance beside the distilled one, where there are negative prompts.
        height, width: pixels; the model's own size where None.
        draw_unused_noise: draw step noise even at eta = 0, as trl does: of no effect but for the random state.
        reserve: bytes (or "2GiB") of the budget to leave to what the sampler cannot see, the reward model above all.

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
        true_cfg_scale: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        draw_unused_noise: bool = False,
        reserve: int | str = 0,
    ):
        self.model = adapt(pipe)
        self.size = self.model.image_size(height, width)
        self.table = make_table(self.model.schedule(num_inference_steps, self.size), eta)
        self.guidance_scale, self.guidance_rescale = guidance_scale, guidance_rescale
        self.cfg_scale = true_cfg_scale if self.model.embeds_guidance else guidance_scale
        self.draw_noise = self.table.noisy or draw_unused_noise
        self.budget_bytes = None if memory_budget is None else parse_bytes(memory_budget)
        self.reserve_bytes = parse_bytes(reserve) if reserve else 0
        self.plan: Plan | None = None
        self._cost_tables: dict[tuple, CostTable] = {}

    def __call__(
        self,
        prompts: str | list[str],
        negative_prompts: str | list[str] | None = None,
        generator: Generator = None,
        grad_steps: Iterable[int] | None = None,
        latents: torch.Tensor | None = None,
        plan: Plan | None = None,
    ) -> torch.Tensor:
        """Images [B, 3, H, W] in [0, 1], fp32. In fp32 they equal those of diffusers' own pipeline.

        Args:
            prompts: B texts.
            negative_prompts: one for all or one each.
            generator: consumed as diffusers' pipeline consumes it; None: the global generator.
            grad_steps: indices (0 = noisiest) of the steps whose prediction carries gradient; None: all. The others are
                detached: gradient passes by their affine path only. Under `torch.no_grad()` none is taken.
            latents: initial unit noise [B, C, h, w] instead of drawn noise; if it requires grad it receives it.
            plan: run under this plan, with the gradient steps that it names, instead of choosing one.

        Raises:
            BudgetInfeasible: no plan keeps the memory budget; raised before the chain runs.
            ValueError: a gradient step outside the chain, prompts of different numbers, or dropout in the denoiser.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        _check_prompts(prompts, negative_prompts)
        if isinstance(negative_prompts, str):
            negative_prompts = [negative_prompts] * len(prompts)
        guided = self.cfg_scale > 1 and not (self.model.embeds_guidance and negative_prompts is None)
        cond = self.model.encode(prompts, negative_prompts, guided, self.size)
        cond = replace(cond, embedded_guidance=self.guidance_scale)
        chain = self._chain(cond, generator)
        self.plan = plan or self._make_plan(chain, cond, len(prompts), self._grad_steps(grad_steps, chain))
        x = self.table.init_scale * self.model.initial_latents(len(prompts), self.size, generator, latents)
        return self._decode(run_chain(chain, self.plan, x), self.plan.decoder_options["decoder"])

    def _chain(self, cond: Conditioning, generator: Generator) -> Chain:
        table, model, scale = self.table, self.model, self.cfg_scale
        timesteps = torch.tensor(table.timesteps, device=model.device)
        combined = cond.branches == 1 or self.guidance_rescale > 0
        update = Update(table, (1.0,) if combined else (1 - scale, scale))

        def network(i: int, state: torch.Tensor) -> torch.Tensor:
            y = model.predict(update.model_input(i, state), timesteps[i], cond)
            return rescaled_guidance(y, scale, self.guidance_rescale) if combined and cond.branches == 2 else y

        def advance(i: int, state: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            noise = model.noise(update.latents(state), generator) if self.draw_noise else None
            return update.advance(i, state, y, noise)

        return Chain(
            len(table),
            network,
            advance,
            update.adjoint,
            model.trainable(),
            model.step_groups(),
            start=update.start,
            finish=update.latents,
        )

    def _decode(self, x: torch.Tensor, option: str) -> torch.Tensor:
        modules = [module for group in self.model.decoder_segments().values() for module in group]
        return apply_by_image(self.model.decode, x, option, modules)

    def _grad_steps(self, grad_steps: Iterable[int] | None, chain: Chain) -> list[int]:
        """Ascending gradient steps; none where nothing could receive a gradient."""
        steps = sorted(set(range(chain.num_steps) if grad_steps is None else grad_steps))
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
            latent_bytes=chain.start(x).numel() * x.element_size(),
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
