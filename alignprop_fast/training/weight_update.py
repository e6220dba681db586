"""From gradients to weights: which tensors the optimizer sees, averaging over processes, clipping, the step itself, its
learning rate, and the moving average of what it makes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from alignprop_fast.planner.optimizer_state import merges
from alignprop_fast.sampling.draw import parse_rule
from alignprop_fast.training.averaged_weights import AveragedWeights
from alignprop_fast.training.config import AlignPropConfig
from alignprop_fast.training.flat_parameters import FlatParameters
from alignprop_fast.training.optimizer_in_backward import OptimizerInBackward
from alignprop_fast.training.optimizers import learning_rate_factor, make_optimizer
from alignprop_fast.training.processes import sum_in_place
from alignprop_fast.training.stochastic_rounding import RoundedOptimizer


class WeightUpdate:
    """The optimizer of a run and what it steps.

    Attributes:
        weights: the trainable parameters, adapters merged into one flat tensor where the optimizer allows it.
        optimizer: prepared by accelerate.
        in_backward: the optimizer inside the backward pass, or None.
        average: the moving average of the weights, or None.
        updates: optimizer steps made. One that was skipped moves neither the learning rate nor the average.

    Args:
        parameters: trainable ones, in the layout that they keep.
        use_lora: whether they are adapters.

    Raises:
        ValueError: an optimizer that cannot work here.
    """

    def __init__(
        self, config: AlignPropConfig, accelerator: Accelerator, parameters: Sequence[nn.Parameter], use_lora: bool
    ):
        self.config, self._accelerator = config, accelerator
        self.weights = FlatParameters(parameters, use_lora and merges(config.optimizer))
        self.in_backward: OptimizerInBackward | None = None
        if config.optimizer_in_backward:
            self._check_in_backward(use_lora)
            optimizer: Any = OptimizerInBackward(self._make, self.weights.tensors, config.train_max_grad_norm)
            self.in_backward = optimizer
        elif config.adapter_dtype == "bf16":
            optimizer = RoundedOptimizer(self._make, self.weights.tensors, config.seed)
        else:
            optimizer = self._make(self.weights.tensors)
        self.optimizer = accelerator.prepare(optimizer)
        self.average = AveragedWeights(self.weights.tensors, config.ema_decay) if config.ema_decay else None
        self.updates = 0
        self._factor = learning_rate_factor(config.lr_scheduler, config.warmup_steps, config.num_epochs)

    @property
    def learning_rate(self) -> float:
        """That of the next optimizer step."""
        return self.config.train_learning_rate * self._factor(self.updates)

    def begin_backward(self, last: bool) -> None:
        """Call before each backward pass of a step. last: with this one the gradients are complete."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        if self.in_backward is not None:
            self.in_backward.final = last

    def backward(self, loss: torch.Tensor) -> None:
        """Backward of a micro-batch's loss, as its share of the step's.

        Not by `Accelerator.backward`: all Accelerators of a process share the number that it divides by.
        """
        share = loss / self.config.train_gradient_accumulation_steps
        scaler = self._accelerator.scaler
        (share if scaler is None else scaler.scale(share)).backward()

    def step(self) -> float:
        """Step with the gradients, unless they are not finite; returns their norm before clipping."""
        norm, made = self._step() if self.in_backward is None else (self.in_backward.finish(), True)
        if made:
            self.updates += 1
            if self.average is not None:
                self.average.update()
        return norm

    def averaged(self) -> AbstractContextManager[None]:
        """A block in which the weights are their moving average; without one they stay as they are."""
        return nullcontext() if self.average is None else self.average.in_place()

    def restart_average(self) -> None:
        """Begin the moving average anew, with the present weights."""
        if self.average is not None:
            self.average.restart()

    def zero_grad(self) -> None:
        self.weights.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the weights."""
        scaler = self._accelerator.scaler
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": scaler and scaler.state_dict(),
            "updates": self.updates,
            "average": self.average and self.average.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` returned, once the weights are back. What is new in this run begins anew."""
        scaler = self._accelerator.scaler
        self.optimizer.load_state_dict(state["optimizer"])
        if scaler is not None and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        self.updates = state.get("updates", 0)
        self.restart_average()
        if self.average is not None and state.get("average"):
            self.average.load_state_dict(state["average"])

    def _step(self) -> tuple[float, bool]:
        """The norm before clipping, and whether the optimizer has made its step."""
        self.weights.join_gradients()
        self._average_gradients()
        norm = float(self._accelerator.clip_grad_norm_(self.weights.tensors, self.config.train_max_grad_norm))
        # With gradient scaling (fp16) the step lowers the scale, and leaves the weights alone by itself.
        wanted = math.isfinite(norm) or self._accelerator.scaler is not None
        if wanted:
            self.optimizer.step()
        return norm, wanted and not self.optimizer.step_was_skipped

    def _average_gradients(self) -> None:
        """Replace the gradients by their mean over the processes. Not by DDP: the chain's backward skips its hooks."""
        if self._accelerator.num_processes == 1:
            return
        gradients = []
        for tensor in self.weights.tensors:
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor, dtype=tensor.grad_dtype)
            gradients.append(tensor.grad)
        sum_in_place(gradients)
        torch._foreach_div_(gradients, self._accelerator.num_processes)

    def _make(self, tensors: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        config = self.config
        return make_optimizer(
            config.optimizer,
            tensors,
            learning_rate=config.train_learning_rate,
            betas=(config.train_adam_beta1, config.train_adam_beta2),
            weight_decay=config.train_adam_weight_decay,
            epsilon=config.train_adam_epsilon,
        )

    def _check_in_backward(self, use_lora: bool) -> None:
        if use_lora:
            raise ValueError(
                "optimizer_in_backward is for the whole UNet (use_lora=False): adapters gain nothing by it"
            )
        if self._accelerator.num_processes > 1 or self._accelerator.scaler is not None:
            raise ValueError("optimizer_in_backward works in one process, in bf16 or fp32: leave it out here")
        rule = self.config.truncation
        steps = self.config.sample_num_steps
        if rule is not None and parse_rule(rule, steps).beside(steps).chains:
            raise ValueError(
                f"optimizer_in_backward steps in one backward pass, and truncation {rule} has several: use last:1"
            )
