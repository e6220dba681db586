"""The size of a model's pictures."""

from typing import Any

_DEFAULT_SIZE = (1024, 1024)  # pixels, of pipelines that do not say it (Z-Image)


def native_size(pipe: Any) -> tuple[int, int] | None:
    """(height, width) in pixels of the pictures that the model was trained on, if its configuration has them."""
    if "unet" not in pipe.components and not hasattr(pipe, "default_sample_size"):
        return _DEFAULT_SIZE
    latents = pipe.unet.config.sample_size if "unet" in pipe.components else pipe.default_sample_size
    if latents is None:
        return None
    rows, columns = (latents, latents) if isinstance(latents, int) else latents
    return rows * pipe.vae_scale_factor, columns * pipe.vae_scale_factor


def picture_size(pipe: Any, height: int | None, width: int | None) -> tuple[int, int]:
    """(height, width) in pixels; for None the model's own.

    Raises:
        ValueError: the model's configuration has no size.
    """
    if height and width:
        return height, width
    native = native_size(pipe)
    if native is None:
        raise ValueError("the model's configuration has no sample_size: give height and width")
    return height or native[0], width or native[1]
