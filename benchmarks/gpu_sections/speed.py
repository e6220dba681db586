"""One guided pair of UNet evaluations, forward only and with backward, of this package and of diffusers with PEFT."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from alignprop_fast.ops import extension
from alignprop_fast.planner import BlockOption
from alignprop_fast.runtime import apply_options, blocks_of
from benchmarks.gpu_sections.flop import FLOP
from benchmarks.gpu_sections.lab import Lab
from benchmarks.gpu_sections.timing import Call, first_run, in_turns, ratio
from benchmarks.step.train_step_variants import Bench, guided

PAIRS = (
    ("stock forward", "ours forward"),
    ("stock both", "ours both keep"),
    ("stock both checkpointed", "ours both attention"),
    ("stock both checkpointed", "ours both keep"),
)
"""(slower, faster), as we expect."""


def speed(lab: Lab) -> None:
    bench = lab.bench("sdxl")
    # Waits for the build in the background.
    reason = extension.missing(lab.device.type)
    lab.facts.write("speed", "compiled kernels", missing=reason)
    for batch in (1, 4):
        compare(lab, "speed", batch, evaluations(bench, batch))


def compare(lab: Lab, section: str, batch: int, calls: list[Call]) -> None:
    """Measure the peak of each call, then time those that fit in turns; write the ratios of `PAIRS`."""
    running = []
    for call in calls:
        peaks = first_run(call, lab.device)
        lab.facts.write(section, "peak", call=call.name, batch=batch, **peaks)
        running += [] if "out_of_memory" in peaks else [call]
    in_turns(running, lab.device, 2 if lab.dry else 12, 6.0)
    rate = lab.rate()
    for call in running:
        lab.facts.write(section, "time", call=call.name, batch=batch, **call.figures(rate))
    done = {call.name: call for call in running}
    for slower, faster in PAIRS:
        if slower in done and faster in done:
            values = ratio(done[slower], done[faster])
            lab.facts.write(section, "ratio", slower=slower, faster=faster, batch=batch, **values)


def evaluations(bench: Bench, batch: int) -> list[Call]:
    """The calls of `PAIRS`, ours first, because switching between ours and stock changes the whole model."""
    flop = FLOP[bench.model]
    forward, both = batch * flop["forward"], batch * flop["both"]
    ours, stock = partial(bench.use_stock, False), partial(bench.use_stock, True)
    pair = _Pair(bench, batch)
    return [
        Call("ours forward", partial(pair.forward, pair.ours), ours, forward),
        Call("ours both keep", partial(pair.both, pair.ours, BlockOption.KEEP), ours, both),
        Call("ours both attention", partial(pair.both, pair.ours, BlockOption.ATTENTION), ours, both),
        Call("stock forward", partial(pair.forward, pair.stock), partial(stock, False), forward),
        Call("stock both", partial(pair.both, pair.stock, BlockOption.KEEP), partial(stock, False), both),
        Call("stock both checkpointed", partial(pair.both, pair.stock, BlockOption.KEEP), partial(stock, True), both),
    ]


class _Pair:
    """A guided pair of evaluations of B images at a fixed timestep."""

    def __init__(self, bench: Bench, batch: int):
        model = bench.sampler.model
        self.bench, self.cond = bench, bench.conditioning(batch)
        self.x = model.initial_latents(batch, bench.sampler.size, None, None).requires_grad_()
        self.timestep = torch.tensor(500, device=bench.device)
        self.blocks = blocks_of(bench.unet, model.step_groups())

    def ours(self) -> torch.Tensor:
        return self.bench.sampler.model.predict(self.x, self.timestep, self.cond)

    def stock(self) -> torch.Tensor:
        return guided(self.bench.unet, self.cond, self.x, self.timestep)

    @torch.inference_mode()
    def forward(self, network: Callable[[], torch.Tensor]) -> None:
        network()

    def both(self, network: Callable[[], torch.Tensor], option: BlockOption) -> None:
        """Forward with the blocks under the option, and backward into latents and adapters."""
        with apply_options({"*": option}, self.blocks):
            y = network()
        torch.autograd.grad(y, [self.x, *self.bench.trained], torch.ones_like(y), allow_unused=True)
