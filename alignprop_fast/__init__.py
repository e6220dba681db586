"""Fine-tune text-to-image diffusion models with the gradient of a reward (AlignProp), fast and in little memory."""

from typing import TYPE_CHECKING, Any

from alignprop_fast.version import __version__

if TYPE_CHECKING:
    from alignprop_fast.generate.sampler import DifferentiableSampler
    from alignprop_fast.models.ddpo_pipeline import DefaultDDPOStableDiffusionPipeline
    from alignprop_fast.training.config import AlignPropConfig
    from alignprop_fast.training.trainer import AlignPropTrainer


__all__ = [
    "AlignPropConfig",
    "AlignPropTrainer",
    "DefaultDDPOStableDiffusionPipeline",
    "DifferentiableSampler",
    "__version__",
]

_HOME = {
    "AlignPropConfig": "training.config",
    "AlignPropTrainer": "training.trainer",
    "DefaultDDPOStableDiffusionPipeline": "models.ddpo_pipeline",
    "DifferentiableSampler": "generate.sampler",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `alignprop-fast --help` should not wait for torch and diffusers."""
    if name not in _HOME:
        raise AttributeError(f"module 'alignprop_fast' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"alignprop_fast.{_HOME[name]}"), name)
