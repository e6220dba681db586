"""The autoencoder's loss sees smeared edges, and standard latents are decoded to what they were before."""

import copy

import torch

from alignprop_fast.making.networks import build_vae
from alignprop_fast.making.scenes import to_signed
from alignprop_fast.making.train_vae import encode, reconstruction_loss, standardise


def test_latents_become_standard_and_pictures_stay():
    torch.manual_seed(0)
    vae = build_vae().eval().requires_grad_(False)
    pictures = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8)
    before = copy.deepcopy(vae)
    standardise(vae, pictures)
    latents = encode(vae, pictures)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(8), rtol=0, atol=1e-4)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(8), rtol=1e-4, atol=0)
    assert vae.config.scaling_factor == 1.0
    x = to_signed(pictures)
    # fp32 rounding of unit-sized values, through two 1 x 1 convolutions and the decoder.
    torch.testing.assert_close(
        vae.decode(latents).sample, before.decode(encode(before, pictures)).sample, rtol=0, atol=1e-4
    )
    new, old = vae.encode(x).latent_dist, before.encode(x).latent_dist
    ratio = old.std / new.std
    torch.testing.assert_close(ratio, ratio[:1, :, :1, :1].expand_as(ratio), rtol=1e-4, atol=0)
    torch.testing.assert_close((old.mean / ratio).std((0, 2, 3)), torch.ones(8), rtol=1e-3, atol=0)


def test_a_smeared_edge_costs_more_than_the_same_error_spread_evenly():
    target = torch.zeros(1, 1, 2, 8)
    target[..., 4:] = 1
    smeared, shifted = target.clone(), target.clone()
    smeared[..., 3], smeared[..., 4] = 0.25, 0.75
    shifted += 0.5 / 8
    assert (smeared - target).abs().mean() == (shifted - target).abs().mean()
    assert reconstruction_loss(smeared, target) > 2 * reconstruction_loss(shifted, target)
