"""The stand-in for CUDA in cuda_on_cpu/ must run a correct kernel and detect every fault of a broken one."""

import ctypes
import re

import pytest
import torch

from .cuda_on_cpu.build import STAND_IN, Memory, build, for_the_cpu

ORDERS = (0, 1, 2)  # forwards, backwards, shuffled


@pytest.fixture(scope="module")
def library(request):
    source = for_the_cpu((STAND_IN / "faults.cu").read_text())
    loaded = ctypes.CDLL(str(build(request.config.cache, "faults", {"faults.cpp": source}, with_torch=False)))
    loaded.run.restype = ctypes.c_char_p
    return loaded


def run(library, kernel, order):
    """The error at launch or None, and the 128 results of two blocks."""
    library.set_order(order)
    memory = Memory(at_end=True)
    out = memory.place(torch.full((128,), torch.nan))
    failure = library.run(kernel.encode(), ctypes.c_void_p(out.data_ptr()))
    return failure and failure.decode(), out


@pytest.mark.parametrize("order", ORDERS)
def test_a_healthy_kernel(library, order):
    """Each thread ends with the sum of the other warp's numbers, the same in all lanes of a warp."""
    failure, out = run(library, "healthy", order)
    assert failure is None
    expected = torch.tensor([sum(range(32, 64)), sum(range(32))] * 2).repeat_interleave(32)
    assert torch.equal(out, expected.float())


@pytest.mark.parametrize("kernel", ["missing_barrier", "overwritten_too_early", "dependent_blocks"])
def test_a_race_gives_other_results_in_another_order(library, kernel):
    results = [run(library, kernel, order) for order in ORDERS]
    assert [failure for failure, _ in results] == [None] * 3
    assert not torch.equal(results[0][1], results[1][1]) and not torch.equal(results[0][1], results[2][1])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("kernel", "word"),
    [
        ("barrier_of_some", "32 of 64 threads wait at the barrier in line .* for others; 32 have ended"),
        ("two_barriers", "32 of 64 threads wait at the barrier in line .* for others; 0 have ended"),
        ("half_a_mask", "whose mask 0xffff lacks one"),
        ("lane_outside_the_mask", "whose mask 0xffff lacks one"),
        ("shuffle_of_some", "32 of 64 threads wait at the shuffle in line .* for others; 32 have ended"),
        ("beyond_the_buffer", r"block \(1, 0\): thread 63 touches .*, outside of every buffer"),
        ("beyond_shared_memory", "thread 63 touches .*, outside of every buffer"),
        ("misaligned_vector", "misaligned access"),
        ("local_array_overrun", "index too large"),
        ("too_many_threads", r"\(2, 1\) blocks of 64 threads with 0 bytes cannot be launched"),
    ],
)
def test_a_fault_fails_the_launch(library, kernel, word, order):
    failure, _ = run(library, kernel, order)
    assert failure is not None
    assert re.search(word, failure), failure
    assert run(library, "healthy", order)[0] is None  # and not the next one
