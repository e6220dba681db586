"""CUDA graphs on the emulated GPU, which records operators with their memory and runs them again without Python."""

from dataclasses import replace

import pytest
import torch

from alignprop_fast import DifferentiableSampler
from alignprop_fast.generate import graph_costs
from alignprop_fast.ops.garbage import collect_garbage
from alignprop_fast.planner import BudgetInfeasible, GraphUse, price

pytestmark = pytest.mark.usefixtures("plain_kernels")

REMEMBERED = graph_costs._remembered  # the fixture `ways` replaces it
STEPS, PROMPTS, GRAD_STEPS = 4, ["a red cat", "a dog"], (1, 2, 3)


@pytest.fixture
def pipe(adapted):
    return adapted.to("cuda")


def run(sampler, prompts, seed, grad_steps):
    images = sampler(prompts, None, torch.Generator().manual_seed(seed), grad_steps=grad_steps)
    (images * torch.linspace(0, 1, images.shape[-1], device="cuda")).mean().backward()
    grads = [p.grad.clone() for p in sampler.model.trainable()]
    sampler.model.denoiser.zero_grad()
    return images.detach(), grads


RECORDED = ("tiny_sd", "tiny_sdxl", "tiny_sd3", "tiny_flux")  # without those whose texts differ in length
RESCALED = pytest.mark.slow("guidance is rescaled alike in every architecture, and not in FLUX")


@pytest.mark.parametrize(
    ("adapted", "rescale"),
    [
        *(("tiny_sd", 0.3), ("tiny_sdxl", 0.0), ("tiny_sd3", 0.0), ("tiny_flux", 0.0)),
        pytest.param("tiny_sd", 0.0, marks=RESCALED),
        pytest.param("tiny_sana", 0.0, marks=pytest.mark.slow("its blocks are stock ones")),
        *(pytest.param(name, 0.3, marks=RESCALED) for name in ("tiny_sdxl", "tiny_sd3", "tiny_flux", "tiny_chroma")),
    ],
    indirect=["adapted"],
)
def test_graphs_give_the_same_bits(pipe, rescale):
    """With other prompts, noise, gates and weights than the recorded ones, and after another batch size."""
    side = {"FluxPipeline": 16, "ChromaPipeline": 16, "SanaPipeline": 32}.get(type(pipe).__name__)
    size = {} if side is None else {"height": side, "width": side}
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
    # Of each batch size: an evaluation, and a replay forward and back. A new kind drops those before, and the second
    # batch size did not come back.
    assert len(graphed.fast.graphs._graphs) == 3


@pytest.mark.parametrize("adapted", ["tiny_z_image", "tiny_qwen_image", "tiny_krea2", "tiny_lumina2"], indirect=True)
def test_captions_of_other_lengths_run_the_same_recording(pipe, monkeypatch):
    """Their longest has as many tokens after rounding up to a multiple of 32, beside a shorter one."""
    size = {"height": 16, "width": 16, "memory_budget": None}
    plain, graphed = (DifferentiableSampler(pipe, STEPS, cuda_graphs=way, **size) for way in ("off", "on"))
    captions = (["a red cat", "a dog" * 14], ["sun", "a dog" * 13])
    expected = [run(plain, prompts, seed, [1, 3]) for seed, prompts in enumerate(captions)]
    for seed in (0, 0):  # the first recording of a replay drops that of an evaluation
        assert_same(expected[0], run(graphed, captions[0], seed, [1, 3]))
    monkeypatch.setattr(type(graphed.model), "predict", None)
    assert_same(expected[1], run(graphed, captions[1], 1, [1, 3]))


@pytest.mark.parametrize("adapted", ["tiny_z_image"], indirect=True)
def test_steps_without_guidance_have_recordings_of_their_own(pipe):
    size = {"height": 16, "width": 16, "memory_budget": None, "cfg_truncation": 0.1}
    plain, graphed = (DifferentiableSampler(pipe, STEPS, cuda_graphs=way, **size) for way in ("off", "on"))
    for seed in (0, 0, 1):
        assert_same(run(plain, PROMPTS, seed, [1, 3]), run(graphed, PROMPTS, seed, [1, 3]))
    assert len(graphed.fast.graphs._graphs) == 4, "an evaluation and a replay with guidance, and without"


