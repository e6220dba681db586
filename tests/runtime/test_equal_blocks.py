"""Where several blocks are equal, three run, and the trace is that of a run of all of them, to the last bit."""

import pytest
import torch

from alignprop_fast.generate.cost_table import latents
from alignprop_fast.generate.sampler import DifferentiableSampler
from alignprop_fast.models.lora.adapters import add_lora, denoiser, denoiser_name
from alignprop_fast.planner import BlockOption
from alignprop_fast.runtime import remembered_results, step_costs, trace
from alignprop_fast.runtime.equal_blocks import EqualBlocks

# How many blocks a list of the denoiser gets. Of some lists the first two or the last block are of other kinds.
DEPTHS = {"sdxl": 5, "sd3": 7, "flux": 5, "flux2_klein": 5, "z_image": 6, "qwen_image": 6, "krea2": 5}
SETTINGS = ("num_layers", "num_single_layers", "n_layers", "transformer_layers_per_block")


def deeper(pipe, depth):
    """The pipeline on the meta device, with this many blocks in each list of its denoiser, and adapters."""
    old = denoiser(pipe)
    changed = {setting: depth for setting in SETTINGS if setting in old.config}
    with torch.device("meta"):
        setattr(pipe, denoiser_name(pipe), type(old).from_config({**old.config, **changed}))
    pipe.to("meta")
    add_lora(pipe, rank=4)
    return pipe


def costs_of(interval):
    sizes = interval.kept_bytes, interval.host_bytes, interval.transient_bytes
    return interval.call and interval.call.block.name, *sizes, interval.block_seconds, interval.gap_seconds


FORWARD = "forward alone"


@pytest.mark.parametrize(
    ("model", "run"),
    [*((model, run) for model in DEPTHS for run in (BlockOption.RECOMPUTE, FORWARD)), ("flux", BlockOption.KEEP)],
)
def test_one_of_equal_blocks_stands_for_the_others(model, run, request, monkeypatch):
    pipe = deeper(request.getfixturevalue(f"tiny_{model}"), DEPTHS[model])
    step = DifferentiableSampler(pipe, 2, height=32, width=32)._blank_step(1, None)
    options = {} if run is FORWARD else {"*": run}
    traces, ran, begin = [], [], EqualBlocks.begin

    def told(*arguments):
        ran.append(begin(*arguments))
        return ran[-1]

    def both(work, *_):
        work.forward()  # Z-Image makes its table of positions once
        for how in (told, lambda *_: True):
            monkeypatch.setattr(EqualBlocks, "begin", how)
            traces.append(trace(work, options))
        return traces[-1] if run is FORWARD else ()

    monkeypatch.setattr("alignprop_fast.runtime.costs.segments", lambda *_: ())
    monkeypatch.setattr(f"alignprop_fast.runtime.costs.{'trace' if run is FORWARD else 'segments'}", both)
    with torch.enable_grad(), remembered_results():
        step_costs(step.chain, latents(step))
    ours, whole = traces
    assert [costs_of(interval) for interval in ours.intervals] == [costs_of(interval) for interval in whole.intervals]
    assert len(ran) == len(whole.intervals) - 1 and not all(ran)
