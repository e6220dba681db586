"""AlignPropTrainer: reward gradients through the denoising chain into adapters, step by step.

Source: Prabhudesai et al. 2023, "Aligning Text-to-Image Diffusion Models with Reward Backpropagation". Names, meaning
and the order of random draws are those of trl 0.23.1's trainer, so that a script for it runs here and, in fp32 and
with the same seeds, sees the same rewards.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import set_seed
from huggingface_hub import PyTorchModelHubMixin

from alignprop_fast.doctor.first_time import examine_once
from alignprop_fast.evaluation.early_stopping import Stateful
from alignprop_fast.report.model_card import write_model_card
from alignprop_fast.rewards.reward import as_reward, check_gradient
from alignprop_fast.sampling import Truncation
from alignprop_fast.training.config import AlignPropConfig
from alignprop_fast.training.gates import check_rule, gate_draws, truncation_of
from alignprop_fast.training.metrics import (
    BatchMetrics,
    BatchShare,
    StepMetrics,
    averages,
    image_scores,
    joined,
    joined_scores,
    peak_bytes,
    reset_peak_bytes,
    reward_parts,
)
from alignprop_fast.training.out_of_memory import with_less_memory
from alignprop_fast.training.placement import make_accelerator, output_folder
from alignprop_fast.training.prepare import compute_dtype, make_sampler, prepare_model
from alignprop_fast.training.processes import copy_of_first, largest, of_all_processes, wait_for_all
from alignprop_fast.training.state import find_resume, restore_training, save_training
from alignprop_fast.training.weight_update import WeightUpdate

logger = logging.getLogger(__name__)


class AlignPropTrainer(PyTorchModelHubMixin):
    """Fine-tunes a diffusion pipeline by the gradient of a reward.

    Args:
        config: see `AlignPropConfig`.
        reward_function: (images [B, 3, H, W] in [0, 1], prompts, prompt metadata) -> (scores [B], info), differentiable
            in the images. Numbers and tensors in a dictionary `info` are logged as parts of the reward.
        prompt_function: () -> (prompt, metadata). It should draw from Python's `random`, whose state checkpoints keep.
        sd_pipeline: a `DefaultDDPOStableDiffusionPipeline`.
        image_samples_hook: called as (pairs, global step, tracker or None) every `log_image_freq` steps; `pairs` holds
            images, prompts, prompt_metadata and rewards of the last micro-batch, detached.
        stateful: objects, by name, whose state checkpoints keep and a resumed run gets back.

    Raises:
        ValueError, FileNotFoundError: an option that cannot work here, or a checkpoint that cannot be resumed from.
    """

    _tag_names: ClassVar[list[str]] = ["alignprop", "reward-backpropagation"]

    def __init__(
        self,
        config: AlignPropConfig,
        reward_function: Callable[[torch.Tensor, tuple[str, ...], tuple[Any, ...]], tuple[torch.Tensor, Any]],
        prompt_function: Callable[[], tuple[str, Any]],
        sd_pipeline: Any,
        image_samples_hook: Callable[[dict[str, Any], int, Any], Any] | None = None,
        stateful: Mapping[str, Stateful] | None = None,
    ):
        if not hasattr(sd_pipeline, "get_trainable_layers"):
            raise ValueError("sd_pipeline must be a DefaultDDPOStableDiffusionPipeline: give it your model's folder")
        self.config, self.sd_pipeline = config, sd_pipeline
        self.reward_fn, self.prompt_fn = reward_function, prompt_function
        self.image_samples_callback = image_samples_hook
        self.stateful = dict(stateful or {})
        config.check_packages()
        resume_from = find_resume(config)
        check_rule(config)  # before the model is placed
        self.accelerator = make_accelerator(config)
        examine_once(self.accelerator.device, compute_dtype(config))
        set_seed(config.seed, device_specific=True)
        self.trainable_layers = prepare_model(sd_pipeline, self.accelerator.device, config)
        if self.accelerator.num_processes > 1:  # each process drew adapters of its own: take the first one's
            copy_of_first([parameter.data for parameter in self.trainable_layers])
        self.autocast = sd_pipeline.autocast or self.accelerator.autocast
        self.sampler = make_sampler(sd_pipeline, config, reward_function)
        truncation_of(config, self.sampler.table, random.Random())  # a rule may not fit the scheduler
        reward = as_reward(reward_function)
        self._observer = reward if reward.observes else None
        # After the sampler, which changes the memory layout of convolutions.
        self.update = WeightUpdate(config, self.accelerator, self.trainable_layers, sd_pipeline.use_lora)
        self.optimizer = self.update.optimizer
        if self.update.in_backward is not None:
            self.sampler.gradient_sink = self.update.in_backward.receive
            self.sampler.keeps_gradients = config.train_gradient_accumulation_steps > 1
        self.first_epoch = self.global_step = self.steps_done = self.skipped_steps = 0
        self.metrics: StepMetrics | None = None
        self._bad_in_a_row = self._micro_batch_index = 0
        if resume_from is not None:
            restore_training(self, resume_from)

    def train(self, epochs: int | None = None) -> None:
        """Train for epochs 0 (or the one after the resumed checkpoint) to `epochs` - 1; None: `num_epochs`."""
        for _ in self.steps(epochs):
            pass

    def steps(self, epochs: int | None = None) -> Iterator[StepMetrics]:
        """`train` as a generator: yields after every optimizer step; leave the loop between two whenever you like.

        A checkpoint is written every `save_freq` steps and at the end; after leaving early call `save_checkpoint()`.

        Raises:
            ValueError: `max_bad_steps` steps in a row had a loss or gradient that is not finite.
        """
        for epoch in range(self.first_epoch, self.config.num_epochs if epochs is None else epochs):
            self.global_step = self.step(epoch, self.global_step)
            assert self.metrics is not None
            yield self.metrics
        if self.metrics is not None and self.steps_done % self.config.save_freq:
            self.save_checkpoint()

    def step(self, epoch: int, global_step: int) -> int:
        """One optimizer step: all micro-batches, update, log, hook, checkpoint when due; returns global_step + 1.

        `self.metrics` then says what happened.
        """
        config, learning_rate, begin = self.config, self.update.learning_rate, time.perf_counter()
        reset_peak_bytes(self.accelerator.device)
        batches, pairs = self._micro_batches()
        status, grad_norm = self._update(batches)
        self.steps_done += 1
        seconds = time.perf_counter() - begin
        images = len(batches) * config.train_batch_size * self.accelerator.num_processes
        self.metrics = StepMetrics(
            step=self.steps_done,
            **averages(batches),
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            status=status,
            images_per_second=images / seconds,
            peak_bytes=largest(peak_bytes(self.accelerator.device)),
            seconds=seconds,
        )
        self.accelerator.log({**self.metrics.to_log(), "epoch": epoch}, step=global_step)
        global_step += 1
        if self.image_samples_callback is not None and global_step % config.log_image_freq == 0:
            trackers = self.accelerator.trackers
            self.image_samples_callback(pairs, global_step, trackers[0] if trackers else None)
        self._stop_if_bad(status)
        if self.steps_done % config.save_freq == 0:
            self.global_step = global_step
            self.save_checkpoint()
        return global_step

    def compute_rewards(self, prompt_image_pairs: dict[str, Any]) -> torch.Tensor:
        """Scores [B] of the pairs of `_generate_samples`."""
        return self._score(prompt_image_pairs)[0]

    def calculate_loss(self, rewards: torch.Tensor) -> torch.Tensor:
        """10 - mean reward (a scalar), trl's loss; the constant only sets the level of the curve."""
        return 10.0 - rewards.mean()

    def _score(self, pairs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        rewards, info = self.sampler.score(pairs["images"], pairs["prompts"], pairs["prompt_metadata"])
        check_gradient(getattr(self.reward_fn, "__name__", type(self.reward_fn).__name__), rewards, pairs["images"])
        return rewards, info

    def _micro_batches(self) -> tuple[list[BatchMetrics], dict[str, Any]]:
        """All micro-batches of a step, over all processes; and the pairs of the last one here."""
        count = self.config.train_gradient_accumulation_steps
        shares: list[BatchShare] = []
        pairs: dict[str, Any] = {}
        for self._micro_batch_index in range(count):
            good = all(math.isfinite(earlier.loss) for earlier in shares)
            self.update.begin_backward(last=good and self._micro_batch_index == count - 1)
            share, pairs = self._micro_batch()
            shares.append(share)
        return self._join(shares), pairs

    def _micro_batch(self) -> tuple[BatchShare, dict[str, Any]]:
        """Images, rewards and backward of one micro-batch: this process's share, and its pairs for the hook, detached.

        A backward pass that runs out of memory is repeated alone.
        """
        pairs, info, loss = self._repeatable(self._first_term)
        plan, truncation, latents = self.sampler.plan, self.sampler.truncation, self.sampler.latents
        assert plan is not None and truncation is not None and latents is not None
        # Detached: a loss that is not finite gets no backward pass, and the term would hold its whole chain.
        base_mse = None if self.sampler.base_mse is None else self.sampler.base_mse.detach()
        for step in truncation.renoise_steps:
            loss += self._repeatable(partial(self._renoised_term, pairs, latents, step))
        share = BatchShare(
            rewards=pairs["rewards"].float().cpu(),
            reward_parts=reward_parts(info),
            loss=loss.item(),
            gradient_steps=len(plan.resident_steps) + len(plan.replayed_steps) + len(truncation.renoise_steps),
            base_mse=None if base_mse is None else base_mse.float().item(),
            scores={} if self._observer is None else image_scores(info),
        )
        if self.accelerator.num_processes == 1:  # several observe in `_join`
            self._observe([share])
        return share, pairs

    def _join(self, shares: list[BatchShare]) -> list[BatchMetrics]:
        """The step's micro-batches over all processes, which exchange them once, before they reduce gradients."""
        by_batch = list(zip(*of_all_processes(shares), strict=True))
        if self.accelerator.num_processes > 1:
            for of_batch in by_batch:
                self._observe(of_batch)
        return [joined(of_batch) for of_batch in by_batch]

    def _observe(self, shares: Sequence[BatchShare]) -> None:
        """Show one micro-batch of all processes to a reward that observes its scores."""
        if self._observer is not None:
            self._observer.observe(joined_scores(shares))

    def _repeatable(self, work: Callable[[], Any]) -> Any:
        if self.update.in_backward is not None:  # steps that are made cannot be repeated
            return work()
        return with_less_memory(self.sampler, work)

    def _first_term(self) -> tuple[dict[str, Any], Any, torch.Tensor]:
        """Pairs with their rewards, detached; info; this term's share of the loss."""
        with self.autocast(), torch.enable_grad():
            pairs = self._generate_samples(self.config.train_batch_size)
            rewards, info = self._score(pairs)
            loss = self._backward(rewards)
        return {**pairs, "images": pairs["images"].detach(), "rewards": rewards.detach()}, info, loss

    def _renoised_term(self, pairs: dict[str, Any], latents: torch.Tensor, step: int) -> torch.Tensor:
        """The share of the loss of the same pictures, noised and recovered by one step."""
        prompts, metadata = list(pairs["prompts"]), pairs["prompt_metadata"]
        with self.autocast(), torch.enable_grad():
            negative = self.config.negative_prompts
            images = self.sampler.renoise(latents, prompts, negative, metadata=metadata, step=step)
            return self._backward(self.compute_rewards({**pairs, "images": images}))

    def _backward(self, rewards: torch.Tensor) -> torch.Tensor:
        """Backward of one of the losses whose mean counts; returns its share, detached, fp32."""
        assert self.sampler.truncation is not None
        loss = self.calculate_loss(rewards)
        if self.sampler.base_mse is not None:
            loss = loss + self.config.kl_weight * self.sampler.base_mse
        loss = loss / max(1, self.sampler.truncation.terms)
        # A loss that is not finite makes the step void; its gradient is worth no time.
        if loss.requires_grad and math.isfinite(loss.item()):
            self.update.backward(loss)
        return loss.detach().float()

    def _update(self, batches: list[BatchMetrics]) -> tuple[str, float]:
        """Step, or skip; returns (status, gradient norm before clipping)."""
        finite = all(math.isfinite(batch.loss) for batch in batches)
        grad_norm = 0.0
        with_gradient = finite and any(batch.gradient_steps for batch in batches)
        if with_gradient:
            grad_norm = self.update.step()
            finite = math.isfinite(grad_norm)
        self.update.zero_grad()
        return ("not_finite" if not finite else "ok" if with_gradient else "no_gradient"), grad_norm

    def _stop_if_bad(self, status: str) -> None:
        bad = status == "not_finite"
        self._bad_in_a_row = self._bad_in_a_row + 1 if bad else 0
        self.skipped_steps += bad
        if bad:
            logger.warning("step %d: loss or gradient is not finite, step skipped", self.steps_done)
        if self._bad_in_a_row >= self.config.max_bad_steps:
            raise ValueError(
                f"loss or gradient was not finite in {self._bad_in_a_row} steps in a row: lower the learning rate, "
                "check the reward, or train in fp32"
            )

    def _draw_truncation(self) -> Truncation:
        processes = self.accelerator.num_processes
        draws = gate_draws(self.config, processes, self.steps_done, self._micro_batch_index)
        return truncation_of(self.config, self.sampler.table, draws)

    def _generate_samples(
        self, batch_size: int, with_grad: bool = True, prompts: list[str] | None = None
    ) -> dict[str, Any]:
        """Images [B, 3, H, W] in [0, 1] with their prompts (B of the prompt function's, or those given)."""
        if prompts is None:
            drawn, metadata = zip(*[self.prompt_fn() for _ in range(batch_size)], strict=True)
        else:
            drawn, metadata = tuple(prompts), tuple({} for _ in prompts)
        with torch.set_grad_enabled(with_grad):
            truncation = self._draw_truncation() if with_grad else Truncation(())
            images = self.sampler(list(drawn), self.config.negative_prompts, truncation=truncation, metadata=metadata)
        return {"images": images, "prompts": drawn, "prompt_metadata": metadata}

    def averaged_weights(self) -> AbstractContextManager[None]:
        """A block in which the model has the moving average of its weights (`ema_decay`); without one nothing changes.

        For pictures, evaluation and `save_pretrained`; not for training steps and checkpoints.
        """
        return self.update.averaged()

    def save_checkpoint(self) -> Path:
        """Write everything a resume needs to `checkpoints/checkpoint_<steps done>`; every process must call it."""
        return save_training(self)

    def _save_pretrained(self, save_directory: str | Path) -> None:
        """Called by `save_pretrained` and `push_to_hub`: the pipeline, the LoRA file, and a model card."""
        if self.accelerator.is_main_process:
            self.sd_pipeline.save_pretrained(save_directory)
            self._write_card(save_directory)
        wait_for_all()

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write README.md, in the Hub's form, into the output folder."""
        if self.accelerator.is_main_process:
            self._write_card(output_folder(self.config), model_name, dataset_name, tags)

    def _write_card(
        self,
        folder: str | Path,
        name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        write_model_card(
            folder,
            name=name or Path(folder).resolve().name,
            base_model=self.sd_pipeline.pretrained_model,
            dataset_name=dataset_name,
            tags={*self._tag_names, *([tags] if isinstance(tags, str) else tags or [])},
            lora=self.sd_pipeline.use_lora,
            options={"optimizer steps": self.steps_done, **self.config.to_dict()},
        )