@pytest.mark.parametrize("adapted", ["tiny_sd"], indirect=True)
@pytest.mark.parametrize("precision", ["int8", "merged"])
def test_steps_in_another_precision_have_recordings_of_their_own(pipe, precision, monkeypatch):
    exact, *samplers = (
        DifferentiableSampler(pipe, STEPS, memory_budget=None, cuda_graphs=way, sampling_precision=precision)
        for way, precision in (("off", "exact"), ("off", precision), ("on", precision))
    )
    for sampler in samplers:  # not by time
        monkeypatch.setattr(sampler.precision, "_pays", lambda x, layers: True)
    learning = [p for p in pipe.unet.parameters() if p.requires_grad]
    for seed, grad_steps in ((1, [1, 3]), (2, [2])):
        plain, graphed = (run(sampler, PROMPTS, seed, grad_steps) for sampler in samplers)
        assert_same(plain, graphed)
        # In fp32 PyTorch's products merge the adapter too.
        assert torch.equal(plain[0], run(exact, PROMPTS, seed, grad_steps)[0]) is (precision == "merged")
        for parameter in learning:  # a recording reads what is merged for the next chain
            parameter.data.mul_(-2)
    assert len(samplers[1].fast.graphs._graphs) == 3, "evaluations of both kinds, and a replay"


@pytest.mark.parametrize("adapted", RECORDED, indirect=True)
def test_python_does_not_run_again(pipe, monkeypatch):
    size = {"height": 16, "width": 16} if type(pipe).__name__ == "FluxPipeline" else {}
    sampler = DifferentiableSampler(pipe, STEPS, memory_budget=None, cuda_graphs="on", **size)
    for seed in (1, 3):  # the first recording of a replay drops that of an evaluation
        run(sampler, PROMPTS, seed, [1, 3])
    monkeypatch.setattr(type(sampler.model), "predict", None)
    run(sampler, PROMPTS, 2, [2, 3])


@pytest.mark.parametrize("adapted", RECORDED, indirect=True)
def test_all_recordings_share_a_stream_and_mind_no_other_thread(pipe, monkeypatch):
    """cuBLAS keeps a workspace for each stream that it meets; NCCL's watchdog asks the driver in its own thread."""
    streams, modes = set(), []
    begin = torch.cuda.CUDAGraph.capture_begin

    def beginning(self, *pool, capture_error_mode, **options):
        streams.add(torch.cuda.current_stream())
        modes.append(capture_error_mode)
        begin(self, *pool)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", beginning)
    size = {"height": 16, "width": 16} if type(pipe).__name__ == "FluxPipeline" else {}
    sampler = DifferentiableSampler(pipe, STEPS, memory_budget=None, cuda_graphs="on", **size)
    made = type(torch.cuda.current_stream()).made
    for prompts in (PROMPTS, ["sun"]):
        run(sampler, prompts, 1, [1, 3])
    assert len(streams) == 1 and torch.cuda.current_stream() not in streams
    assert type(torch.cuda.current_stream()).made == made + 1
    assert len(modes) > 2 and set(modes) == {"thread_local"}


@pytest.mark.parametrize("adapted", ["tiny_sd"], indirect=True)
def test_a_recording_that_runs_out_of_memory(pipe, emulated, caplog, monkeypatch):
    """Here there is only less memory while it records. The call runs without it; later recordings are whole."""
    plain, graphed = (DifferentiableSampler(pipe, STEPS, memory_budget=None, cuda_graphs=way) for way in ("off", "on"))
    images, grads = run(plain, PROMPTS, 1, [1, 3])
    begin, end = torch.cuda.CUDAGraph.capture_begin, torch.cuda.CUDAGraph.capture_end

    def beginning(self, *pool, **options):
        begin(self, *pool, **options)
        emulated.set_limit(emulated.reserved() + 2**14)

    def ending(self):
        end(self)
        emulated.set_limit(24 * 2**30)

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda.CUDAGraph, "capture_begin", beginning)
        patch.setattr(torch.cuda.CUDAGraph, "capture_end", ending)
        assert_same((images, grads), run(graphed, PROMPTS, 1, [1, 3]))
    lines = [record.getMessage() for record in caplog.records if "CUDA graph" in record.getMessage()]
    assert len(lines) == 2 and all("launched one by one: CUDA out of memory" in line for line in lines)
    assert torch.cuda.memory_reserved() == torch.cuda.memory_allocated(), "nothing of it is left"
    graphed.fast.forget_recordings()  # as the trainer does, before it repeats a step with a leaner plan
    for _ in ("records", "replays"):
        assert_same((images, grads), run(graphed, PROMPTS, 1, [1, 3]))
    assert len(graphed.fast.graphs._graphs) == 2 and not graphed.fast.graphs.ran_out_of_memory


