"""Models that are read."""

import shutil

from diffusers import DiffusionPipeline

from . import original_layout
from .given_models import read
from .original_layout import UNET_PREFIX, weights, whole_file

ALONE = "the rest comes from"


def _folder(name: str, kind: str) -> None:
    @read(f"folder of {name}", kind)
    def _(shelf):
        return getattr(shelf, kind), None


_folder("SD 1 or 2 as `save_pretrained` writes it", "sd")
_folder("SDXL", "sdxl")
_folder("SD3 or SD3.5", "sd3")
_folder("FLUX.1", "flux")
_folder("Chroma", "chroma")
_folder("Lumina 2", "lumina2")
_folder("SANA", "sana")
_folder("Z-Image or Z-Image-Turbo", "z_image")
_folder("FLUX.2-klein", "flux2")
_folder("Qwen-Image", "qwen_image")
_folder("Krea 2", "krea2")


@read("folder with the fp16 variant alone", "", "holds no full weights of")
def _(shelf):
    DiffusionPipeline.from_pretrained(shelf.sd).save_pretrained(shelf.here / "model", variant="fp16")
    shutil.copytree(shelf.sd / "tokenizer", shelf.here / "model" / "tokenizer", dirs_exist_ok=True)
    return shelf.here / "model", None


@read("folder beside whose weights Windows left `:Zone.Identifier` files", "sd")
def _(shelf):
    folder = shelf.copy(shelf.sd)
    (folder / "unet" / "diffusion_pytorch_model.safetensors:Zone.Identifier").write_text("[ZoneTransfer]\nZoneId=3\n")
    return folder, None


@read("one file of SD 1, 2 or SDXL in the original layout, with `--model-config`", "sd")
def _(shelf):
    return whole_file(shelf.sd, shelf.here / "model.safetensors"), shelf.sd


@read("UNet alone in the original layout, with `--model-config`", "sd", ALONE)
def _(shelf):
    unet = original_layout.unet(weights(shelf.sd / "unet"))
    return shelf.write({UNET_PREFIX + name: tensor for name, tensor in unet.items()}), shelf.sd


@read("UNet alone without the usual `model.diffusion_model.`", "sd", ALONE)
def _(shelf):
    return shelf.write(original_layout.unet(weights(shelf.sd / "unet"))), shelf.sd


@read("UNet alone in diffusers' names, with `--model-config`", "sdxl", ALONE)
def _(shelf):
    return shelf.write(weights(shelf.sdxl / "unet")), shelf.sdxl


@read("transformer of SD3 alone, in Stability's names or diffusers'", "sd3", ALONE)
def _(shelf):
    return shelf.write(original_layout.mmdit(weights(shelf.sd3 / "transformer"))), shelf.sd3


@read("transformer alone as ComfyUI saves it (`diffusion_model.`)", "sd3", ALONE)
def _(shelf):
    state = original_layout.mmdit(weights(shelf.sd3 / "transformer"))
    return shelf.write({f"diffusion_model.{name}": tensor for name, tensor in state.items()}), shelf.sd3


def _transformer(name: str, kind: str, layout=dict) -> None:
    """layout: puts the weights under other names."""

    @read(f"transformer of {name}", kind, ALONE)
    def _(shelf):
        folder = getattr(shelf, kind)
        return shelf.write(layout(weights(folder / "transformer"))), folder


_transformer("FLUX.1 alone in diffusers' names", "flux")
_transformer("Z-Image alone, in its original names or diffusers'", "z_image", original_layout.z_image)
_transformer("FLUX.2-klein alone, in its original names or diffusers'", "flux2", original_layout.flux2)
_transformer("FLUX.2-dev alone, in its original names or diffusers'", "flux2_dev", original_layout.flux2)
_transformer("Chroma alone in diffusers' names", "chroma")
_transformer("Lumina 2 alone in diffusers' names", "lumina2")
_transformer("SANA alone in diffusers' names", "sana")
_transformer("Qwen-Image alone", "qwen_image")
_transformer("Krea 2 alone", "krea2")
