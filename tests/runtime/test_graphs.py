"""Recorded evaluations and waits for the device: their bookkeeping on the CPU, and the real graphs on a GPU."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from alignprop_fast import DifferentiableSampler
from alignprop_fast.generate.fast_predict import FastPredict
from alignprop_fast.models.lora.adapters import add_lora
from alignprop_fast.planner import BlockOption, GraphUse, Plan
from alignprop_fast.runtime import CompiledBlocks, GraphedCalls, run_chain

STEPS, PROMPTS = 4, ["red cat", "dog"]
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
PLAN = Plan(STEPS, (3,), (1, 2), ({"*": BlockOption.NORMS},), {"*": BlockOption.ATTENTION}, graphs=GraphUse.ALL)


class Recorded(GraphedCalls):
    """As on a GPU, but a replay runs the function again on the static buffers. The emulated GPU really records."""

    warm_ups = captures = 0

    def _warm_up(self, run):
        self.warm_ups += 1
        run()

    def _capture(self, run):
        self.captures += 1
        results = [result if result is None else result.clone() for result in run()]

        def replay():
            for result, value in zip(results, run(), strict=True):
                if result is not None:
                    result.copy_(value)

        return replay, results


class Waits(TorchDispatchMode):
    """Operators for which the host would wait on a GPU: reading a number, a shape that depends on data, data from
    Python numbers."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.found += [name] if name in self.NAMES else []
        return func(*args, **(kwargs or {}))


def pipe_of(request, name):
    pipe = request.getfixturevalue(name)
    for parameter in add_lora(pipe, 2, 2):
        torch.nn.init.normal_(parameter, std=0.1)
    return pipe


def denoiser(pipe):
    return pipe.unet if "unet" in pipe.components else pipe.transformer


@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sdxl", "tiny_sd3", "tiny_flux"])
def test_a_chain_never_waits_for_the_device(request, name):
    pipe = pipe_of(request, name)
    size = {"height": 16, "width": 16} if name == "tiny_flux" else {}
    sampler = DifferentiableSampler(pipe, STEPS, **size)
    cond = sampler.model.blank_conditioning(2, name != "tiny_flux", sampler.size)
    chain = sampler._chain(cond, None, sampler.table)
    x = sampler.model.initial_latents(2, sampler.size, None, None)
    with Waits() as waits:
        assert x.sum().item() and torch.tensor([1.0]).sum() and len(waits.found) >= 2, "the test itself sees them"
        waits.found.clear()
        run_chain(chain, PLAN, x).sum().backward()
    assert waits.found == []
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in denoiser(pipe).parameters())


def gradients(sampler, seed=5, prompts=PROMPTS):
    pipe = sampler.model.pipe
    images = sampler(prompts, None, torch.Generator(sampler.model.device).manual_seed(seed), plan=PLAN)
    (images * torch.linspace(0, 1, 16, device=images.device)).mean().backward()
    grads = [p.grad.clone() for p in sampler.model.trainable()]
    denoiser(pipe).zero_grad()
    return images.detach(), grads


def assert_same(one, two):
    assert torch.equal(one[0], two[0])
    assert all(torch.equal(a, b) for a, b in zip(one[1], two[1], strict=True)) and one[1]


@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sdxl"])
def test_recorded_steps_give_the_same_bits(request, name):
    pipe = pipe_of(request, name)
    plain, graphed = (DifferentiableSampler(pipe, STEPS, guidance_rescale=0.3) for _ in range(2))
    graphs = Recorded()
    graphed.fast = FastPredict(graphed.model, graphs, None)
    assert_same(gradients(plain), gradients(graphed))
    # Other prompts and weights changed in place need no new recording; another batch size or moved weights do.
    for seed, prompts in ((6, ["dog", "cat"]), (8, PROMPTS)):
        with torch.no_grad():
            for parameter in graphed.model.trainable():
                parameter.add_(0.05)
        assert_same(gradients(plain, seed, prompts), gradients(graphed, seed, prompts))
        # An evaluation, and a replay forward and back. The replay's warm-up dropped the evaluation.
        assert (graphs.warm_ups, graphs.captures) == (2, 3)
    assert_same(gradients(plain, 7, ["dog"]), gradients(graphed, 7, ["dog"]))
    assert (graphs.warm_ups, graphs.captures) == (4, 5)
    first = graphed.model.trainable()[0]
    first.data = first.data.clone() * 2
    assert_same(gradients(plain), gradients(graphed))
    assert (graphs.warm_ups, graphs.captures) == (6, 7)


