"""CUDA graphs on the emulated GPU, which records operators with their memory and runs them again without Python."""

import pytest
import torch

from alignprop_fast import DifferentiableSampler
from alignprop_fast.planner import GraphUse

pytestmark = pytest.mark.usefixtures("plain_kernels")

STEPS, PROMPTS = 4, ["a red cat", "a dog"]


@pytest.fixture
def pipe(adapted):
    return adapted.to("cuda")


def run(sampler, prompts, seed, grad_steps):
    images = sampler(prompts, None, torch.Generator().manual_seed(seed), grad_steps=grad_steps)
    (images * torch.linspace(0, 1, 16, device="cuda")).mean().backward()
    grads = [p.grad.clone() for p in sampler.model.trainable()]
    sampler.model.denoiser.zero_grad()
    return images.detach(), grads


RESCALED = pytest.mark.slow("guidance is rescaled alike in every architecture, and not in FLUX")


@pytest.mark.parametrize(
    ("adapted", "rescale"),
    [
        *(("tiny_sd", 0.3), ("tiny_sdxl", 0.0), ("tiny_sd3", 0.0), ("tiny_flux", 0.0)),
        pytest.param("tiny_sd", 0.0, marks=RESCALED),
        *(pytest.param(name, 0.3, marks=RESCALED) for name in ("tiny_sdxl", "tiny_sd3", "tiny_flux")),
    ],
    indirect=["adapted"],
)
def test_graphs_give_the_same_bits(pipe, rescale):
    """With other prompts, noise, gates and weights than the recorded ones, and after another batch size."""
    size = {"height": 16, "width": 16} if type(pipe).__name__ == "FluxPipeline" else {}
    options = {"guidance_rescale": rescale, "memory_budget": None, **size}
    plain, graphed = (DifferentiableSampler(pipe, STEPS, cuda_graphs=way, **options) for way in ("off", "on"))
    runs = ((PROMPTS, 1, [1, 3]), (["a dog", "sun"], 2, [0, 1, 2]), (["sun"], 3, [2]), (PROMPTS, 4, [3]))
    for prompts, seed, grad_steps in runs:
        images, grads = run(plain, prompts, seed, grad_steps)
        ours, our_grads = run(graphed, prompts, seed, grad_steps)
        assert torch.equal(images, ours)
        assert all(torch.equal(a, b) for a, b in zip(grads, our_grads, strict=True)) and any(g.any() for g in grads)
        with torch.no_grad():
            for parameter in plain.model.trainable():
                parameter.mul_(1.1)
    assert graphed.plan.graphs == GraphUse.ALL and plain.plan.graphs == GraphUse.NONE
    assert len(graphed.fast.graphs._graphs) == 2 * 2, "of each batch size: an evaluation, and a replay forward and back"


def test_python_does_not_run_again(pipe, monkeypatch):
    size = {"height": 16, "width": 16} if type(pipe).__name__ == "FluxPipeline" else {}
    sampler = DifferentiableSampler(pipe, STEPS, memory_budget=None, cuda_graphs="on", **size)
    run(sampler, PROMPTS, 1, [1, 3])
    monkeypatch.setattr(type(sampler.model), "predict", None)
    run(sampler, PROMPTS, 2, [2, 3])


def test_all_recordings_share_a_stream_and_mind_no_other_thread(pipe, monkeypatch):
    """cuBLAS keeps a workspace for each stream that it meets; NCCL's watchdog asks the driver in its own thread."""
    streams, modes = set(), []
    begin = torch.cuda.CUDAGraph.capture_begin

    def beginning(self, *pool, capture_error_mode, **options):
        streams.add(torch.cuda.current_stream())
        modes.append(capture_error_mode)
        begin(self)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", beginning)
    size = {"height": 16, "width": 16} if type(pipe).__name__ == "FluxPipeline" else {}
    sampler = DifferentiableSampler(pipe, STEPS, memory_budget=None, cuda_graphs="on", **size)
    made = type(torch.cuda.current_stream()).made
    for prompts in (PROMPTS, ["sun"]):
        run(sampler, prompts, 1, [1, 3])
    assert len(streams) == 1 and torch.cuda.current_stream() not in streams
    assert type(torch.cuda.current_stream()).made == made + 1
    assert len(modes) > 2 and set(modes) == {"thread_local"}
