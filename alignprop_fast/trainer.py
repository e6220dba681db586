"""AlignPropTrainer: reward gradients through the denoising chain into adapters, step by step.

Source: Prabhudesai et al. 2023, "Aligning Text-to-Image Diffusion Models with Reward Backpropagation". Names, meaning
and the order of random draws are those of trl 0.23.1's trainer, so that a script for it runs here and, in fp32 and
with the same seeds, sees the same rewards.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import broadcast, set_seed
from huggingface_hub import PyTorchModelHubMixin

from alignprop_fast.config import AlignPropConfig
from alignprop_fast.generate import DifferentiableSampler, draw_gates, trl_gates
from alignprop_fast.metrics import BatchMetrics, StepMetrics, averages, peak_bytes, reset_peak_bytes, reward_parts
from alignprop_fast.model_card import write_model_card
from alignprop_fast.optim import make_optimizer, state_bytes
from alignprop_fast.out_of_memory import with_less_memory
from alignprop_fast.placement import make_accelerator, output_folder, place_model
from alignprop_fast.training_state import find_resume, restore_training, save_training

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
    ):
        if not hasattr(sd_pipeline, "get_trainable_layers"):
            raise ValueError("sd_pipeline must be a DefaultDDPOStableDiffusionPipeline: give it your model's folder")
        self.config, self.sd_pipeline = config, sd_pipeline
        self.reward_fn, self.prompt_fn = reward_function, prompt_function
        self.image_samples_callback = image_samples_hook
        resume_from = find_resume(config)
        self._gates()  # a truncation that cannot work is to fail here, before the model is placed
        self.accelerator = make_accelerator(config)
        set_seed(config.seed, device_specific=True)
        place_model(sd_pipeline, self.accelerator, config)
        unet = sd_pipeline.get_trainable_layers(config.lora_rank, config.lora_alpha)
        self.trainable_layers = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        if self.accelerator.num_processes > 1:  # each process has drawn adapters of its own: the first one's count
            broadcast([parameter.data for parameter in self.trainable_layers])
        self.optimizer = self.accelerator.prepare(self._setup_optimizer(self.trainable_layers))
        self.autocast = sd_pipeline.autocast or self.accelerator.autocast
        self.sampler = DifferentiableSampler(
            sd_pipeline.sd_pipeline,
            config.sample_num_steps,
            config.sample_guidance_scale,
            config.sample_eta,
            config.memory_budget,
            guidance_rescale=config.guidance_rescale,
            height=config.height,
            width=config.width,
            draw_unused_noise=True,
            reward=reward_function,
            reward_bytes=reward_function.weight_bytes() if hasattr(reward_function, "weight_bytes") else 0,
            optimizer_bytes=state_bytes(config.optimizer, self.trainable_layers),
        )
        self.first_epoch = self.global_step = self.steps_done = self.skipped_steps = 0
        self.metrics: StepMetrics | None = None
        self._bad_in_a_row = 0
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
        begin, config = time.perf_counter(), self.config
        reset_peak_bytes(self.accelerator.device)
        self.sd_pipeline.unet.train()
        batches: list[BatchMetrics] = []
        pairs: dict[str, Any] = {}
        for _ in range(config.train_gradient_accumulation_steps):
            batch, pairs = with_less_memory(self.sampler, self._micro_batch)
            batches.append(batch)
        status, grad_norm = self._update(batches)
        self.steps_done += 1
        seconds = time.perf_counter() - begin
        images = len(batches) * config.train_batch_size * self.accelerator.num_processes
        self.metrics = StepMetrics(
            step=self.steps_done,
            **averages(batches),
            grad_norm=grad_norm,
            status=status,
            images_per_second=images / seconds,
            peak_bytes=peak_bytes(self.accelerator.device),
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
        return self.sampler.score(pairs["images"], pairs["prompts"], pairs["prompt_metadata"])

    def _micro_batch(self) -> tuple[BatchMetrics, dict[str, Any]]:
        """Images, reward and backward of one micro-batch; returns its numbers and, for the hook, its detached pairs."""
        with self.autocast(), torch.enable_grad():
            pairs = self._generate_samples(self.config.train_batch_size)
            rewards, info = self._score(pairs)
            loss = self.calculate_loss(rewards)
            # A loss that is not finite makes the step void; its gradient is worth no time.
            if loss.requires_grad and math.isfinite(loss.item()):
                self.accelerator.backward(loss)
        every_reward = self.accelerator.gather(rewards.detach()).float()
        plan = self.sampler.plan
        assert plan is not None
        batch = BatchMetrics(
            reward_mean=every_reward.mean().item(),
            reward_std=every_reward.std(correction=0).item(),
            reward_parts=reward_parts(info),
            loss=self.accelerator.reduce(loss.detach().float(), "mean").item(),
            gradient_steps=len(plan.resident_steps) + len(plan.replayed_steps),
        )
        return batch, {**pairs, "images": pairs["images"].detach(), "rewards": rewards.detach()}

    def _update(self, batches: list[BatchMetrics]) -> tuple[str, float]:
        """Clip and step, or skip; returns (status, gradient norm before clipping)."""
        finite = all(math.isfinite(batch.loss) for batch in batches)
        grad_norm = 0.0
        open_steps = torch.tensor(sum(batch.gradient_steps for batch in batches), device=self.accelerator.device)
        with_gradient = finite and self.accelerator.reduce(open_steps, "sum").item() > 0
        if with_gradient:
            self._average_gradients()
            grad_norm = float(self.accelerator.clip_grad_norm_(self.trainable_layers, self.config.train_max_grad_norm))
            finite = math.isfinite(grad_norm)
            # With gradient scaling (fp16) the step is what lowers the scale; it leaves the weights alone by itself.
            if finite or self.accelerator.scaler is not None:
                self.optimizer.step()
        self.optimizer.zero_grad()
        return ("not_finite" if not finite else "ok" if with_gradient else "no_gradient"), grad_norm

    def _average_gradients(self) -> None:
        """Mean of the gradients over the processes; the chain's backward goes past the hooks that DDP relies on."""
        if self.accelerator.num_processes == 1:
            return
        for parameter in self.trainable_layers:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([parameter.grad.flatten() for parameter in self.trainable_layers])
        sizes = [parameter.numel() for parameter in self.trainable_layers]
        for parameter, mean in zip(
            self.trainable_layers, self.accelerator.reduce(flat, "mean").split(sizes), strict=True
        ):
            parameter.grad = mean.view_as(parameter)

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

    def _setup_optimizer(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        config = self.config
        return make_optimizer(
            config.optimizer,
            parameters,
            learning_rate=config.train_learning_rate,
            betas=(config.train_adam_beta1, config.train_adam_beta2),
            weight_decay=config.train_adam_weight_decay,
            epsilon=config.train_adam_epsilon,
        )

    def _gates(self) -> tuple[int, ...]:
        config = self.config
        if config.truncation is not None:
            return draw_gates(config.truncation, config.sample_num_steps)
        return trl_gates(
            config.sample_num_steps,
            config.truncated_backprop_rand,
            config.truncated_backprop_timestep,
            config.truncated_rand_backprop_minmax,
        )

    def _generate_samples(
        self, batch_size: int, with_grad: bool = True, prompts: list[str] | None = None
    ) -> dict[str, Any]:
        """Images [B, 3, H, W] in [0, 1] with their prompts (B of the prompt function's, or those given)."""
        if prompts is None:
            drawn, metadata = zip(*[self.prompt_fn() for _ in range(batch_size)], strict=True)
        else:
            drawn, metadata = tuple(prompts), tuple({} for _ in prompts)
        with torch.set_grad_enabled(with_grad):
            images = self.sampler(
                list(drawn),
                self.config.negative_prompts,
                grad_steps=self._gates() if with_grad else (),
                metadata=metadata,
            )
        return {"images": images, "prompts": drawn, "prompt_metadata": metadata}

    def save_checkpoint(self) -> Path:
        """Write everything a resume needs to `checkpoints/checkpoint_<steps done>`; every process must call it."""
        return save_training(self)

    def _save_pretrained(self, save_directory: str | Path) -> None:
        """Called by `save_pretrained` and `push_to_hub`: the pipeline, the LoRA file, and a model card."""
        if self.accelerator.is_main_process:
            self.sd_pipeline.save_pretrained(save_directory)
            self._write_card(save_directory, None, None, None)
        self.accelerator.wait_for_everyone()

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write README.md, in the Hub's form, into the output folder."""
        if self.accelerator.is_main_process:
            self._write_card(output_folder(self.config), model_name, dataset_name, tags)

    def _write_card(
        self, folder: str | Path, name: str | None, dataset_name: str | None, tags: str | list[str] | None
    ) -> None:
        base = self.sd_pipeline.pretrained_model
        write_model_card(
            folder,
            name=name or Path(folder).resolve().name,
            base_model=None if base == "demo" or Path(base).expanduser().exists() else base,
            dataset_name=dataset_name,
            tags={*self._tag_names, *([tags] if isinstance(tags, str) else tags or [])},
            lora=self.sd_pipeline.use_lora,
            options={"optimizer steps": self.steps_done, **self.config.to_dict()},
        )
