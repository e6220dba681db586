"""Diffusers pipelines as chains. On the gradient's way only these modules import diffusers, transformers and peft.

The submodules are slow to import, so import only those you need. `adapt` picks the adapter that fits a pipeline.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignprop_fast.models.pipeline_adapter import PipelineAdapter

_ADAPTERS = {
    "StableDiffusionPipeline": "stable_diffusion.StableDiffusionAdapter",
    "StableDiffusionXLPipeline": "stable_diffusion_xl.StableDiffusionXLAdapter",
    "StableDiffusion3Pipeline": "stable_diffusion_3.StableDiffusion3Adapter",
    "FluxPipeline": "flux.FluxAdapter",
    "ChromaPipeline": "chroma.ChromaAdapter",  # since 0.34
    "Flux2Pipeline": "flux2.Flux2DevAdapter",  # in diffusers since 0.36
    "Flux2KleinPipeline": "flux2.Flux2KleinAdapter",  # since 0.37
    "ZImagePipeline": "z_image.ZImageAdapter",  # since 0.36
    "QwenImagePipeline": "qwen_image.QwenImageAdapter",  # since 0.35
    "Krea2Pipeline": "krea2.Krea2Adapter",
    "Lumina2Pipeline": "lumina2.Lumina2Adapter",  # since 0.33
    "SanaPipeline": "sana.SanaAdapter",  # since 0.32
}
SUPPORTED = tuple(_ADAPTERS)
"""Pipelines of diffusers that have an adapter, some of which only newer releases have."""


def adapt(pipe: Any) -> "PipelineAdapter":
    """The adapter for a diffusers pipeline.

    Raises:
        ValueError: no adapter fits the pipeline, or it contains something that the chain does not support.
    """
    import diffusers

    from alignprop_fast.models.refused import why_not
    from alignprop_fast.models.switches import check_pipeline

    for name, place in _ADAPTERS.items():
        pipeline_class = getattr(diffusers, name, None)
        if pipeline_class is not None and isinstance(pipe, pipeline_class):
            check_pipeline(pipe, pipeline_class)
            module, _, adapter_class = place.partition(".")
            return getattr(import_module(f"alignprop_fast.models.{module}"), adapter_class)(pipe)
    name = type(pipe).__name__
    raise ValueError(f"{name} {why_not(name)}: use a pipeline of one of the classes {', '.join(SUPPORTED)}")
