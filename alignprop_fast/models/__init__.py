"""Diffusers pipelines as chains; the only importers of diffusers, transformers and peft.

Heavy: import what you need from the submodules. `adapt` picks the adapter that fits a pipeline.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignprop_fast.models.pipeline_adapter import PipelineAdapter


def adapt(pipe: Any) -> "PipelineAdapter":
    """The adapter for a diffusers pipeline.

    Raises:
        ValueError: a pipeline that no adapter fits.
    """
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    from alignprop_fast.models.stable_diffusion import StableDiffusionAdapter
    from alignprop_fast.models.stable_diffusion_xl import StableDiffusionXLAdapter

    if isinstance(pipe, StableDiffusionXLPipeline):
        return StableDiffusionXLAdapter(pipe)
    if isinstance(pipe, StableDiffusionPipeline):
        return StableDiffusionAdapter(pipe)
    raise ValueError(
        f"{type(pipe).__name__} is not supported: use a StableDiffusionPipeline or a StableDiffusionXLPipeline"
    )
