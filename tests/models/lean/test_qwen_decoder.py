"""Qwen-Image's decoder of one frame: the VAE's own image and gradient, with the ops, by bands and with stages.

Tolerance: float64, but the VAE rounds to fp32 where it upsamples; 1e-6 of the largest element.
"""

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d

from alignprop_fast.making.random_weights.networks import qwen_vae
from alignprop_fast.models.lean.banded_decoder import bandable, banded, banded_stages
from alignprop_fast.models.lean.qwen_decoder import FrozenCausalConv3d
from alignprop_fast.models.lean.surgery import put_ops_in, take_ops_out


@pytest.fixture(scope="module")
def vae():
    """With a level that the VAE also upsamples in time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return qwen_vae((4, 8, 8)).requires_grad_(False).double()


def latents():
    return torch.randn(2, 4, 1, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def image_and_gradient(decode):
    x = latents().requires_grad_()
    y = decode(x)
    return y.detach(), torch.autograd.grad(y.square().sum(), x)[0]


@pytest.fixture(scope="module")
def whole(vae):
    """By the VAE's own decoder, which remembers frames."""
    return image_and_gradient(lambda x: vae.decode(x).sample)


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-6 * b.abs().max()


def decoded(vae, x):
    return vae.decoder(vae.post_quant_conv(x)).clamp(-1, 1)


def test_image_and_gradient_stay(vae, whole):
    put_ops_in(vae.decoder)
    assert any(type(module) is FrozenCausalConv3d for module in vae.decoder.modules())
    assert_same(image_and_gradient(lambda x: decoded(vae, x)), whole)
    for rows in (1, 3, None):
        with banded(bandable(vae.decoder), rows):
            assert_same(image_and_gradient(lambda x: decoded(vae, x)), whole)
    with banded_stages(vae.decoder, 2):
        y = image_and_gradient(lambda x: decoded(vae, x))
    assert_same(y, whole)
    take_ops_out(vae.decoder)
    assert {type(m) for m in vae.decoder.modules() if "Causal" in type(m).__name__} == {QwenImageCausalConv3d}
    assert_same(image_and_gradient(lambda x: decoded(vae, x)), whole)


def test_a_convolution_of_a_video_stays_its_own(vae):
    put_ops_in(vae.decoder)
    conv, frames = vae.decoder.conv_in, torch.randn(1, 4, 3, 6, 5, dtype=torch.float64)
    assert type(conv) is FrozenCausalConv3d
    assert torch.equal(conv(frames), QwenImageCausalConv3d.forward(conv, frames))
    assert torch.equal(
        conv(frames[:, :, :1], frames[:, :, 1:]),
        QwenImageCausalConv3d.forward(conv, frames[:, :, :1], frames[:, :, 1:]),
    )
    take_ops_out(vae.decoder)
