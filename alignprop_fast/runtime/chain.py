"""A chain of steps: the methods that `run_chain` calls. They do not decide what is kept for the backward pass.

y_i = predict(i, x_i)        x_{i+1} = advance(i, x_i, y_i)        i = 0 (the noisiest) to T - 1
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch

from alignprop_fast.planner import Options
from alignprop_fast.runtime.blocks import Block


class GradientSink(Protocol):
    """Takes the gradients of a chain's parameters step by step, instead of autograd."""

    def __call__(self, x: torch.Tensor, y: torch.Tensor, gy: torch.Tensor, last: bool) -> torch.Tensor | None:
        """Run the backward pass of one gradient step, from its output to the parameters.

        Args:
            x: the step's input state, a leaf of the step's graph.
            y: the step's output, with its graph.
            gy: the gradient of y, in its shape and dtype.
            last: whether this is the chain's last gradient step in the backward pass (the earliest of the chain).

        Returns:
            the gradient of x if x requires one, else None.
        """
        ...


class Chain(ABC):
    """T steps, each an expensive prediction by a network and a cheap affine update of the state.

    The state x passes from step to step: the latents [B, ...], or [2, B, ...] for a method with history. Subclasses
    define what a step computes. `run_chain` decides when it runs, how often, and whether autograd records it.

    Attributes:
        num_steps: T.
        parameters: those of the network that need a gradient.
        blocks: the parts of the network for which a plan has options.
        gradient_sink: takes the parameters' gradients, and autograd gets none. None: autograd gets them.
        has_penalty: whether gradient steps have a `penalty`.
        stand_ins: `predict` reads these instead of the parameters, one for each: copies in another dtype, or the
            parameters themselves.
        conditions: other tensors that need a gradient, such as text embeddings. There are none with a sink.
        leaves: `predict` reads these instead of the conditions: the same values, detached, as leaves of the step's
            graph. One condition may be computed from another.
    """

    def __init__(
        self,
        num_steps: int,
        parameters: Sequence[torch.Tensor],
        blocks: Sequence[Block] = (),
        *,
        gradient_sink: GradientSink | None = None,
        has_penalty: bool = False,
        stand_ins: Sequence[torch.Tensor] | None = None,
        conditions: Sequence[torch.Tensor] = (),
        leaves: Sequence[torch.Tensor] = (),
    ):
        self.num_steps, self.parameters, self.blocks = num_steps, parameters, blocks
        self.gradient_sink, self.has_penalty = gradient_sink, has_penalty
        self.stand_ins = parameters if stand_ins is None else stand_ins
        self.conditions, self.leaves = conditions, leaves

    @property
    def receivers(self) -> list[torch.Tensor]:
        """All tensors except x that get a gradient from a step: the parameters' stand-ins, then the leaves."""
        return [*self.stand_ins, *self.leaves]

    def reading(self) -> AbstractContextManager[None]:
        """The context of every call of `predict` and of the backward pass through it."""
        return nullcontext()

    @abstractmethod
    def predict(self, i: int, x: torch.Tensor) -> torch.Tensor:
        """The network's output of step i at state x: y [K * B, ...], with K branches of guidance.

        In a gradient step autograd records it, inside `apply_options`; other steps run it under inference mode.
        It must compute the same bits each time, because a replay repeats it. So it draws no random number and does
        not write to x or to anything else that it reads.
        """

    @abstractmethod
    def advance(self, i: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The state after step i, in the shape and dtype of x: affine in x and y.

        Called once per step, in order, with gradients off; never replayed. Only this method may draw random
        numbers.
        """

    @abstractmethod
    def adjoint(self, i: int, g: torch.Tensor, y_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The transpose of `advance`: from the gradient g of the state after step i, in the state's shape, to

        - the gradient of x along the affine path, in the shape and dtype of g, and
        - the gradient of y, in the shape of y and in `y_dtype`.

        Called in the backward pass, with gradients off.
        """

    def input_scale(self, i: int) -> float:
        """Factor of the gradient that gradient step i gives x through `predict`; 0: it is not computed."""
        return 1.0

    def weighted(self, g: torch.Tensor) -> torch.Tensor:
        """The gradient of the last state, with the weight of each sample. Called once, as the backward pass begins."""
        return g

    def sample(self, i: int, x: torch.Tensor, recorded: bool) -> torch.Tensor:
        """`predict` for a step without gradient, under inference mode; may be a faster form of it.

        The result may be overwritten by the next call. recorded: whether it may run as a CUDA graph.
        """
        return self.predict(i, x)

    def recorded_gradients(
        self, i: int, x: torch.Tensor, gy: torch.Tensor, options: Options
    ) -> Sequence[torch.Tensor | None] | None:
        """`predict` of a gradient step that runs again, forward and back, as one CUDA graph; None if there is none.

        Args:
            x: the step's input state; the gradient reaches it if the chain has `input_gradient`.
            gy: the gradient of `predict`'s result.
            options: the options of the blocks, by name, which are already applied.

        Returns:
            the gradients of `receivers`, then that of x (None without `input_gradient`). They may be overwritten by
            the next call.
        """
        return None

    def penalty(self, i: int, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(a scalar, its gradient for y in the shape of y) of gradient step i.

        It treats x as a constant, so a penalty affects the parameters only through its own step. Called with
        gradients off, in the forward pass, and only if `has_penalty`.
        """
        raise NotImplementedError("a chain that has a penalty defines it")

    def start(self, x: torch.Tensor) -> torch.Tensor:
        """The state before step 0, from the initial latents x [B, ...]. Recorded by autograd."""
        return x

    def finish(self, x: torch.Tensor) -> torch.Tensor:
        """The final latents [B, ...] in the state after the last step. Recorded by autograd."""
        return x

    def state(self) -> Hashable:
        """Everything that the results of `predict` depend on besides i and x, as values to compare.

        It changes if a weight is changed in place or replaced. A replay must find the value of the forward pass, or it
        would compute something else.
        """
        return ()
