"""DifferentiableSampler: prompts to images, with the reward's gradient back into the denoiser's adapters.

    prompts -> text embeddings -> T denoising steps -> decode -> images [0, 1] -> (your reward)

Here the two halves of the package meet: `sampling` says what a step computes, `runtime` under a `planner` plan how it
is carried to the backward pass.
"""

import logging
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch

from alignprop_fast.generate.cost_table import TrainingStep, blocks_of, estimated_table, measured_table
from alignprop_fast.generate.fast_predict import FastPredict, Predict
from alignprop_fast.models import adapt
from alignprop_fast.models.pipeline_adapter import Conditioning, Embeddings, Generator
from alignprop_fast.models.text_cache import TextCache
from alignprop_fast.planner import (
    AUTO,
    BudgetInfeasible,
    CostTable,
    Gpu,
    Plan,
    Solver,
    budget_from_free,
    leanest,
    parse_budget,
    parse_bytes,
)
from alignprop_fast.prompts.limits import CutTexts
from alignprop_fast.runtime import (
    Chain,
    CompiledBlocks,
    GraphedCalls,
    HostPool,
    Offloader,
    autocast_dtype,
    device_memory,
    driver_bytes,
    lockable_bytes,
    raise_if_changed,
    run_decoder_stage,
    run_penalised_chain,
    score_in_chunks,
    unless_out_of_memory,
    use_growing_segments,
    version,
    versions,
)
from alignprop_fast.sampling import (
    Draws,
    StepTable,
    Truncation,
    Update,
    draw_gates,
    draw_truncation,
    make_table,
    rescaled_guidance,
    trl_gates,
)

__all__ = ["DifferentiableSampler", "Draws", "Truncation", "draw_gates", "draw_truncation", "trl_gates"]

logger = logging.getLogger(__name__)


