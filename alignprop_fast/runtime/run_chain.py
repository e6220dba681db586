"""A chain under a plan, as ONE autograd function.

The forward pass keeps the input state of each gradient step, and the graph of the resident ones; everything else is
freed at once. The backward pass walks from the last step to the first. A step without gradient passes the gradient
only along its affine path (Prabhudesai et al. 2023, randomised truncation). A gradient step adds the network's
vector-Jacobian product: from its kept graph (resident), or by running the network again (replayed). So a replayed chain
needs the memory of one network evaluation, for every T.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from alignprop_fast.planner import Options, Plan
from alignprop_fast.runtime.blocks import apply_options
from alignprop_fast.runtime.chain import Chain
from alignprop_fast.runtime.changed import CHANGED
from alignprop_fast.runtime.gradients import GradientSums
from alignprop_fast.runtime.offload import Offloader


def run_chain(chain: Chain, plan: Plan, x: torch.Tensor, offloader: Offloader | None = None) -> torch.Tensor:
    """Run the chain from x [B, ...] under the plan and return the last latents [B, ...].

    Gradients reach parameters and conditions, and x if it requires one. The graph frees itself while it is used, so a
    second backward pass raises RuntimeError. Without gradient steps the result has no graph.

    offloader: moves kept tensors to host memory if the plan says so. Each run needs its own.
    """
    return run_penalised_chain(chain, plan, x, offloader)[0]


def run_penalised_chain(
    chain: Chain, plan: Plan, x: torch.Tensor, offloader: Offloader | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `run_chain`, and the sum of the penalties of the gradient steps, a scalar, differentiable in the parameters.

    Use both in one backward pass. A gradient step whose input also has a gradient runs once more for its penalty,
    because the penalty's gradient must not reach the input.
    """
    grad_steps = {*plan.resident_steps, *plan.replayed_steps} if torch.is_grad_enabled() else set()
    x = chain.start(x)
    if grad_steps or (torch.is_grad_enabled() and x.requires_grad):
        tape = _Tape(chain, plan, offloader, grad_steps, x.requires_grad)
        x, penalty = _ChainFunction.apply(tape, x, *chain.parameters, *chain.conditions)
        return chain.finish(x), penalty
    with torch.no_grad(), chain.reading():
        x = _forward(_Tape(chain, plan, offloader, grad_steps, wants_gx=False), x)
        return chain.finish(x), x.new_zeros(())


class _Tape:
    """Everything that one run of the chain keeps for its backward pass."""

    def __init__(self, chain: Chain, plan: Plan, offloader: Offloader | None, grad_steps: set[int], wants_gx: bool):
        self.chain, self.plan, self.offloader = chain, plan, offloader
        self.grad_steps, self.wants_gx = grad_steps, wants_gx
        # The backward pass needs no earlier step, unless the initial latents require a gradient.
        self.first = 0 if wants_gx else min(grad_steps, default=chain.num_steps)
        self.graphs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.inputs: dict[int, torch.Tensor] = {}
        self.penalty: torch.Tensor | None = None
        self.penalty_gradients: dict[int, torch.Tensor] = {}  # gradient of a step's penalty for its y
        self.state = chain.state() if grad_steps else ()
        self.y_dtype = torch.float32  # of a gradient step's prediction
        # Copies to host memory run on streams of their own, and wait for a driver's event: not part of a CUDA graph.
        offloads = any(option.offload for option in plan.replay_options.values())
        self.records_replays = plan.graphs.replays and not offloads and chain.gradient_sink is None
        self.used = False

    def input_gradient(self, i: int) -> bool:
        """Whether a gradient of step i's network input is needed by an earlier step or the initial latents."""
        return self.chain.input_scale(i) != 0 and (i > self.first or self.wants_gx)

    def check_state(self) -> None:
        """Check the tensors that a replay reads; autograd checks only the versions of tensors that it saved.

        Raises:
            RuntimeError: they have changed since the forward pass.
        """
        if self.grad_steps and self.chain.state() != self.state:
            raise RuntimeError(CHANGED)

    def penalise(self, i: int, x: torch.Tensor, y: torch.Tensor) -> None:
        if self.chain.has_penalty:
            value, self.penalty_gradients[i] = self.chain.penalty(i, x, y)
            self.penalty = value if self.penalty is None else self.penalty + value


class _ChainFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tape: _Tape, x: torch.Tensor, *receivers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.tape, ctx.autocast = tape, _autocast_state(x.device)
        with tape.chain.reading():
            out = _forward(tape, x)
        # Not on the tape: as an output it refers to this node, and the node to the tape, which would make a cycle.
        penalty, tape.penalty = tape.penalty, None
        return out, x.new_zeros(()) if penalty is None else penalty

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor, g_penalty: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tape: _Tape = ctx.tape
        if tape.used:
            raise RuntimeError("the chain frees itself in its backward pass: sample again before a second one")
        tape.used = True
        tape.check_state()
        with ctx.autocast(), tape.chain.reading():
            gx, grads = _backward(tape, g, g_penalty)
        return None, gx if tape.wants_gx else None, *grads


