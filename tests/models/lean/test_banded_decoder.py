"""A decoder by bands of rows gives the same image and gradient with less memory, and is restored afterwards.

Tolerance: float64 rounding through a whole decoder; measured 1e-14 of the largest element, asserted at 1e-10.
"""

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D

from alignprop_fast.models.lean import banded_decoder
from alignprop_fast.models.lean.banded_decoder import bandable, banded, banded_stages
from alignprop_fast.models.lean.surgery import put_ops_in
from alignprop_fast.planner import BlockOption
from alignprop_fast.runtime import Block, PeakMeter, apply_options, run_decoder_stage


@pytest.fixture
def decoder(tiny_sd):
    put_ops_in(tiny_sd.vae.decoder)
    return tiny_sd.vae.decoder.double()


def image_and_gradient(fn, x):
    x = x.detach().requires_grad_()
    y = fn(x)
    return y.detach(), torch.autograd.grad(y.square().sum(), x)[0]


def assert_same(ours, whole):
    for a, b in zip(ours, whole, strict=True):
        assert (a - b).abs().max() <= 1e-10 * b.abs().max()


def blocks(decoder, kinds):
    return [Block(name, module, "decoder") for name, module in decoder.named_modules() if isinstance(module, kinds)]


def latents(batch=2):
    return torch.randn(batch, 4, 8, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rows", [1, 5, None])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_image_and_gradient_stay(decoder, rows, memory_format):
    x = latents().contiguous(memory_format=memory_format)
    decoder.to(memory_format=memory_format)
    whole = image_and_gradient(decoder, x)
    with banded(bandable(decoder), rows):
        ours = image_and_gradient(decoder, x)
    assert_same(ours, whole)


def test_every_block_goes_by_bands(decoder, monkeypatch):
    """Every convolution of residual blocks and upsamplers, and the last one, sees at most one band and its halo."""
    sizes = []
    conv2d = torch.nn.functional.conv2d
    monkeypatch.setattr(
        torch.nn.functional,
        "conv2d",
        lambda x, w, *a, **k: sizes.append((*w.shape[2:], x.shape[2])) or conv2d(x, w, *a, **k),
    )
    with banded(bandable(decoder), 4):
        image_and_gradient(decoder, latents(1))
    # conv_in, before the blocks, is the only one that is not by bands.
    assert sorted(size for size in sizes if size[0] == 3 and size[2] > 6) == [(3, 3, 8)]


def test_modules_are_left_as_they_were(decoder):
    before = [dict(vars(module)) for module in decoder.modules()]
    with pytest.raises(RuntimeError, match="inside"), banded(bandable(decoder)), banded(bandable(decoder), 4):
        raise RuntimeError("inside")
    assert [dict(vars(module)) for module in decoder.modules()] == before
    with pytest.raises(TypeError, match="Conv2d"), banded([*bandable(decoder), decoder.conv_in]):
        pass
    assert [dict(vars(module)) for module in decoder.modules()] == before


def test_what_the_ops_do_not_cover_takes_its_own_path(decoder, monkeypatch):
    """Weights that learn get their gradients; under autocast nothing is banded."""
    x, learning = (
        latents(),
        [decoder.up_blocks[0].resnets[0].conv1, decoder.conv_out, decoder.up_blocks[0].upsamplers[0]],
    )
    for module in learning:
        module.requires_grad_(True)
    weights = [module.conv.weight if isinstance(module, Upsample2D) else module.weight for module in learning]
    whole = torch.autograd.grad(decoder(x).square().sum(), weights)
    with banded(bandable(decoder), 3):
        ours = torch.autograd.grad(decoder(x).square().sum(), weights)
    assert_same(ours, whole)
    decoder.requires_grad_(False).float()
    for op in ("norm_conv", "upsample_conv", "banded_residual"):
        monkeypatch.setattr(banded_decoder, op, None)
    with torch.autocast("cpu", torch.bfloat16), banded(bandable(decoder)):
        assert image_and_gradient(decoder, x.float())[1].isfinite().all()


def test_run_again_in_the_backward_pass(decoder):
    """Under a checkpoint of everything, by stages, and by stages under a checkpoint of everything."""
    x = latents()
    whole = image_and_gradient(decoder, x)

    def by_bands(x):
        with banded(bandable(decoder), 3), apply_options({"*": BlockOption.RECOMPUTE}, blocks(decoder, Attention)):
            return decoder(x)

    assert_same(image_and_gradient(lambda x: run_decoder_stage(by_bands, x, "image", {}), x), whole)
    before = [dict(vars(module)) for module in decoder.modules()]

    def by_stages(x):
        with banded_stages(decoder, 3):
            return decoder(x)

    assert_same(image_and_gradient(by_stages, x), whole)
    assert_same(image_and_gradient(lambda x: run_decoder_stage(by_stages, x, "image", {}), x), whole)
    assert [dict(vars(module)) for module in decoder.modules()] == before


def test_peak_at_the_published_widths():
    """512 x 512 in bf16, counted without data: at most 0.7 of a checkpoint per block, and even less per stage."""
    with torch.device("meta"):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=1,
        )
        decoder = vae.decoder.requires_grad_(False).bfloat16().to(memory_format=torch.channels_last)
        x = torch.empty(1, 4, 64, 64, dtype=torch.bfloat16)
    put_ops_in(decoder)
    whole, kinds = {"*": BlockOption.RECOMPUTE}, ResnetBlock2D | Upsample2D | Attention

    def by_bands(x):
        with banded(bandable(decoder), 32), apply_options(whole, blocks(decoder, Attention)):
            return decoder(x)

    def by_stages(x):
        with banded_stages(decoder, 32):
            return decoder(x)

    ways = {
        "block": lambda x: run_decoder_stage(decoder, x, "image", whole, blocks(decoder, kinds)),
        "bands": lambda x: run_decoder_stage(by_bands, x, "image", {}),
        "stages": by_stages,
    }
    # Bands of 32 rows: more would make a slow test.
    peaks = {}
    for name, fn in ways.items():
        with PeakMeter(torch.device("meta")) as meter:
            image_and_gradient(fn, x)
        peaks[name] = meter.peak_bytes
    assert peaks["bands"] < 0.7 * peaks["block"]
    assert peaks["stages"] < 0.9 * peaks["bands"]
