"""The cost table: what each part of a training step keeps, needs for a moment, and takes, under each option."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """One way to carry a segment from its forward to its backward pass.

    name: "keep" (all activations), "recompute" (block inputs only), "image" (decoder: one image at a time), ...
    kept_bytes: alive from the forward pass until the segment's backward pass begins.
    transient_bytes: alive on top of the kept bytes at the worst moment of the forward and backward pass.
    seconds: forward with its bookkeeping, plus backward, plus whatever is computed again.
    """

    name: str
    kept_bytes: int
    transient_bytes: int
    seconds: float


@dataclass(frozen=True)
class Segment:
    """A part of the network whose option can be chosen by itself."""

    name: str
    options: tuple[Option, ...]


@dataclass(frozen=True)
class CostTable:
    """Costs of one training step at one batch size, resolution and dtype, on one device.

    fixed_bytes: always there: weights, adapters, their gradients, optimizer state.
    latent_bytes: the latents of one step of the chain.
    step: segments of one denoising step that carries gradient.
    decoder: segments of the decoder.
    sampling_bytes, sampling_seconds: one denoising step without gradient: transient bytes, time.
    reward_bytes: what the reward holds at its worst moment.
    """

    fixed_bytes: int
    latent_bytes: int
    step: tuple[Segment, ...]
    decoder: tuple[Segment, ...]
    sampling_bytes: int
    sampling_seconds: float
    reward_bytes: int = 0