def _forward(tape: _Tape, x: torch.Tensor) -> torch.Tensor:
    chain = tape.chain
    for i in range(chain.num_steps):
        if i in tape.grad_steps and i in tape.plan.resident_steps:
            start = x.detach().requires_grad_(tape.input_gradient(i))
            tape.graphs[i] = start, _run(tape, i, start)
            y = tape.graphs[i][1].detach()
        else:
            if i in tape.grad_steps:
                tape.inputs[i] = x
            exact = i in tape.grad_steps or not tape.grad_steps
            with torch.inference_mode(), nullcontext() if exact else chain.approximation():
                y = chain.sample(i, x, tape.plan.graphs.sampling)
        if i in tape.grad_steps:
            tape.y_dtype = y.dtype
            tape.penalise(i, x, y)
        # Outside inference mode, because a replay saves x for its backward pass, and inference tensors cannot be saved.
        x = chain.advance(i, x, y)
        del y
    return x


def _backward(tape: _Tape, g: torch.Tensor, g_penalty: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    sums = GradientSums(tape.chain.parameters, len(tape.chain.receivers))
    g = tape.chain.weighted(g)
    for i in range(tape.chain.num_steps - 1, tape.first - 1, -1):
        if i in tape.grad_steps:
            g = _step_backward(tape, i, g, g_penalty, sums)
        else:
            g, _ = tape.chain.adjoint(i, g, g.dtype)
    # The sums keep their width; autograd rounds them to the dtype of a parameter's gradient (its `grad_dtype`).
    return g, sums.tensors


def _step_backward(tape: _Tape, i: int, g: torch.Tensor, g_penalty: torch.Tensor, sums: GradientSums) -> torch.Tensor:
    """Gradient step i: add its gradients to the sums; from the gradient of the state after it to that before it."""
    wants_gx = tape.input_gradient(i)
    x, y = tape.graphs.pop(i) if i in tape.graphs else (tape.inputs.pop(i).detach().requires_grad_(wants_gx), None)
    if y is None and not tape.records_replays:
        y = _run(tape, i, x)
    g, gy = tape.chain.adjoint(i, g, tape.y_dtype)
    penalty_gradient = (g_penalty * tape.penalty_gradients.pop(i)).to(gy.dtype) if tape.penalty_gradients else None
    if penalty_gradient is not None and not wants_gx:
        gy = gy + penalty_gradient
    gx = _network_backward(tape, i, x, y, gy, sums)
    del y, gy
    if gx is not None:
        g = torch.add(g, gx, alpha=tape.chain.input_scale(i))
        if penalty_gradient is not None:
            _network_backward(tape, i, x.detach(), None, penalty_gradient, sums)
    return g


def _network_backward(
    tape: _Tape,
    i: int,
    x: torch.Tensor,
    y: torch.Tensor | None,
    gy: torch.Tensor,
    sums: GradientSums,
) -> torch.Tensor | None:
    """Add the receivers' gradients of step i to the sums (fp32 or wider); return that of x, if x requires one.

    y: None: the step runs again.
    """
    chain = tape.chain
    if y is None and tape.records_replays and (found := _recorded_gradients(tape, i, x, gy)) is not None:
        *grads, gx = found
        sums.add(grads, static=True)
        return gx if x.requires_grad else None
    if y is None:
        y = _run(tape, i, x)
    if chain.gradient_sink is not None:
        return chain.gradient_sink(x, y, gy, i == min(tape.grad_steps))
    wanted = [*chain.receivers, x] if x.requires_grad else chain.receivers
    gradients = torch.autograd.grad(y, wanted, gy, allow_unused=True)
    sums.add(gradients[: len(chain.receivers)])
    return gradients[-1] if x.requires_grad else None


def _run(tape: _Tape, i: int, x: torch.Tensor) -> torch.Tensor:
    """The network's output at gradient step i, recorded by autograd."""
    with torch.enable_grad(), apply_options(_options(tape.plan, i), tape.chain.blocks, tape.offloader):
        y = tape.chain.predict(i, x)
    if tape.offloader is not None:
        tape.offloader.settle()
    return y


def _recorded_gradients(tape: _Tape, i: int, x: torch.Tensor, gy: torch.Tensor) -> Sequence[torch.Tensor | None] | None:
    options = _options(tape.plan, i)
    with apply_options(options, tape.chain.blocks):
        return tape.chain.recorded_gradients(i, x, gy, options)


def _options(plan: Plan, i: int) -> Options:
    """The options of gradient step i, by block."""
    if i in plan.resident_steps:
        return plan.resident_options[plan.resident_steps.index(i)]
    return plan.replay_options


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast now casts to on the device; None without autocast, and always for meta tensors."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def _autocast_state(device: torch.device) -> Callable[[], AbstractContextManager]:
    """A factory of contexts that restore the present autocast state, because the backward pass runs outside it."""
    dtype = autocast_dtype(device)
    return nullcontext if dtype is None else partial(torch.autocast, device.type, dtype=dtype)