def assert_same(one, other):
    assert torch.equal(one[0], other[0]) and all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


@pytest.mark.parametrize("adapted", ["tiny_sd"], indirect=True)
def test_ways_are_timed_once_and_leave_nothing(pipe, monkeypatch):
    sampler = DifferentiableSampler(pipe, STEPS, memory_budget=None)
    step = sampler._blank_step(2, None)
    before = torch.cuda.memory_reserved()
    seconds = REMEMBERED(step)
    assert list(seconds) == ["eager", "graphs", "replay eager", "replay graphs"] and min(seconds.values()) > 0
    collect_garbage()
    assert torch.cuda.memory_reserved() <= before + 2**12
    monkeypatch.setattr(graph_costs, "_measured", None)
    assert REMEMBERED(step) == seconds


@pytest.mark.parametrize("adapted", ["tiny_sd"], indirect=True)
def test_ways_are_measured_where_nothing_can_be_remembered(pipe, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(graph_costs, "cache_file", lambda origin: tmp_path / "file" / "tables" / "ways.json")
    monkeypatch.setattr(graph_costs, "_measured", lambda step: {"eager": 1.0})
    step = DifferentiableSampler(pipe, STEPS, memory_budget=None)._blank_step(1, None)
    assert REMEMBERED(step) == {"eager": 1.0}


@pytest.fixture
def budgeted(adapted, ways, steady_clock):
    """A sampler with a budget, where graphs are faster; a plan for each use of them; bytes that others reserve.

    Those are of checks before: Qwen-Image's network remembers its positions for good.
    """
    collect_garbage()
    reserved = torch.cuda.memory_reserved()
    ways.update({"graphs": 0.5, "replay graphs": 0.9})
    sampler = DifferentiableSampler(adapted.to("cuda"), STEPS, memory_budget="20GiB", optimizer_bytes=0)
    solver = sampler.solver(len(PROMPTS))
    with pytest.raises(BudgetInfeasible) as error:
        solver.plan(GRAD_STEPS, 1)
    least, most = error.value.smallest_bytes, solver.plan(GRAD_STEPS, 2**50).peak_bytes
    found = [solver.plan(GRAD_STEPS, budget) for budget in (least, (least + most) // 2, most)]
    assert {plan.graphs for plan in found} >= {GraphUse.NONE, GraphUse.ALL}
    plans = {plan.graphs: plan for plan in found}
    # Where replays gain by graphs too, the solver may never stop at evaluations.
    sampling = price(solver.table, replace(plans[GraphUse.NONE], graphs=GraphUse.SAMPLING))
    return sampler, {GraphUse.SAMPLING: sampling, **plans}, reserved


@pytest.mark.parametrize("adapted", ["tiny_sd"], indirect=True)
def test_a_plan_counts_what_its_graphs_reserve(budgeted, emulated):
    sampler, plans, reserved = budgeted
    assert set(plans) == set(GraphUse)
    images = []
    for plan in plans.values():
        sampler.fast.forget_recordings()
        peaks = []
        for _ in ("records", "replays"):
            for parameter in sampler.model.trainable():
                parameter.grad = torch.zeros_like(parameter)
            collect_garbage()
            torch.cuda.reset_peak_memory_stats()
            images.append(run_under(sampler, plan).cpu())  # kept there, since the next peak must not count them
            peaks.append(torch.cuda.max_memory_reserved() - reserved)
        slack = sampler.solver(len(PROMPTS)).table.transfer_bytes if plan.host_bytes else 0
        assert max(peaks) <= plan.peak_bytes + 16 * 512, plan.explain()
        if plan.graphs is not GraphUse.SAMPLING:  # not the solver's: what its graphs reserve may lie idle at the peak
            assert plan.peak_bytes <= 1.05 * peaks[1] + slack, plan.explain()
    assert all(torch.equal(one, images[0]) for one in images)


def run_under(sampler, plan):
    images = sampler(PROMPTS, None, torch.Generator().manual_seed(0), grad_steps=GRAD_STEPS, plan=plan)
    (images * torch.linspace(0, 1, images.shape[-1], device="cuda")).mean().backward()
    return images.detach()
