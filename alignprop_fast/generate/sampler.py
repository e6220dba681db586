"""DifferentiableSampler: prompts to images, with the reward's gradient back into the denoiser's adapters.

    prompts -> text embeddings -> T denoising steps -> decode -> images [0, 1] -> (your reward)

`prompt_encoder` makes the text embeddings, `denoising` defines the steps, and `planning` chooses what each step keeps
for the backward pass.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from alignprop_fast.generate.chain_steps import ChainSteps
from alignprop_fast.generate.cost_table import TrainingStep
from alignprop_fast.generate.denoising import DenoisingChain
from alignprop_fast.generate.fast_predict import FastPredict
from alignprop_fast.generate.guidance import Guidance, plain_number
from alignprop_fast.generate.memory_budget import MemoryBudget
from alignprop_fast.generate.planning import StepPlanner, gradient_steps
from alignprop_fast.generate.prompt_encoder import PromptEncoder
from alignprop_fast.generate.render import Renderer
from alignprop_fast.models import adapt
from alignprop_fast.models.conditioning import Conditioning, Embeddings
from alignprop_fast.models.lean.sampling_precision import SamplingPrecision
from alignprop_fast.models.lora.learning import has_learning_adapters
from alignprop_fast.models.pipeline_adapter import Generator
from alignprop_fast.planner import AUTO, CostTable, CountedTable, Gpu, Plan, Solver, Stage, parse_bytes
from alignprop_fast.rewards.reward import Reward, RewardFunction, as_reward
from alignprop_fast.runtime import Chain, GradientSink, Told, blocks_of, nobody, raise_if_changed, score_in_chunks
from alignprop_fast.sampling import (
    Draws,
    Gate,
    StepTable,
    Truncation,
    draw_gates,
    draw_truncation,
    make_table,
    trl_gates,
)

__all__ = ["DifferentiableSampler", "Draws", "Gate", "Truncation", "draw_gates", "draw_truncation", "trl_gates"]


class DifferentiableSampler:
    """Samples images through the whole denoising chain, differentiable like plain autograd.

    Gradients reach the denoiser's parameters, the initial latents, given text embeddings, the guidance scale, and
    tokens or adapters of the text encoders, if they require a gradient.

    Source: Prabhudesai et al. 2023, "Aligning Text-to-Image Diffusion Models with Reward Backpropagation".

    Args:
        pipe: a `StableDiffusionPipeline` or `StableDiffusionXLPipeline` with a scheduler of DDIM, Euler, Euler
            ancestral or DPM-Solver++ 2M; a `StableDiffusion3Pipeline`, `FluxPipeline`, `ChromaPipeline`,
            `Flux2Pipeline`, `Flux2KleinPipeline`, `ZImagePipeline`, `QwenImagePipeline`, `Krea2Pipeline` or
            `Lumina2Pipeline` with flow-match Euler; a `SanaPipeline` with that or DPM-Solver++ 2M. Give its denoiser
            adapters with `pipe.unet.add_adapter(...)` or `pipe.transformer.add_adapter(...)`. The sampler freezes VAE
            and text encoders, unless something in them is frozen already. The plan does not count what learns there:
            use `reserve` for it.
        num_inference_steps: steps T of the chain.
        guidance_scale: of classifier-free guidance, in the pipeline's own meaning: 1 or less turns it off, for Z-Image
            and Krea 2 0. For FLUX it is the input of the denoiser's distilled guidance. A number, or a tensor of one
            number that may require a gradient, like `true_cfg_scale`.
        eta: noise of DDIM, 0 (none) to 1 (as in DDPM); not used by other schedulers.
        memory_budget: memory that live tensors may take on the device, weights included: bytes or "24GiB". "auto": on a
            GPU its free memory; elsewhere as None. None or "none": nothing is measured and every gradient step is
            replayed, which takes the least memory. On a GPU the budget is at most what is free at the first plan.
        guidance_rescale: phi of Lin et al. 2023; 0 turns it off.
        cfg_normalization: Z-Image only, as in its pipeline: the norm of the guided prediction is at most this many
            times that with the prompt; 0 turns it off.
        cfg_truncation: Z-Image only, as in its pipeline: steps at which more than this share of the noise is gone run
            without guidance, in about half the time; 1: all steps are guided.
        true_cfg_scale: FLUX.1 and Qwen-Image only: classifier-free guidance, off without negative prompts. Qwen-Image
            has no other; FLUX.1 has the distilled one too.
        height, width: in pixels; None: the model's own size.
        draw_unused_noise: draw step noise even at eta = 0, as trl does. It only advances the random state.
        reserve: bytes (or "2GiB") of the budget for a reward phase that the sampler cannot see, if `reward` is None.
        reward: the reward to plan for; call it by `score`. A `Reward`, or a function (images [B, 3, H, W], prompts,
            metadata) -> (scores [B], info).
        reward_bytes: of the reward's weights on the device; None: the reward's own `weight_bytes()`.
        host_memory: bytes (or "16GiB") that offloading may lock of this computer's memory, by all processes of the run
            together; 0: it moves nothing; None: half of what is free.
        cuda_graphs: whether evaluations without gradient and replays run as CUDA graphs, recorded at their first use.
            "auto": on a GPU, where a measurement at first use says that they are faster and where the memory that they
            keep has no better use; on the CPU never. "on": even if they measure no faster. "off": never.
        compiled: let the transformer blocks of evaluations without gradient run through torch.compile, if a
            measurement at first use says that it is faster. Results then differ by rounding between a step without
            gradient and its replay.
        cache_text: encode each prompt once and remember its embedding. The text encoders are on the CPU in between. If
            they do not fit on the device beside the model, the model moves to the CPU while they encode.
        optimizer_bytes: of the optimizer's state, with a moving average of the weights if there is one; None: two fp32
            numbers per trainable parameter.
        compare_with_base: measure `base_mse`, the mean squared difference between the (guided) predictions with and
            without the learning adapters, over the gradient steps. It is differentiable: a regulariser to add to the
            loss (`DenoisingChain.penalty`). Each gradient step then has one more evaluation without gradient, and one
            more with gradient if the gradient passes through the step's input.
        sampling_precision: of steps without gradient, in calls that have steps with gradient: "exact", "bf16" (for a
            model in fp32), "int8", "fp8" or "merged" (`SamplingPrecision`). Place the model on its device, freeze it
            and add its adapters first.

    Raises:
        ValueError: the pipeline, the scheduler or an option is not supported; the message names the remedy.
    """

    # Of the last call.
    plan: Plan | None = None
    truncation: Truncation | None = None
    latents: torch.Tensor | None = None
    base_mse: torch.Tensor | None = None
    # A trainer sets these.
    gradient_sink: GradientSink | None = None
    keeps_gradients = True  # whether gradients of earlier backward passes are kept while the chain runs
    # The command `plan` sets this.
    one_image: Sequence[Stage] = ()  # what decoding one image costs, as far as it is known already

    def __init__(
        self,
        pipe: Any,
        num_inference_steps: int = 50,
        guidance_scale: float | torch.Tensor = 5.0,
        eta: float = 1.0,
        memory_budget: int | str | None = AUTO,
        *,
        guidance_rescale: float = 0.0,
        cfg_normalization: float = 0.0,
        cfg_truncation: float = 1.0,
        true_cfg_scale: float | torch.Tensor = 1.0,
        height: int | None = None,
        width: int | None = None,
        draw_unused_noise: bool = False,
        reserve: int | str = 0,
        reward: Reward | RewardFunction | None = None,
        reward_bytes: int | None = None,
        optimizer_bytes: int | None = None,
        host_memory: int | str | None = None,
        cache_text: bool = False,
        compare_with_base: bool = False,
        cuda_graphs: str = "auto",
        compiled: bool = False,
        sampling_precision: str = "exact",
    ):
        self.model = adapt(pipe)
        self.size = self.model.image_size(height, width)
        self.table = make_table(self.model.schedule(num_inference_steps, self.size), plain_number("eta", eta))
        self.steps = ChainSteps(self.table)
        self.draw_noise = self.table.noisy or draw_unused_noise
        self.guidance = Guidance.of(
            self.model, guidance_scale, true_cfg_scale, guidance_rescale, cfg_normalization, cfg_truncation
        )
        self.budget = MemoryBudget(memory_budget, self.model.device)
        self.text = PromptEncoder(self.model, self.guidance, self.size, self._room_bytes if cache_text else None)
        locked_bytes = None if host_memory is None else parse_bytes(host_memory, "host_memory", or_zero=True)
        self.renderer = Renderer(self.model, locked_bytes)
        self.planner = StepPlanner(self.model, self.budget, self.renderer, len(self.table))
        self.reserve_bytes = parse_bytes(reserve, "reserve", or_zero=True)
        self.reward = None if reward is None else as_reward(reward)
        own_bytes = 0 if self.reward is None else self.reward.weight_bytes()
        self.reward_bytes = own_bytes if reward_bytes is None else reward_bytes
        self.optimizer_bytes = optimizer_bytes
        self.example: tuple[str, Any] = ("", {})  # prompt and metadata for measuring the reward
        if compare_with_base and not has_learning_adapters(self.model.denoiser):
            raise ValueError("a comparison with the base model needs adapters that learn: add a LoRA")
        self.compare_with_base = compare_with_base
        self.fast = FastPredict.wanted(self.model, cuda_graphs, compiled)
        self.precision = SamplingPrecision.wanted(self.model, sampling_precision, compiled)
        self.denoiser_blocks = blocks_of(self.model.denoiser, self.model.step_groups())

    def __call__(
        self,
        prompts: str | list[str],
        negative_prompts: str | list[str] | None = None,
        generator: Generator = None,
        grad_steps: Iterable[int] | None = None,
        latents: torch.Tensor | None = None,
        plan: Plan | None = None,
        metadata: Sequence[Any] | None = None,
        truncation: Truncation | Sequence[Gate] | str | None = None,
        embeddings: Embeddings | None = None,
    ) -> torch.Tensor:
        """Images [B, 3, H, W] in [0, 1], fp32. In fp32 they equal those of diffusers' own pipeline.

        Afterwards `self.plan`, `self.truncation`, `self.latents` (the decoded ones, [B, C, h, w]) and, if asked for,
        `self.base_mse` (a scalar) belong to this call. The last two carry gradient; use them in the same backward
        pass as the images.

        Args:
            prompts: B texts.
            negative_prompts: one for all, or one per prompt.
            generator: used as in diffusers' pipeline; None: the global generator.
            grad_steps: indices (0 = noisiest) of the steps whose prediction carries gradient; None: all. The others are
                detached: gradient passes only along their affine path. Under `torch.no_grad()` there are none.
            latents: initial unit noise [B, C, h, w] instead of drawn noise; receives a gradient if it requires one.
            plan: run under this plan, with its gradient steps, instead of choosing one.
            metadata: of the B prompts, for measuring a `reward` that needs it; None: {} for each.
            truncation: a rule of `draw_truncation`, its result, or gates, instead of grad_steps. The caller runs its
                `renoise_steps`, each by `renoise`.
            embeddings: of the prompts, used instead of their texts, under the names in the pipeline's own call:
                `prompt_embeds`, `negative_prompt_embeds` and so on, B rows each. Z-Image's are lists of B texts,
                those of Qwen-Image and Krea 2 too, or one tensor with `prompt_embeds_mask`. Those of Chroma and
                Lumina 2 come with `prompt_attention_mask`.

        Raises:
            BudgetInfeasible: no plan keeps the memory budget; raised before the chain runs.
            ValueError: the gates do not fit the chain, the numbers of prompts differ, the denoiser has dropout,
                or something requires a gradient but cannot get one.
        """
        self.truncation = self.steps.truncation(truncation, grad_steps)
        table = self.steps.run_under(self.truncation)
        prompts, cond = self._encode(prompts, negative_prompts, embeddings)
        chain = self._chain(cond, generator, table, self.truncation)
        step = self._training_step(chain, cond, prompts, metadata)
        wants_gradient = latents is not None and latents.requires_grad
        opened = gradient_steps(chain, self.truncation.grad_steps, wants_gradient)
        self.plan = plan or self.planner.plan(step, opened, wants_gradient)
        x = table.init_scale * self.model.initial_latents(step.batch, self.size, generator, latents)
        return self._run(chain, self.plan, x)

    def renoise(
        self,
        latents: torch.Tensor,
        prompts: str | list[str],
        negative_prompts: str | list[str] | None = None,
        generator: Generator = None,
        metadata: Sequence[Any] | None = None,
        embeddings: Embeddings | None = None,
        step: int | None = None,
    ) -> torch.Tensor:
        """Images [B, 3, H, W] of latents that are noised to the level of one of the chain's steps and recovered by it.

        The step carries gradient. Sources: Clark et al. 2024, DRaFT-LV (the last step), and SRPO (any step); equation
        in `StepTable.alone`.

        Args:
            latents: [B, C, h, w] of a finished chain, such as `self.latents`; treated as constants.
            prompts, negative_prompts, generator, metadata, embeddings: as in `__call__`; the generator draws the
                noise.
            step: 0 = noisiest; None: the last one.

        Raises:
            ValueError: the scheduler's steps cannot be taken alone.
        """
        step = len(self.table) - 1 if step is None else step
        prompts, cond = self._encode(prompts, negative_prompts, embeddings)
        (table, factor), (signal, level) = self.table.alone(step), self.table.level_of(step)
        clean = latents.detach()
        noise = self.model.noise(clean, generator)
        if not self.guidance.reaches(table.timesteps[0]):
            cond = cond.of_prompts()
        chain = self._chain(cond, generator, table, shift=factor * noise if factor else None)
        training_step = self._training_step(chain, cond, prompts, metadata)
        self.plan = self.planner.plan(training_step, gradient_steps(chain, (0,)))
        return self._run(chain, self.plan, signal * clean + level * noise)

    def score(self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> tuple[torch.Tensor, Any]:
        """(scores [B], info) of the sampler's reward, run under the plan of the last call."""
        assert self.reward is not None, "the sampler was made without a reward"
        stage = "batch" if self.plan is None or self.plan.reward is None else self.plan.reward.name
        if stage == "batch":
            return self.reward(images, prompts, metadata)
        scores, info = score_in_chunks(self.reward, int(stage.partition(":")[2]), images, prompts, metadata)
        return raise_if_changed(scores, self.reward.state), info

    def say_what_is_cut(self, prompts: Sequence[str], negative_prompts: str | list[str] | None = None) -> None:
        """Log one line if texts are longer than the text encoders read. Each call of the sampler does so too.

        Call it with all prompts of a run, so that they are counted together.
        """
        self.text.say_what_is_cut(prompts, negative_prompts)

    def encode_ahead(self, prompts: Sequence[str], negative_prompt: str | None = None) -> None:
        """With `cache_text`: encode these prompts now, with the text encoders on the device only once."""
        self.text.encode_ahead(prompts, negative_prompt)

    @property
    def budget_bytes(self) -> int | None:
        """The memory budget in bytes; None if there is none, and with "auto" until the first plan."""
        return self.budget.size_bytes

    @budget_bytes.setter
    def budget_bytes(self, size_bytes: int | None) -> None:
        self.budget.size_bytes = size_bytes

    @property
    def budget_note(self) -> str:
        """One line that explains the budget, once it is settled on a GPU."""
        return self.budget.note

    def set_budget(self, memory_budget: int | str | None) -> None:
        """Use another `memory_budget` from now on."""
        self.budget = self.planner.budget = MemoryBudget(memory_budget, self.model.device)

    def settled_budget(self, batch: int, negative_prompt: str | None = None) -> int | None:
        """The memory budget in bytes, None for none. On a GPU this measures everything and runs it once."""
        if not self.planner.has_budget:
            return None
        step = self._blank_step(batch, negative_prompt)
        self.planner.solver(step, len(self.table))
        return self.planner.settled_bytes(step)

    def plan_for(self, batch: int, num_grad_steps: int | None = None, negative_prompt: str | None = None) -> Plan:
        """The plan of a batch of this size. num_grad_steps: None: all steps, which needs the most memory.

        negative_prompt: of all prompts. Its text does not matter; for FLUX it matters whether there is one.

        Raises:
            BudgetInfeasible: no plan keeps the memory budget.
        """
        step = self._blank_step(batch, negative_prompt)
        steps = step.chain.num_steps
        count = steps if num_grad_steps is None else num_grad_steps
        return self.planner.plan(step, list(range(steps - count, steps)))

    def solver(self, batch: int, negative_prompt: str | None = None) -> Solver:
        """The solver that makes the plans of batches of this size; its `table` holds the costs.

        Costs depend on the autocast state at the time of the call. Use the state of the sampler's own calls if the
        solver is for them.
        """
        return self.planner.solver(self._blank_step(batch, negative_prompt), len(self.table))

    def cost_table(
        self, batch: int, gpu: Gpu | None = None, negative_prompt: str | None = None, told: Told = nobody
    ) -> CostTable:
        """Costs of a training step at this batch size: measured on the device or, for a model on meta tensors,
        estimated for a GPU that need not be in this computer.

        told: is told which share of the work is done, from 0 to 1.
        """
        if gpu is not None:
            estimated = self.counted_table(batch, gpu, negative_prompt, told).on(gpu)
            return replace(estimated, host_limit_bytes=self.renderer.host_pool.limit_bytes or 0)
        return self.planner.measured(self._blank_step(batch, negative_prompt), told)

    def counted_table(
        self, batch: int, gpu: Gpu, negative_prompt: str | None = None, told: Told = nobody
    ) -> CountedTable:
        """Costs of a training step at this batch size for any GPU, of a model on meta tensors.

        gpu: decides which products are rounded under `sampling_precision`. Nothing else depends on it.
        """
        return self.planner.counted(self._blank_step(batch, negative_prompt), gpu, told)

    def tighten(self, factor: float = 0.9) -> int:
        """From now on plan with less memory than the last call took, because the device ran out; returns the budget.

        Raises:
            BudgetInfeasible: there is no leaner plan.
        """
        if self.fast is not None:
            self.fast.forget_recordings()
        return self.planner.tighten(factor, self.plan)

    def _room_bytes(self) -> float:
        return self.budget.room_bytes(self.model.device)

    def _encode(
        self, prompts: str | list[str], negative_prompts: str | list[str] | None, embeddings: Embeddings | None
    ) -> tuple[list[str], Conditioning]:
        """The prompts of a new call and their conditioning."""
        # Without a backward pass, the results of the last call keep its whole chain alive.
        self.base_mse = self.latents = None
        batch = self.text.batch(prompts, negative_prompts, embeddings)
        return batch.prompts, self.text.encode(batch)

    def _run(self, chain: Chain, plan: Plan, x: torch.Tensor) -> torch.Tensor:
        rendered = self.renderer.render(chain, plan, x)
        if self.compare_with_base:
            self.base_mse = rendered.penalty / max(1, len(plan.resident_steps) + len(plan.replayed_steps))
        self.latents = rendered.latents
        return rendered.images

    def _chain(
        self,
        cond: Conditioning,
        generator: Generator,
        table: StepTable,
        truncation: Truncation | None = None,
        shift: torch.Tensor | None = None,
    ) -> DenoisingChain:
        return DenoisingChain(
            self.model,
            self.denoiser_blocks,
            table,
            self.steps.timesteps(table, self.model.device),
            cond,
            self.guidance,
            generator,
            draw_noise=self.draw_noise,
            truncation=truncation,
            shift=shift,
            compare_with_base=self.compare_with_base,
            gradient_sink=self.gradient_sink,
            fast=self.fast,
            precision=self.precision,
        )

    def _blank_step(self, batch: int, negative_prompt: str | None) -> TrainingStep:
        """A training step without text, for measuring."""
        cond = self.text.blank(batch, negative_prompt)
        prompt, metadata = self.example
        chain = self._chain(cond, None, self.table)
        return self._training_step(chain, cond, [prompt] * batch, [metadata] * batch)

    def _training_step(
        self, chain: DenoisingChain, cond: Conditioning, prompts: list[str], metadata: Sequence[Any] | None
    ) -> TrainingStep:
        return TrainingStep(
            model=self.model,
            chain=chain.of_longest_texts(),
            cond=cond,
            size=self.size,
            decoder_blocks=self.renderer.decoder_blocks,
            one_image=self.one_image,
            resident=self.model.modules(with_text=self.text.encoders_stay),
            prompts=prompts,
            metadata=[{} for _ in prompts] if metadata is None else list(metadata),
            reward=self.reward,
            reward_bytes=self.reward_bytes,
            reserve_bytes=self.reserve_bytes,
            optimizer_bytes=self.optimizer_bytes,
            keeps_gradients=self.keeps_gradients,
            host_limit_bytes=self.renderer.host_pool.limit_bytes or 0,
        )
