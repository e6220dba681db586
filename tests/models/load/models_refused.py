"""Models that are refused: a wrong pair of file and folder, files that hold no model, and folders."""

import json
import shutil

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from alignprop_fast.making.random_weights import make_folder

from .files_refused import BYTES, NO_MODEL
from .given_models import refused
from .original_layout import weights, whole_file


@refused("one file without `--model-config`", "give the folder of a model of the same architecture as the model config")
def _(shelf):
    return whole_file(shelf.sd, shelf.here / "model.safetensors"), None


@refused(
    "SDXL's file without its second text encoder",
    "lacks SDXL's second text encoder: give a whole file, or one with only the UNet",
)
def _(shelf):
    folder = make_folder("sdxl", shelf.here / "sdxl", second_text_width=32)
    file = whole_file(folder, shelf.here / "model.safetensors")
    state = {name: tensor for name, tensor in load_file(file).items() if "embedders.1" not in name}
    return shelf.write(state), folder


@refused("SD's file with the folder of SDXL", "give the folder of a model of the same architecture as the model config")
def _(shelf):
    return whole_file(shelf.sd, shelf.here / "model.safetensors"), shelf.sdxl


@refused(
    "SD 2's file with the folder of SD 1",
    "(SD 1 has 768, SD 2 1024, SDXL 2048): give the folder of a model of the same architecture",
)
def _(shelf):
    other = make_folder("sd", shelf.here / "other", text_width=16)
    return whole_file(shelf.sd, shelf.here / "model.safetensors"), other


@refused("file of FLUX.1 or SD3 with the folder of another model", "holds the denoiser of a FluxPipeline")
def _(shelf):
    return shelf.write(weights(shelf.flux / "transformer")), shelf.sd


def _file(name: str, content: dict[str, torch.Tensor] | bytes, words: str) -> None:
    @refused(name, words)
    def _(shelf):
        return (shelf.bytes(content) if isinstance(content, bytes) else shelf.write(content)), shelf.sd


for _name, (_content, _words) in {**NO_MODEL, **BYTES}.items():
    _file(_name, _content, _words)


@refused("safetensors file under another name", "is a safetensors file with another ending: rename to model")
def _(shelf):
    return shelf.write(weights(shelf.sd / "unet")).rename(shelf.here / "model.ckpt"), shelf.sd


@refused("folder with a Git LFS pointer in it", "unet/diffusion_pytorch_model.safetensors is a Git LFS pointer")
def _(shelf):
    folder = shelf.copy(shelf.sd)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(BYTES["pointer of Git LFS"][0])
    return folder, None


@refused(
    "folder of a quantised model (bitsandbytes, torchao, quanto)",
    "is quantised (bitsandbytes): give the model in fp16 or bf16 (--base-dtype nf4, int8 or fp8 quantises it)",
)
def _(shelf):
    folder = shelf.copy(shelf.sd)
    config = folder / "unet" / "config.json"
    settings = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
    return folder, None


@refused("folder without a text encoder", "has no text_encoder, which encodes the prompts: give a complete model")
def _(shelf):
    pipe = DiffusionPipeline.from_pretrained(shelf.sd, text_encoder=None)
    pipe.save_pretrained(shelf.here / "model")
    shutil.copytree(shelf.sd / "tokenizer", shelf.here / "model" / "tokenizer", dirs_exist_ok=True)
    return shelf.here / "model", None


@refused("folder within which the model is", "has no model_index.json: give the folder inside it, ")
def _(shelf):
    shutil.copytree(shelf.sd, shelf.here / "models--owner--name" / "snapshots" / "main")
    return shelf.here / "models--owner--name", None


@refused("folder of a PEFT adapter", "it holds a PEFT adapter; give the model that it was trained on")
def _(shelf):
    shelf.bytes(b"{}", "adapter_config.json")
    return shelf.here, None


@refused("folder of a LoRA", "it holds a LoRA; give the model that it was trained on")
def _(shelf):
    shelf.bytes(b"", "pytorch_lora_weights.safetensors")
    return shelf.here, None


@refused(
    "folder of one network (transformers', or one part of a pipeline)",
    "it holds one network; give the top folder of the pipeline that it belongs to",
)
def _(shelf):
    return shelf.sd / "unet", None


@refused("folder of single files", "it holds single files; give one of them, such as ")
def _(shelf):
    return shelf.bytes(b"").parent, None


@refused("folder of an ONNX model", "is an ONNX model, which cannot be trained: give .safetensors files")
def _(shelf):
    folder = shelf.copy(shelf.sd)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / "model.onnx")
    return folder, None


@refused(
    "folder of another kind of pipeline",
    "holds a StableDiffusionControlNetPipeline, which is not supported: use one of StableDiffusionPipeline",
)
def _(shelf):
    folder = shelf.copy(shelf.sd)
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "StableDiffusionControlNetPipeline"))
    return folder, None


NOT_YET = {
    "PixArt-Sigma": ("PixArtSigmaPipeline", "diffusers cannot add LoRA adapters to its network, nor load them"),
    "Qwen-Image 2.1": (
        "QwenImage21Pipeline",
        "its network keeps a cache of the text between steps, and its VAE is its own",
    ),
}


def refuse_not_yet(title, pipeline, reason):
    @refused(f"folder of {title}", f"holds a {pipeline}, which is not supported ({reason}")
    def _(shelf):
        shelf.bytes(json.dumps({"_class_name": pipeline}).encode(), "model_index.json")
        return shelf.here, None


for title, (pipeline, reason) in NOT_YET.items():
    refuse_not_yet(title, pipeline, reason)


@refused(
    "link that leads to itself",
    "give a folder in the diffusers format, a .safetensors file, a Hub id such as owner/name, demo or demo-twin",
)
def _(shelf):
    (shelf.here / "loop").symlink_to(shelf.here / "loop")
    return shelf.here / "loop", None
