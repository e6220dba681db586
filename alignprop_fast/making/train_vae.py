"""Trains the bundled autoencoder: error of the pixels and of their differences, and a small KL term."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignprop_fast.making.loop import Settings, fit
from alignprop_fast.making.networks import LATENT_CHANNELS, build_vae
from alignprop_fast.making.scenes import save_grid, to_signed

KL_WEIGHT = 1e-4
INITIAL_LOG_VARIANCE = -6.0


def reconstruction_loss(picture: Tensor, target: Tensor) -> Tensor:
    """Error of the pixels [B, 3, H, W] in [-1, 1]: absolute (sharp), twice the squared one (fast colours) and edges.

    The last term is the absolute error of the differences of neighbouring pixels: without it edges are smeared.
    """
    error = picture - target
    edges = sum(error.diff(dim=axis).abs().mean() for axis in (-1, -2))
    return error.abs().mean() + 2 * error.square().mean() + edges


def train_vae(pictures: Tensor, settings: Settings, folder: Path, seed: int):
    """Trains on uint8 pictures [N, 3, 64, 64]; returns the averaged `AutoencoderKL` with latents of unit size."""
    torch.manual_seed(seed)
    vae = build_vae()
    # Start with little posterior noise: at its usual variance of 1 it hides the picture for hundreds of steps.
    torch.nn.init.constant_(vae.quant_conv.bias[LATENT_CHANNELS:], INITIAL_LOG_VARIANCE)

    def loss_at(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(pictures), (settings.batch_size,), generator=generator)
        target = to_signed(pictures[index])
        posterior = vae.encode(target).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return reconstruction_loss(decoded, target) + KL_WEIGHT * kl

    preview = _preview(pictures, folder / "vae.png")
    averaged: Any = fit({"vae": vae}, loss_at, settings, folder / "vae.pt", seed, preview)["vae"]
    standardise(averaged, pictures[:1000])
    return averaged


@torch.no_grad()
def standardise(vae: Any, pictures: Tensor) -> None:
    """Gives every latent channel mean 0 and variance 1 on these pictures, so that one noise level suits them all.

    The 1 x 1 convolutions around the latents take it on: what is decoded stays the same up to rounding.
    """
    latents = encode(vae, pictures)
    mean_C, std_C = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    into, out, channels = vae.quant_conv, vae.post_quant_conv, len(mean_C)
    out.bias += out.weight[:, :, 0, 0] @ mean_C
    out.weight *= std_C[None, :, None, None]
    into.bias[:channels] -= mean_C
    into.bias[:channels] /= std_C
    into.weight[:channels] /= std_C[:, None, None, None]
    into.bias[channels:] -= 2 * std_C.log()  # the posterior's log variances
    vae.register_to_config(scaling_factor=1.0)


def _preview(pictures: Tensor, path: Path):
    def show(step: int, averages: dict) -> None:
        shown = pictures[:32]
        with torch.no_grad():
            decoded = averages["vae"](to_signed(shown)).sample
        print(f"mean error {(decoded - to_signed(shown)).abs().mean() / 2:.4f} of pixels in [0, 1]", flush=True)
        save_grid(torch.stack([shown.float() / 255, decoded / 2 + 0.5], 1).flatten(0, 1), path, columns=16)

    return show


@torch.no_grad()
def encode(vae, pictures: Tensor, batch_size: int = 64) -> Tensor:
    """Latent means, unscaled: uint8 pictures [N, 3, 64, 64] to fp32 [N, 8, 16, 16]."""
    return torch.cat([vae.encode(to_signed(batch)).latent_dist.mean for batch in pictures.split(batch_size)])