class DifferentiableSampler:
    """Sample images through the whole denoising chain, differentiable in all that plain autograd reaches.

    That is: the denoiser's trainable parameters, the initial latents, text embeddings that are given, the guidance
    scale, and what learns in the text encoders (tokens or adapters), each if it requires a gradient.

    Source: Prabhudesai et al. 2023, "Aligning Text-to-Image Diffusion Models with Reward Backpropagation".

    Args:
        pipe: a `StableDiffusionPipeline` or `StableDiffusionXLPipeline` with a scheduler of DDIM, Euler, Euler
            ancestral or DPM-Solver++ 2M; a `StableDiffusion3Pipeline` or `FluxPipeline` with flow-match Euler. Give its
            denoiser adapters with `pipe.unet.add_adapter(...)` or `pipe.transformer.add_adapter(...)`. VAE and text
            encoders are frozen here, unless something in them is frozen already. What learns there is not in the plan:
            leave it room by `reserve`.
        num_inference_steps: steps T of the chain.
        guidance_scale: classifier-free guidance; 1 or less turns it off. FLUX: the distilled guidance that its denoiser
            is told. A number, or a tensor of one number that may require a gradient; so is `true_cfg_scale`.
        eta: DDIM noise, 0 (none) to 1 (as DDPM); other schedulers have none to choose.
        memory_budget: what live tensors may take on the device in all, weights included: bytes or "24GiB". "auto": on a
            GPU what is free there; elsewhere as None. None, or "none": no measuring, every gradient step is replayed,
            which is the leanest way to run. On a GPU no budget exceeds what is free at the first plan (`budget_note`).
        guidance_rescale: phi of Lin et al. 2023; 0 turns it off.
        true_cfg_scale: FLUX: classifier-free guidance beside the distilled one, where there are negative prompts.
        height, width: pixels; the model's own size where None.
        draw_unused_noise: draw step noise even at eta = 0, as trl does: of no effect but for the random state.
        reserve: bytes (or "2GiB") of the budget to leave to what the sampler cannot see, where `reward` is not given.
        reward: (images [B, 3, H, W], prompts, metadata) -> (scores [B], info), to be planned for; call it by `score`.
        reward_bytes: what the reward's weights take on the device.
        host_memory: bytes (or "16GiB") that offloading may lock of this computer's memory, by all processes of the run
            together; None: half of what is free.
        cuda_graphs: run evaluations without gradient as CUDA graphs, recorded at their first use; the memory that one
            takes is then reserved for good, and the planner counts it. Without a budget replays are graphs, too, one
            forward and one back. Tried on an emulated GPU only.
        compiled: run the transformer blocks of evaluations without gradient through torch.compile. Results then differ
            by rounding between a step without gradient and its replay. Not tried on a GPU yet.
        cache_text: encode each prompt once and remember its embedding; the text encoders lie on the CPU in between, and
            where they do not fit beside the model it waits there while they encode.
        optimizer_bytes: what the optimizer's state takes, with a moving average of the weights if there is one; None:
            two fp32 numbers for each trainable parameter.
        compare_with_base: measure `base_mse`: the mean squared difference of the (guided) prediction to that of the
            base model, adapters that learn switched off, over the gradient steps; differentiable, a regulariser to add
            to the loss. Costs an evaluation without gradient per gradient step, and one with gradient more where the
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
        guidance_scale: float | torch.Tensor = 5.0,
        eta: float = 1.0,
        memory_budget: int | str | None = AUTO,
        *,
        guidance_rescale: float = 0.0,
        true_cfg_scale: float | torch.Tensor = 1.0,
        height: int | None = None,
        width: int | None = None,
        draw_unused_noise: bool = False,
        reserve: int | str = 0,
        reward: Callable[..., tuple[torch.Tensor, Any]] | None = None,
        reward_bytes: int = 0,
        optimizer_bytes: int | None = None,
        host_memory: int | str | None = None,
        cache_text: bool = False,
        compare_with_base: bool = False,
        cuda_graphs: bool = False,
        compiled: bool = False,
    ):
        self.model = adapt(pipe)
        self._text = TextCache(self.model, self._room_bytes) if cache_text else None
        readers = self.model.text_readers()
        self._cut, self._cut_negative = CutTexts(readers, "prompts"), CutTexts(readers, "negative prompts")
        self.example: tuple[str, Any] = ("", {})  # prompt and metadata that the reward gets where it is measured
        self.size = self.model.image_size(height, width)
        self.table = make_table(self.model.schedule(num_inference_steps, self.size), _number("eta", eta))
        self.guidance_scale = _scale(guidance_scale)
        self.guidance_rescale = _number("guidance_rescale", guidance_rescale)
        self.cfg_scale = _scale(true_cfg_scale) if self.model.embeds_guidance else self.guidance_scale
        self.draw_noise = self.table.noisy or draw_unused_noise
        self.set_budget(memory_budget)
        self.reserve_bytes = parse_bytes(reserve) if reserve else 0
        self.reward, self.reward_bytes, self.optimizer_bytes = reward, reward_bytes, optimizer_bytes
        if compare_with_base and not self.model.has_learning_adapters():
            raise ValueError("a comparison with the base model needs adapters that learn: add a LoRA")
        self.compare_with_base = compare_with_base
        for name, wanted in (("cuda_graphs", cuda_graphs), ("compiled", compiled)):
            if wanted and self.model.device.type == "cpu":
                raise ValueError(f"{name} needs a GPU, and the model is on the CPU: leave it out")
        self._fast: FastPredict | None = None
        if cuda_graphs or compiled:
            blocks = CompiledBlocks(self.model.step_groups()["transformers"]) if compiled else None
            self._fast = FastPredict(self.model, GraphedCalls() if cuda_graphs else None, blocks)
        self.base_mse: torch.Tensor | None = None
        self.plan: Plan | None = None
        self.truncation: Truncation | None = None
        self.latents: torch.Tensor | None = None
        self.gradient_sink: Callable[..., torch.Tensor | None] | None = None  # see `Chain.sink`
        self.keeps_gradients = True  # whether those of earlier backward passes lie beside the chain
        self._solvers: dict[tuple, Solver] = {}
        self._timesteps: dict[Any, torch.Tensor] = {}
        self._denoiser_blocks = blocks_of(self.model.denoiser, self.model.step_groups())
        self._decoder_blocks = blocks_of(self.model.decoder, self.model.decoder_groups())
        self.host_memory_bytes = None if host_memory is None else parse_bytes(host_memory, "host memory")
        self._host_pool: HostPool | None = None

    def set_budget(self, memory_budget: int | str | None) -> None:
        """Another `memory_budget` from now on."""
        budget = parse_budget(memory_budget)
        self.budget_bytes = budget if isinstance(budget, int) else None  # with "auto" None until the first plan
        self.budget_note = ""  # how the budget came about
        self._takes_what_is_free, self._budget_is_settled = budget == AUTO, False
        if budget is not None and self.model.device.type == "cuda":
            use_growing_segments()

    def __call__(
        self,
        prompts: str | list[str],
        negative_prompts: str | list[str] | None = None,
        generator: Generator = None,
        grad_steps: Iterable[int] | None = None,
        latents: torch.Tensor | None = None,
        plan: Plan | None = None,
        metadata: Sequence[Any] | None = None,
        truncation: Truncation | str | None = None,
        embeddings: Embeddings | None = None,
    ) -> torch.Tensor:
        """Images [B, 3, H, W] in [0, 1], fp32. In fp32 they equal those of diffusers' own pipeline.

        Then `self.plan`, `self.truncation`, `self.latents` (what was decoded, [B, C, h, w]) and, if asked for,
        `self.base_mse` (a scalar) are this call's. The last two carry gradient, to be used in one backward pass with
        that of the images.

        Args:
            prompts: B texts.
            negative_prompts: one for all or one each.
            generator: consumed as diffusers' pipeline consumes it; None: the global generator.
            grad_steps: indices (0 = noisiest) of the steps whose prediction carries gradient; None: all. The others are
                detached: gradient passes by their affine path only. Under `torch.no_grad()` none is taken.
            latents: initial unit noise [B, C, h, w] instead of drawn noise; if it requires grad it receives it.
            plan: run under this plan, with the gradient steps that it names, instead of choosing one.
            metadata: of the B prompts, for a `reward` whose costs are measured and that wants some; None: {} each.
            truncation: a rule of `draw_truncation` or what it drew, in place of grad_steps. Its `renoisings` are for
                the caller, who asks for each by `renoise`.
            embeddings: of the prompts, to be used in place of their texts, by the names that the pipeline's own call
                has for them: `prompt_embeds`, `negative_prompt_embeds` and so on, B rows each.

        Raises:
            BudgetInfeasible: no plan keeps the memory budget; raised before the chain runs.
            ValueError: a gradient step outside the chain, prompts of different numbers, dropout in the denoiser, or
                something that asks for a gradient and cannot get one.
        """
        if isinstance(truncation, str):
            truncation = draw_truncation(truncation, len(self.table))
        if truncation is None:
            truncation = Truncation(tuple(range(len(self.table)) if grad_steps is None else grad_steps))
        elif grad_steps is not None:
            raise ValueError("grad_steps and truncation both say which steps carry gradient: give one of them")
        self._let_go()
        self.truncation, last = truncation, truncation.last_step
        table = self.table if last is None else self.table.ending_at(last)
        prompts, cond = self._encode(prompts, negative_prompts, embeddings)
        chain = self._chain(cond, generator, table, truncation.input_gradient)
        task = self._task(chain, cond, prompts, metadata)
        wants_gradient = latents is not None and latents.requires_grad
        grad_steps = self._grad_steps(truncation.grad_steps, chain, wants_gradient)
        self.plan = plan or self._make_plan(task, grad_steps, wants_gradient)
        x = table.init_scale * self.model.initial_latents(len(prompts), self.size, generator, latents)
        return self._run(chain, self.plan, x)

    def renoise(
        self,
        latents: torch.Tensor,
        prompts: str | list[str],
        negative_prompts: str | list[str] | None = None,
        generator: Generator = None,
        metadata: Sequence[Any] | None = None,
        embeddings: Embeddings | None = None,
    ) -> torch.Tensor:
        """Images [B, 3, H, W] of latents noised to the level of the chain's last step and denoised by that step alone.

        The step predicts the clean latents and carries gradient. Source: Clark et al. 2024, DRaFT-LV; equation in
        `draw_truncation`.

        Args:
            latents: [B, C, h, w] of a finished chain, such as `self.latents`; taken as constants.
            prompts, negative_prompts, generator, metadata, embeddings: as for the sampler itself; the generator gives
                the noise.
        """
        self._let_go()
        prompts, cond = self._encode(prompts, negative_prompts, embeddings)
        chain = self._chain(cond, generator, self.table.last_alone(), True)
        self.plan = self._make_plan(self._task(chain, cond, prompts, metadata), self._grad_steps((0,), chain))
        signal, level = self.table.level[-1]
        x = latents.detach()
        return self._run(chain, self.plan, signal * x + level * self.model.noise(x, generator))

    def _encode(
        self, prompts: str | list[str], negative_prompts: str | list[str] | None, given: Embeddings | None
    ) -> tuple[list[str], Conditioning]:
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        _check_prompts(prompts, negative_prompts)
        given = given or {}
        self.say_what_is_cut(  # of texts that are read, that is
            () if "prompt_embeds" in given else prompts,
            None if "negative_prompt_embeds" in given else negative_prompts,
        )
        if isinstance(negative_prompts, str):
            negative_prompts = [negative_prompts] * len(prompts)
        self.model.check_embeddings(given, len(prompts))
        guided = self._guided(negative_prompts, given)
        if self.model.reads_text(negative_prompts, given, guided):
            self.model.check_text(may_be_away=self._text is not None)
        encode = self.model.encode if self._text is None else self._text.encode
        cond = encode(prompts, negative_prompts, guided, self.size, given)
        return prompts, replace(cond.cast(self.model.dtype), embedded_guidance=self.guidance_scale)

    def say_what_is_cut(self, prompts: Sequence[str], negative_prompts: str | list[str] | None = None) -> None:
        """One line in the log where texts are longer than the text encoders read, of which each call tells as well.

        To be called with all prompts of a run, which are then counted together.
        """
        self._cut.look_at(prompts)
        if self._guided(negative_prompts):
            self._cut_negative.look_at(text for text in _as_list(negative_prompts) if text)

    def encode_ahead(self, prompts: Sequence[str], negative_prompt: str | None = None) -> None:
        """With `cache_text`: encode these prompts now, in one visit of the text encoders to the device."""
        if self._text is not None:
            self._text.remember(list(prompts), negative_prompt, self._guided(negative_prompt), self.size)

    def _room_bytes(self) -> float:
        """What the device, or the budget, has left at the moment."""
        device = self.model.device
        if device.type != "cuda":
            return math.inf
        allocated = torch.cuda.memory_allocated(device)
        free = driver_bytes(device) + torch.cuda.memory_reserved(device) - allocated
        return free if self.budget_bytes is None else min(free, self.budget_bytes - allocated)

    def _guided(self, negative_prompts: str | list[str] | None, given: Embeddings = MappingProxyType({})) -> bool:
        """Whether the denoiser runs with and without the prompt; FLUX does where there is a negative prompt."""
        has_negative = negative_prompts is not None or "negative_prompt_embeds" in given
        return bool(self.cfg_scale > 1) and (has_negative or not self.model.embeds_guidance)

    def score(self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> tuple[torch.Tensor, Any]:
        """The reward that was given at the start, (scores [B], info), run as the plan of the last call says."""
        assert self.reward is not None, "the sampler was made without a reward"
        stage = "batch" if self.plan is None or self.plan.reward is None else self.plan.reward.name
        if stage == "batch":
            return self.reward(images, prompts, metadata)
        scores, info = score_in_chunks(self.reward, int(stage.partition(":")[2]), images, prompts, metadata)
        own = [self.reward] if isinstance(self.reward, torch.nn.Module) else []
        return raise_if_changed(scores, getattr(self.reward, "state", partial(versions, own))), info

    def plan_for(self, batch: int, num_grad_steps: int | None = None, negative_prompt: str | None = None) -> Plan:
        """The plan of a batch of this size with so many gradient steps; None: all of them, which needs the most memory.

        negative_prompt: of all prompts; what it says does not matter, but for FLUX whether there is one does.

        Raises:
            BudgetInfeasible: no plan keeps the memory budget.
        """
        task = self._blank_task(batch, negative_prompt)
        steps = task.chain.num_steps
        count = steps if num_grad_steps is None else num_grad_steps
        return self._make_plan(task, list(range(steps - count, steps)))

    def solver(self, batch: int, negative_prompt: str | None = None) -> Solver:
        """What makes the plans of batches of this size within a memory budget; its `table` says what they cost.

        Costs are those under the autocast state at the time of the call: that of the sampler's own calls, if it is to
        serve them.
        """
        return self._solver(self._blank_task(batch, negative_prompt), len(self.table))

    def cost_table(self, batch: int, gpu: Gpu | None = None, negative_prompt: str | None = None) -> CostTable:
        """What a training step costs at this batch size: measured on the device or, for a model on meta tensors,
        estimated for a GPU that need not be here.
        """
        task = self._blank_task(batch, negative_prompt)
        with torch.enable_grad():
            return self._costs(task, gpu)

    def settled_budget(self, batch: int, negative_prompt: str | None = None) -> int | None:
        """The memory budget in bytes, None for none. On a GPU everything has then been measured, and has run once."""
        if not self._has_budget():
            return None
        task = self._blank_task(batch, negative_prompt)
        self._solver(task, len(self.table))
        return self._settled_budget(task)

    def tighten(self, factor: float = 0.9) -> int:
        """Plan with less than the last call took from now on, since the device ran out; returns the new budget.

        Raises:
            BudgetInfeasible: there is no leaner plan.
        """
        if self.model.device.type != "cuda" and not self._has_budget():
            raise BudgetInfeasible(0, 0)
        if self._fast is not None and self._fast.graphs is not None:
            self._fast.graphs = GraphedCalls()  # those that were recorded keep their memory
        if not self._has_budget():
            taken_bytes = torch.cuda.get_device_properties(self.model.device).total_memory
        elif self.budget_bytes is None or not self._solvers:  # while the costs were measured, the leanest way first
            raise BudgetInfeasible(self.budget_bytes or 0, self.budget_bytes or 0)
        else:
            peak_bytes = self.plan.peak_bytes if self.plan else 0
            taken_bytes = min(self.budget_bytes, peak_bytes or self.budget_bytes)
        budget_bytes = int(factor * taken_bytes)
        for solver in self._solvers.values():
            solver.plan(range(solver.num_steps), budget_bytes)
        self.budget_bytes = budget_bytes
        return budget_bytes

    def _let_go(self) -> None:
        """Drop what is left of the last call: it holds its whole chain where no backward pass went through it."""
        self.base_mse = self.latents = None

    def _run(self, chain: Chain, plan: Plan, x: torch.Tensor) -> torch.Tensor:
        images, x, penalty = self._images(chain, plan, x)
        if self.compare_with_base:
            self.base_mse = penalty / max(1, len(plan.resident_steps) + len(plan.replayed_steps))
        self.latents = x
        return images

    def _images(self, chain: Chain, plan: Plan, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(images, latents, sum of the penalties) of a chain that starts at x."""
        chain = replace(chain, offloader=self._offloader(plan), replay=self._replay(chain, plan))
        x, penalty = run_penalised_chain(chain, plan, x)
        model, decoder, blocks = self.model, plan.decoder, self._decoder_blocks
        images = run_decoder_stage(model.decode, x, decoder.name, decoder.options, blocks, model.decode_by_bands)
        return raise_if_changed(images, partial(versions, [model.decoder])), x, penalty

    def _chain(self, cond: Conditioning, generator: Generator, table: StepTable, input_gradient: bool) -> Chain:
        model, rescale = self.model, self.guidance_rescale
        conditions = self._conditions(cond)
        leaves = {id(tensor): tensor.detach().requires_grad_() for tensor in conditions}
        cond, scale = cond.exchanged(leaves), leaves.get(id(self.cfg_scale), self.cfg_scale)
        timesteps = self._timesteps_of(table)
        combined = isinstance(scale, torch.Tensor) or cond.branches == 1 or rescale > 0
        update = Update(table, (1.0,) if isinstance(scale, torch.Tensor) or combined else (1 - scale, scale))

        def network(i: int, state: torch.Tensor, predict: Predict = model.predict) -> torch.Tensor:
            y = predict(update.model_input(i, state), timesteps[i], cond)
            return rescaled_guidance(y, scale, rescale) if combined and cond.branches == 2 else y

        def advance(i: int, state: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            noise = model.noise(update.latents(state), generator) if self.draw_noise else None
            return update.advance(i, state, y, noise)

        def base_model_penalty(i: int, state: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            with torch.inference_mode(), model.adapters_off():
                base = network(i, state)
            wide = torch.promote_types(y.dtype, torch.float32)
            delta = update.blended(y.to(wide) - base.to(wide))
            return delta.square().mean(), update.blended_adjoint(2 / delta.numel() * delta)

        return Chain(
            len(table),
            network,
            advance,
            update.adjoint,
            model.trainable(),
            self._denoiser_blocks,
            sink=self.gradient_sink,
            start=update.start,
            finish=update.latents,
            input_gradient=input_gradient,
            penalty=base_model_penalty if self.compare_with_base else None,
            # What is recorded would hold the graph of the conditions.
            sample=None if self._fast is None or conditions else partial(network, predict=self._fast.for_chain()),
            conditions=conditions,
            leaves=list(leaves.values()),
            state=partial(self._state, [*cond.tensors(), *leaves.values()]),
        )

    def _conditions(self, cond: Conditioning) -> list[torch.Tensor]:
        """What the network reads beside latents and its own parameters, as far as it wants a gradient.

        Raises:
            ValueError: there is some, and an option that knows the denoiser's parameters alone.
        """
        read = [*cond.tensors(), *([self.cfg_scale] if isinstance(self.cfg_scale, torch.Tensor) else ())]
        found = list({id(tensor): tensor for tensor in read if tensor.requires_grad}.values())
        if found and torch.is_grad_enabled() and (self.compare_with_base or self.gradient_sink is not None):
            option = "compare_with_base" if self.compare_with_base else "an optimizer in the backward pass"
            raise ValueError(
                f"embeddings or guidance want a gradient, and {option} gives it to the denoiser's parameters alone: "
                "leave one of the two out"
            )
        return found if torch.is_grad_enabled() else []

    def _state(self, read: Sequence[torch.Tensor]) -> Hashable:
        return versions([self.model.denoiser]), self.model.settings(), tuple(map(version, read))

    def _timesteps_of(self, table: StepTable) -> torch.Tensor:
        """The chain's timesteps on the device, copied there once: each copy would wait for the device."""
        known = self._timesteps.get(table.timesteps)
        if known is None or known.device != self.model.device:
            known = torch.tensor(table.timesteps, device=self.model.device)
            self._timesteps[table.timesteps] = known
        return known

    def _replay(self, chain: Chain, plan: Plan) -> Callable[[int, torch.Tensor], torch.Tensor] | None:
        """Recorded replays, which reserve what they keep: a budget has better uses for that."""
        if self._fast is None or self._has_budget() or not plan.replayed_steps or chain.conditions:
            return None
        predict = self._fast.for_replays(tuple(sorted(plan.replay_options.items())))
        network: Any = chain.network
        return None if predict is None else partial(network, predict=predict)

    def _offloader(self, plan: Plan) -> Offloader | None:
        if torch.is_grad_enabled():
            self._pool().begin_chain()
        return Offloader(self.model.device, self._pool()) if plan.host_bytes else None

    def _pool(self) -> HostPool:
        if self._host_pool is None or self._host_pool.device != self.model.device:
            self._host_pool = HostPool(self.model.device, lockable_bytes(self.host_memory_bytes))
        return self._host_pool

    def _grad_steps(self, grad_steps: Iterable[int], chain: Chain, wants_gradient: bool = False) -> list[int]:
        """Ascending gradient steps; none where nothing could receive a gradient.

        wants_gradient: the initial latents do.
        """
        steps = sorted(set(grad_steps))
        if steps and not 0 <= steps[0] <= steps[-1] < chain.num_steps:
            raise ValueError(f"gradient steps {steps} lie outside the chain: use 0 to {chain.num_steps - 1}")
        return steps if torch.is_grad_enabled() and (chain.receivers or wants_gradient) else []

    def _has_budget(self) -> bool:
        return self.budget_bytes is not None or (self._takes_what_is_free and self.model.device.type == "cuda")

    def _settled_budget(self, task: TrainingStep) -> int:
        """The budget, on a GPU held to what is free there. That is looked at once, after the costs are known: kernels
        are loaded then, and libraries have taken what they take."""
        if not self._budget_is_settled and self.model.device.type == "cuda":
            # One that runs out has loaded what it reached; the plan, which is leaner, decides what fits.
            unless_out_of_memory(partial(self._warm_up, task))
            wanted_bytes, memory = self.budget_bytes, device_memory(self.model.device)
            self.budget_bytes, self.budget_note = budget_from_free(**asdict(memory), wanted_bytes=wanted_bytes)
            is_less = wanted_bytes is not None and wanted_bytes > self.budget_bytes
            logger.log(logging.WARNING if is_less else logging.INFO, self.budget_note)
        self._budget_is_settled = True
        assert self.budget_bytes is not None
        return self.budget_bytes

    def _warm_up(self, task: TrainingStep) -> None:
        """One gradient step and its pictures, forward and back, as lean as can be; takes no random number."""
        chain = replace(self._chain(task.cond, None, self.table.last_alone(), True), sink=None)
        with torch.random.fork_rng(devices=[self.model.device]), torch.enable_grad():
            x = self.model.initial_latents(task.batch, self.size, None, None).requires_grad_()
            images, _, _ = self._images(chain, leanest(1, (0,)), x)
            torch.autograd.grad(images.sum(), [x, *chain.receivers], allow_unused=True)

    def _make_plan(self, task: TrainingStep, grad_steps: list[int], wants_gradient: bool = False) -> Plan:
        """wants_gradient: the initial latents do."""
        # A chain that ends early is planned as if it went on: one solver serves all lengths but that of a single step.
        num_steps = 1 if task.chain.num_steps == 1 else len(self.table)
        if not (self._has_budget() and torch.is_grad_enabled() and (grad_steps or wants_gradient)):
            return leanest(num_steps, grad_steps)
        solver = self._solver(task, num_steps)
        return solver.plan(grad_steps, self._settled_budget(task))

    def _solver(self, task: TrainingStep, num_steps: int) -> Solver:
        cast = autocast_dtype(self.model.device)
        embeds, receivers = task.cond.embeds, len(task.chain.receivers)
        key = (num_steps, task.batch, embeds.shape, embeds.dtype, receivers, cast)
        if key not in self._solvers:
            self._solvers[key] = Solver(self._costs(task), num_steps, num_steps)
        table, limit_bytes = self._solvers[key].table, self._pool().limit_bytes
        if limit_bytes is not None and limit_bytes < (table.host_limit_bytes or 0):  # the driver has refused more
            self._solvers[key] = Solver(replace(table, host_limit_bytes=limit_bytes), num_steps, num_steps)
        return self._solvers[key]

    def _costs(self, task: TrainingStep, gpu: Gpu | None = None) -> CostTable:
        table = measured_table(task) if gpu is None else estimated_table(task, gpu)
        if self._fast is None or self._fast.graphs is None:
            return table
        return replace(table, fixed={**table.fixed, "graphs": table.sampling_bytes})

    def _blank_task(self, batch: int, negative_prompt: str | None) -> TrainingStep:
        cond = self.model.blank_conditioning(batch, self._guided(negative_prompt), self.size)
        prompt, metadata = self.example
        return self._task(self._chain(cond, None, self.table, True), cond, [prompt] * batch, [metadata] * batch)

    def _task(
        self, chain: Chain, cond: Conditioning, prompts: list[str], metadata: Sequence[Any] | None
    ) -> TrainingStep:
        return TrainingStep(
            model=self.model,
            chain=chain,
            cond=cond,
            size=self.size,
            decoder_blocks=self._decoder_blocks,
            resident=self.model.modules(with_text=self._text is None or not self._text.away),
            prompts=prompts,
            metadata=[{} for _ in prompts] if metadata is None else list(metadata),
            reward=self.reward,
            reward_bytes=self.reward_bytes,
            reserve_bytes=self.reserve_bytes,
            optimizer_bytes=self.optimizer_bytes,
            keeps_gradients=self.keeps_gradients,
            host_limit_bytes=self._pool().limit_bytes or 0,
        )


def _scale(scale: float | torch.Tensor) -> float | torch.Tensor:
    """A number as it is, and of tensors those of one number that want a gradient.

    Raises:
        ValueError: a tensor of several numbers.
    """
    if not isinstance(scale, torch.Tensor):
        return scale
    if scale.numel() != 1:
        raise ValueError(f"a guidance scale of shape {list(scale.shape)}: give one number for all prompts")
    return scale if scale.requires_grad else scale.item()


def _number(name: str, value: Any) -> float:
    """Raises ValueError: a tensor that wants a gradient, which ends at numbers."""
    if isinstance(value, torch.Tensor) and value.requires_grad:
        raise ValueError(f"{name} is a tensor that requires a gradient, and gets none here: give a number")
    return float(value)


def _check_prompts(prompts: list[str], negative_prompts: str | list[str] | None) -> None:
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("prompts must be one text or more, and nothing but texts")
    if not all(isinstance(text, str | None) for text in _as_list(negative_prompts)):
        raise ValueError("negative_prompts must be a text, or a list of them, one for each prompt")
    try:
        "".join(text for text in (*prompts, *_as_list(negative_prompts)) if text).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            "a prompt is no whole Unicode text, as from a terminal of another encoding: use UTF-8"
        ) from error
    if isinstance(negative_prompts, list) and len(negative_prompts) != len(prompts):
        raise ValueError(f"{len(negative_prompts)} negative prompts for {len(prompts)} prompts: give one, or one each")


def _as_list(negative_prompts: str | list[str] | None) -> list[str | None]:
    return [*negative_prompts] if isinstance(negative_prompts, list) else [negative_prompts]
