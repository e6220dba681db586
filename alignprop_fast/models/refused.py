"""Pipelines of diffusers that have no adapter, with the reason."""

_BY_PICTURE = "needs a picture beside the prompt"
MADE_FROM_OTHERS = {
    "StableDiffusionXLImg2ImgPipeline": "refines a picture, as SDXL's refiner does",
    "LatentConsistencyModelPipeline": "is distilled to few steps by its own rule (LCM)",
    **{f"{name}InpaintPipeline": _BY_PICTURE for name in ("StableDiffusion", "StableDiffusionXL", "StableDiffusion3")},
    **{
        f"StableDiffusion{name}Pipeline": _BY_PICTURE
        for name in ("Img2Img", "InstructPix2Pix", "Depth2Img", "3Img2Img")
    },
    **{f"Flux{name}Pipeline": _BY_PICTURE for name in ("Fill", "Kontext", "Control", "Img2Img", "Inpaint")},
    "Flux2KleinInpaintPipeline": _BY_PICTURE,
    **{f"ZImage{name}Pipeline": _BY_PICTURE for name in ("Img2Img", "Inpaint", "ControlNet", "Omni")},
    **{
        f"QwenImage{name}Pipeline": _BY_PICTURE
        for name in ("Edit", "EditPlus", "EditInpaint", "Img2Img", "Inpaint", "ControlNet", "Layered")
    },
}
"""Pipelines whose text-to-image model may be supported."""

_REASONS = {
    "PixArtSigmaPipeline": "diffusers cannot add LoRA adapters to its network, nor load them",
    "QwenImage21Pipeline": "its network keeps a cache of the text between steps, and its VAE is its own",
}


def why_not(name: str) -> str:
    """The end of a sentence that begins with the class of a pipeline without an adapter."""
    reason = _REASONS.get(name)
    return "is not supported" if reason is None else f"is not supported ({reason})"
