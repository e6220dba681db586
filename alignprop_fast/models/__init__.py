"""Diffusers pipelines as chains. On the gradient's way only these modules import diffusers, transformers and peft.

The submodules are slow to import, so import only those you need. `adapt` picks the adapter that fits a pipeline.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignprop_fast.models.pipeline_adapter import PipelineAdapter


def adapt(pipe: Any) -> "PipelineAdapter":
    """The adapter for a diffusers pipeline.

    Raises:
        ValueError: no adapter fits the pipeline, or it contains something that the chain does not support.
    """
    import diffusers
    from diffusers import (
        FluxPipeline,
        StableDiffusion3Pipeline,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
    )

    from alignprop_fast.models.flux import FluxAdapter
    from alignprop_fast.models.stable_diffusion import StableDiffusionAdapter
    from alignprop_fast.models.stable_diffusion_3 import StableDiffusion3Adapter
    from alignprop_fast.models.stable_diffusion_xl import StableDiffusionXLAdapter
    from alignprop_fast.models.switches import check_pipeline

    adapters: dict[type, type[PipelineAdapter]] = {
        StableDiffusionPipeline: StableDiffusionAdapter,
        StableDiffusionXLPipeline: StableDiffusionXLAdapter,
        StableDiffusion3Pipeline: StableDiffusion3Adapter,
        FluxPipeline: FluxAdapter,
    }
    if hasattr(diffusers, "ZImagePipeline"):  # since 0.36
        from alignprop_fast.models.z_image import ZImageAdapter

        adapters[diffusers.ZImagePipeline] = ZImageAdapter
    if hasattr(diffusers, "Flux2KleinPipeline"):  # since 0.37
        from alignprop_fast.models.flux2 import Flux2KleinAdapter

        adapters[diffusers.Flux2KleinPipeline] = Flux2KleinAdapter
    for pipeline_class, adapter_class in adapters.items():
        if isinstance(pipe, pipeline_class):
            check_pipeline(pipe, pipeline_class)
            return adapter_class(pipe)
    names = ", ".join(pipeline_class.__name__ for pipeline_class in adapters)
    raise ValueError(f"{type(pipe).__name__} is not supported: use a pipeline of one of the classes {names}")
