"""What a chain of steps is: the methods that `run_chain` calls, without a word on what is kept for the backward pass.

y_i = predict(i, x_i)        x_{i+1} = advance(i, x_i, y_i)        i = 0 (the noisiest) to T - 1
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import Protocol

import torch

from alignprop_fast.planner import Options
from alignprop_fast.runtime.blocks import Block


class GradientSink(Protocol):
    """Takes the gradients of a chain's parameters step by step, in place of autograd."""

    def __call__(self, x: torch.Tensor, y: torch.Tensor, gy: torch.Tensor, last: bool) -> torch.Tensor | None:
        """Run one gradient step back, from its output to the parameters.

        Args:
            x: the step's input state, a leaf of the step's graph.
            y: the step's output, with its graph.
            gy: the gradient of y, in its shape and dtype.
            last: whether no gradient step of this chain is still to come (the backward pass ends with the earliest).

        Returns:
            the gradient of x, if x requires one, else None.
        """
        ...


class Chain(ABC):
    """T steps, each an expensive prediction by a network and a cheap affine update of the state.

    The state x is what one step hands to the next: the latents [B, ...], or [2, B, ...] for a method with history.
    Subclasses say what a step computes. `run_chain` says when, under autograd or not, once or twice.

    Attributes:
        num_steps: T.
        parameters: of the network, those that a gradient is wanted for.
        blocks: the parts of the network that a plan has an option for.
        gradient_sink: takes the parameters' gradients; autograd then gets none. None: autograd gets them.
        input_gradient: whether the gradient passes through `predict` to its x; if not, along the affine path alone.
        has_penalty: whether gradient steps have a `penalty`.
        conditions: other tensors that a gradient is wanted for, such as text embeddings. None beside a sink.
        leaves: what `predict` reads in place of each condition: the same values, detached, as leaves of the step's
            graph. One condition may have been computed from another.
    """

    def __init__(
        self,
        num_steps: int,
        parameters: Sequence[torch.Tensor],
        blocks: Sequence[Block] = (),
        *,
        gradient_sink: GradientSink | None = None,
        input_gradient: bool = True,
        has_penalty: bool = False,
        conditions: Sequence[torch.Tensor] = (),
        leaves: Sequence[torch.Tensor] = (),
    ):
        self.num_steps, self.parameters, self.blocks = num_steps, parameters, blocks
        self.gradient_sink, self.input_gradient, self.has_penalty = gradient_sink, input_gradient, has_penalty
        self.conditions, self.leaves = conditions, leaves

    @property
    def receivers(self) -> list[torch.Tensor]:
        """All tensors but x that one step has a gradient for: the parameters, then the leaves."""
        return [*self.parameters, *self.leaves]

    @abstractmethod
    def predict(self, i: int, x: torch.Tensor) -> torch.Tensor:
        """The network's output of step i at state x: y [K * B, ...], K branches of guidance.

        Recorded by autograd in a gradient step, inside `apply_options`; run under inference mode in other steps.
        It must compute the same bits each time: a replay repeats it. So it draws no random number, and it writes
        neither to x nor to anything else that it reads.
        """

    @abstractmethod
    def advance(self, i: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The state after step i, in the shape and dtype of x: affine in x and y.

        Called once for each step, in their order, with gradients off; never replayed. The only method that may draw
        random numbers.
        """

    @abstractmethod
    def adjoint(self, i: int, g: torch.Tensor, y_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The transpose of `advance`: from the gradient g of the state after step i, in the state's shape, to

        - the gradient of x along the affine path, in the shape and dtype of g, and
        - the gradient of y, in the shape of y and in `y_dtype`.

        Called in the backward pass, with gradients off.
        """

    def sample(self, i: int, x: torch.Tensor) -> torch.Tensor:
        """`predict` for a step without gradient, under inference mode; may be a faster form of it.

        The result may be overwritten by the next call.
        """
        return self.predict(i, x)

    def replay(self, i: int, x: torch.Tensor, options: Options) -> torch.Tensor:
        """`predict` for a gradient step that runs again, recorded by autograd; may be a faster form of it.

        options: what the blocks keep meanwhile, by name; in force already.
        """
        return self.predict(i, x)

    def penalty(self, i: int, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(a scalar, its gradient for y in the shape of y) of gradient step i.

        x counts as a constant in it, so a penalty acts on the parameters through its own step alone. Called with
        gradients off, in the forward pass, and only where `has_penalty`.
        """
        raise NotImplementedError("a chain that has a penalty defines it")

    def start(self, x: torch.Tensor) -> torch.Tensor:
        """The state before step 0, from the initial latents x [B, ...]. Recorded by autograd."""
        return x

    def finish(self, x: torch.Tensor) -> torch.Tensor:
        """The final latents [B, ...] in the state after the last step. Recorded by autograd."""
        return x

    def state(self) -> Hashable:
        """What the results of `predict` depend on beside i and x, to be compared.

        A weight that was changed in place or replaced gives another value. A replay must find the value of the forward
        pass, or it would be the replay of another run.
        """
        return ()
