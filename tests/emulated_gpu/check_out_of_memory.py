"""A device that is too small for what is tried: what is tried instead begins with what was there before.

A chain of eight blocks, of which one run keeps several times what a run of a single block does.
"""

import pytest
import torch
from torch import nn

from alignprop_fast.ops.errors import OutOfMemory, unless_out_of_memory
from alignprop_fast.ops.garbage import collect_garbage
from alignprop_fast.planner import BlockOption
from alignprop_fast.runtime import Block, DecoderCosts, Work, reward_stages, segments, trace

GPU = torch.device("cuda")
MIB = 2**20


class Layer(nn.Module):
    """Keeps about four times its input, or only the input."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64, device=GPU).requires_grad_(False)

    def forward(self, x):
        return x + self.linear(x.sin() * x.cos()).tanh() * 0.1


@pytest.fixture
def limited(emulated):
    """Sets, for one check, how much may be allocated beside what is alive."""
    yield lambda size_bytes: emulated.set_limit(at_rest() + int(size_bytes))
    emulated.set_limit(24 * 2**30)


def at_rest():
    collect_garbage()
    return torch.cuda.memory_allocated()


@pytest.fixture(scope="module")
def work(emulated):
    net = nn.Sequential(*(Layer() for _ in range(8)))
    x = torch.randn(4096, 64, device=GPU, requires_grad=True)  # 1 MiB
    blocks = [Block(f"layer.{k}", layer, "residuals") for k, layer in enumerate(net)]

    def pull(y, leaves):
        return torch.autograd.grad(y.sum(), leaves, allow_unused=True)

    return Work(lambda: net(x), pull, blocks, GPU, [x], repeats=1)


def test_every_option_is_measured_where_the_leanest_fits(emulated, limited, work):
    """Old code kept each option's bytes in all blocks at once."""
    all_fits = segments(work)
    limited(0.6 * trace(work, {}).peak_bytes)
    assert [[(o.name, o.kept_bytes) for o in one.options] for one in segments(work)] == [
        [(o.name, o.kept_bytes) for o in one.options] for one in all_fits
    ]
    limited(0.5 * trace(work, {"*": BlockOption.RECOMPUTE}).peak_bytes)
    with pytest.raises(torch.OutOfMemoryError):
        segments(work)


def decode(x_BN):
    """Images of 1 MiB, for each of which 5 MiB are alive at once."""
    return (x_BN.sin().cos().exp().tanh() * x_BN)[:, None]


def banded(x_BN):
    """The same with less memory."""
    return (x_BN * 2)[:, None]


@pytest.mark.parametrize(
    ("room", "stages"), [(200, ["batch", "image", "bands"]), (12, ["image", "bands"]), (7, ["bands"])]
)
def test_a_decoder_stage_that_does_not_fit_is_left_out(emulated, limited, room, stages):
    x = torch.randn(4, 2**18, device=GPU)
    limited(room * MIB)
    found = DecoderCosts(decode, banded, ()).stages(x, 4 * MIB)
    assert [stage.name for stage in found] == stages


def test_a_decoder_of_which_no_stage_fits_says_so(emulated, limited):
    x = torch.randn(4, 2**18, device=GPU)
    limited(MIB)
    with pytest.raises(torch.OutOfMemoryError, match="decoder fits neither at once nor in pieces"):
        DecoderCosts(decode, banded, ()).stages(x, 4 * MIB)


def test_a_reward_that_fits_in_chunks_alone(emulated, limited):
    images = torch.randn(4, 3, 256, 256, device=GPU)  # 3 MiB

    def score(images_BCHW, *lists):
        return images_BCHW.sin().cos().exp().mean((1, 2, 3)), {}

    assert [stage.name for stage in reward_stages(score, images, by_image=True)] == ["batch", "chunk:1", "chunk:2"]
    limited(9 * MIB)
    assert [stage.name for stage in reward_stages(score, images, by_image=True)] == ["chunk:1", "chunk:2"]


def test_no_tensor_outlives_its_backward_in_the_thread_of_autograd(emulated):
    """Without waiting for that thread about one try in thirty counts what it still holds."""
    start = at_rest()
    for _ in range(300):
        x = torch.ones(1024, device=GPU, requires_grad=True)
        torch.autograd.grad(x.sin().cos().exp().mean(), x)
        del x
        collect_garbage()
        assert torch.cuda.memory_allocated() == start


def test_what_failed_is_freed_though_the_error_is_held_and_frames_refer_to_each_other(emulated, limited):
    held, start = [], at_rest()

    def fails():
        x = torch.ones(MIB, device=GPU, requires_grad=True)
        kept = [x.exp()]
        kept.append(lambda: kept)
        try:
            torch.empty(200 * MIB, device=GPU)
        except torch.OutOfMemoryError as error:
            held.append(error)
            raise

    limited(100 * MIB)
    found = unless_out_of_memory(fails)
    assert isinstance(found, OutOfMemory) and found.reason.startswith("CUDA out of memory") and held
    assert torch.cuda.memory_allocated() == start
    with pytest.raises(ValueError, match="another"):
        unless_out_of_memory(lambda: (_ for _ in ()).throw(ValueError("another")))