def test_the_base_model_is_not_run_by_a_recording_with_adapters(request):
    pipe = pipe_of(request, "tiny_sd")
    plain, graphed = (DifferentiableSampler(pipe, STEPS, compare_with_base=True) for _ in range(2))
    graphed.fast = FastPredict(graphed.model, Recorded(), None)
    assert_same(gradients(plain), gradients(graphed))
    assert plain.base_mse > 0 and torch.equal(plain.base_mse, graphed.base_mse)


def test_graphs_need_a_gpu(request):
    pipe = pipe_of(request, "tiny_sd")
    assert DifferentiableSampler(pipe, STEPS, cuda_graphs="auto").fast is None
    for given, message in (("on", "needs a GPU"), ("yes", "use auto, on, off")):
        with pytest.raises(ValueError, match=message):
            DifferentiableSampler(pipe, STEPS, cuda_graphs=given)


class TooLittle(Recorded):
    """Has no memory to record, and notes what is tried."""

    def _capture(self, run):
        self.captures += 1
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_recording_without_memory_is_tried_once_and_replaced(request, caplog):
    pipe = pipe_of(request, "tiny_sd")
    plain, graphed = (DifferentiableSampler(pipe, STEPS) for _ in range(2))
    graphs = TooLittle()
    graphed.fast = FastPredict(graphed.model, graphs, None)
    for seed in (5, 6):
        assert_same(gradients(plain, seed), gradients(graphed, seed))
    assert graphs.captures == 2
    lines = [record.getMessage() for record in caplog.records if "CUDA graph" in record.getMessage()]
    assert len(lines) == 2 and all("launched one by one: CUDA out of memory" in line for line in lines)
    graphed.fast.forget_recordings()  # as after running out of memory elsewhere
    assert not graphed.fast.graphs.ran_out_of_memory


@pytest.mark.parametrize("recorded", [False, True])
def test_compiled_blocks_give_the_same_numbers_and_leave_no_trace(request, recorded):
    pipe = pipe_of(request, "tiny_sd")
    plain, compiled = (DifferentiableSampler(pipe, STEPS) for _ in range(2))
    seen = []

    def backend(graph, inputs):
        def run(*arguments):
            seen.append(torch.is_grad_enabled())
            return graph.forward(*arguments)

        return run

    blocks = CompiledBlocks(compiled.model.step_groups()["transformers"], backend)
    compiled.fast = FastPredict(compiled.model, Recorded() if recorded else None, blocks)
    torch._dynamo.reset()
    (image, grads), (compiled_image, compiled_grads) = gradients(plain), gradients(compiled)
    assert seen and not any(seen), "without gradient alone"
    assert (image - compiled_image).abs().max() < 1e-5
    for a, b in zip(grads, compiled_grads, strict=True):
        assert (a - b).abs().max() <= 1e-4 * a.abs().max()
    assert not any("forward" in vars(module) for module in pipe.unet.modules())


@on_gpu
@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sdxl"])
def test_graphs_give_the_same_bits_on_a_gpu(request, name):
    pipe = pipe_of(request, name).to("cuda", torch.bfloat16)
    plain, graphed = (DifferentiableSampler(pipe, STEPS, cuda_graphs=way) for way in ("off", "on"))
    for seed, prompts in ((5, PROMPTS), (6, ["dog", "cat"]), (7, ["dog"])):
        assert_same(gradients(plain, seed, prompts), gradients(graphed, seed, prompts))
        with torch.no_grad():
            for parameter in plain.model.trainable():
                parameter.add_(0.05)


@on_gpu
@pytest.mark.parametrize("cuda_graphs", ["off", "on"])
def test_a_chain_never_waits_on_a_gpu(request, cuda_graphs):
    pipe = pipe_of(request, "tiny_sdxl").to("cuda", torch.bfloat16)
    sampler = DifferentiableSampler(pipe, STEPS, cuda_graphs=cuda_graphs)
    cond = sampler.model.blank_conditioning(2, True, sampler.size)
    chain = sampler._chain(cond, None, sampler.table)
    x = sampler.model.initial_latents(2, sampler.size, None, None)
    for mode in ("default", "error"):  # the first run compiles and chooses kernels, and records graphs
        torch.cuda.set_sync_debug_mode(mode)
        try:
            run_chain(chain, PLAN, x).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
