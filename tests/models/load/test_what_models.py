"""Everything that people give as a model: it is read, or refused in one line that names the remedy."""

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from alignprop_fast.making.random_weights import make_folder
from alignprop_fast.models.load.pipeline import load_pipeline

from ...loadable import Format
from . import original_layout
from .original_layout import UNET_PREFIX, weights, whole_file


@dataclass(frozen=True)
class Shelf:
    """Folders of small models, by kind, and an empty one to make things in."""

    sd: Path
    sdxl: Path
    sd3: Path
    flux: Path
    z_image: Path
    flux2: Path
    flux2_dev: Path
    qwen_image: Path
    krea2: Path
    chroma: Path
    lumina2: Path
    sana: Path
    here: Path

    def write(self, state: dict[str, torch.Tensor]) -> Path:
        return original_layout.write(state, self.here / "model.safetensors")

    def bytes(self, content: bytes, name: str = "model.safetensors") -> Path:
        (self.here / name).write_bytes(content)
        return self.here / name

    def copy(self, folder: Path) -> Path:
        return shutil.copytree(folder, self.here / "copy")


Given = tuple[Path, Path | None]  # model and model config


@dataclass(frozen=True)
class Case:
    format: Format
    make: Callable[[Shelf], Given]
    same_as: str = ""  # the model on the shelf whose weights and pictures are to come out


CASES: list[Case] = []


def read(name: str, same_as: str, words: str = ""):
    return _case(Format(name, "read with a note" if words else "read exactly", words), same_as)


def refused(name: str, words: str):
    return _case(Format(name, "refused", words), "")


def _case(row: Format, same_as: str):
    def put(make: Callable[[Shelf], Given]) -> Callable[[Shelf], Given]:
        CASES.append(Case(row, make, same_as))
        return make

    return put


def only(*names: str) -> dict[str, torch.Tensor]:
    """Tensors of these names, square unless the name says "vector"."""
    return {name: torch.zeros(8, 8) for name in names}


ALONE = "the rest comes from"


@read("folder of SD 1 or 2 as `save_pretrained` writes it", "sd")
def _(shelf):
    return shelf.sd, None


@read("folder of SDXL", "sdxl")
def _(shelf):
    return shelf.sdxl, None


@read("folder of SD3 or SD3.5", "sd3")
def _(shelf):
    return shelf.sd3, None


@read("folder of FLUX.1", "flux")
def _(shelf):
    return shelf.flux, None


@read("folder of Chroma", "chroma")
def _(shelf):
    return shelf.chroma, None


@read("folder of Lumina 2", "lumina2")
def _(shelf):
    return shelf.lumina2, None


@read("folder of SANA", "sana")
def _(shelf):
    return shelf.sana, None


@read("folder of Z-Image or Z-Image-Turbo", "z_image")
def _(shelf):
    return shelf.z_image, None


@read("folder of FLUX.2-klein", "flux2")
def _(shelf):
    return shelf.flux2, None


@read("folder of Qwen-Image", "qwen_image")
def _(shelf):
    return shelf.qwen_image, None


@read("folder of Krea 2", "krea2")
def _(shelf):
    return shelf.krea2, None


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


@read("transformer of FLUX.1 alone in diffusers' names", "flux", ALONE)
def _(shelf):
    return shelf.write(weights(shelf.flux / "transformer")), shelf.flux


@read("transformer of Z-Image alone, in its original names or diffusers'", "z_image", ALONE)
def _(shelf):
    return shelf.write(original_layout.z_image(weights(shelf.z_image / "transformer"))), shelf.z_image


@read("transformer of FLUX.2-klein alone, in its original names or diffusers'", "flux2", ALONE)
def _(shelf):
    return shelf.write(original_layout.flux2(weights(shelf.flux2 / "transformer"))), shelf.flux2


@read("transformer of FLUX.2-dev alone, in its original names or diffusers'", "flux2_dev", ALONE)
def _(shelf):
    return shelf.write(original_layout.flux2(weights(shelf.flux2_dev / "transformer"))), shelf.flux2_dev


@read("transformer of Chroma alone in diffusers' names", "chroma", ALONE)
def _(shelf):
    return shelf.write(weights(shelf.chroma / "transformer")), shelf.chroma


@read("transformer of Lumina 2 alone in diffusers' names", "lumina2", ALONE)
def _(shelf):
    return shelf.write(weights(shelf.lumina2 / "transformer")), shelf.lumina2


@read("transformer of SANA alone in diffusers' names", "sana", ALONE)
def _(shelf):
    return shelf.write(weights(shelf.sana / "transformer")), shelf.sana


@read("transformer of Qwen-Image alone", "qwen_image", ALONE)
def _(shelf):
    return shelf.write(weights(shelf.qwen_image / "transformer")), shelf.qwen_image


@read("transformer of Krea 2 alone", "krea2", ALONE)
def _(shelf):
    return shelf.write(weights(shelf.krea2 / "transformer")), shelf.krea2


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


NO_MODEL = {
    "LoRA in diffusers' names": (
        only("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"),
        "holds a LoRA, not a model: give the model that it was trained on",
    ),
    "LoRA in kohya's names": (
        only("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"),
        "holds a LoRA, not a model",
    ),
    "LoRA in PEFT's or ComfyUI's names": (
        only("diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight"),
        "holds a LoRA, not a model",
    ),
    "LyCORIS (LoHa, LoKr)": (only("lora_unet_mid_block.hada_w1_a"), "holds a LoRA, not a model"),
    "VAE alone": (
        only(
            "first_stage_model.encoder.conv_in.weight",
            "first_stage_model.decoder.conv_in.weight",
            "first_stage_model.quant_conv.weight",
        ),
        "holds a VAE, not a model: give the model with its denoiser",
    ),
    "ControlNet": (
        only(
            "control_model.input_blocks.0.0.weight",
            "control_model.zero_convs.0.0.weight",
            "control_model.middle_block_out.0.bias",
        ),
        "holds a ControlNet or T2I-Adapter, not a model",
    ),
    "ControlNet in diffusers' names": (
        only("controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.conv1.weight", "conv_in.weight"),
        "holds a ControlNet or T2I-Adapter, not a model",
    ),
    "IP-Adapter": (
        only("image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight", "ip_adapter.1.to_v_ip.weight"),
        "holds an IP-Adapter, not a model: give the text-to-image model itself",
    ),
    "upscaler (ESRGAN)": (
        only("conv_first.weight", "body.0.rdb1.conv1.weight", "conv_last.weight"),
        "holds an upscaler: give a text-to-image model",
    ),
    "embedding (textual inversion)": (
        only("emb_params"),
        "holds an embedding (textual inversion), not a model: give the text-to-image model itself",
    ),
    "embedding of SDXL": (only("clip_l", "clip_g"), "holds an embedding (textual inversion), not a model"),
    "CLIP text encoder alone": (
        only("text_model.embeddings.token_embedding.weight", "text_model.final_layer_norm.weight", "text_model.x"),
        "holds a text encoder alone: give the model with its denoiser",
    ),
    "T5 alone": (
        only("shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight", "encoder.final_layer_norm.weight"),
        "holds a text encoder alone",
    ),
    "CLIP image encoder": (
        only("vision_model.encoder.layers.0.mlp.fc1.weight", "visual_projection.weight", "vision_model.x"),
        "holds an image encoder (CLIP): give a text-to-image model",
    ),
    "SDXL's refiner": (
        only("conditioner.embedders.0.model.ln_final.bias", UNET_PREFIX + "input_blocks.0.0.weight", "x"),
        "holds SDXL's refiner, which needs a picture",
    ),
    "fp8 weights with scales": (
        only(UNET_PREFIX + "input_blocks.0.0.weight", UNET_PREFIX + "out.2.scale_weight", "scaled_fp8"),
        "holds fp8 weights with scales, which diffusers does not apply: give the file in fp16 or bf16",
    ),
    "bitsandbytes' nf4 weights": (
        only(
            "double_blocks.0.img_attn.qkv.weight",
            "x",
            "double_blocks.0.img_attn.qkv.weight.quant_state.bitsandbytes__nf4",
        ),
        "holds bitsandbytes' 4-bit weights: give the file in fp16 or bf16 (--base-dtype nf4 stores them so)",
    ),
    "model of another architecture": (
        only("patch_embedding.weight", "blocks.0.self_attn.q.weight", "head.head.weight"),
        "give an SD, SDXL, SD3, FLUX, Chroma, FLUX.2, Z-Image, Krea 2, Lumina 2, SANA or Qwen-Image model",
    ),
}
BYTES = {
    "GGUF, also under the name .safetensors": (
        b"GGUF\x03\0\0\0" + bytes(64),
        "is a GGUF, whose quantised weights cannot be trained on: give the model in fp16 or bf16 (.safetensors)",
    ),
    "pickle under the name .safetensors": (
        b"PK\x03\x04" + bytes(64),
        "is a pickle or another archive, which could run code when it is loaded: give a .safetensors file",
    ),
    "old pickle (.ckpt, .pt, .bin)": (
        b"\x80\x02}q\0." + bytes(64),
        "is a pickle, which could run code when it is loaded: give a .safetensors file",
    ),
    "web page saved in place of the file": (
        b"<!DOCTYPE html><html><title>Access denied",
        "is a web page: download the file itself; gated models need hf auth login first",
    ),
    "error message saved in place of the file": (
        b'{"error": "Repository not found"}',
        "is text, not a .safetensors file: give one",
    ),
    "pointer of Git LFS": (
        b"version https://git-lfs.github.com/spec/v1\noid",
        "is a Git LFS pointer instead of the file: fetch the file with git lfs pull, or download it",
    ),
    "empty file": (b"", "is empty (0 bytes), damaged: copy or download it again"),
    "file cut off on the way": (struct.pack("<Q", 999) + b'{"a":', "copy or download it again"),
    "Windows' `:Zone.Identifier` note": (
        b"[ZoneTransfer]\r\nZoneId=3",
        "is Windows' note about a download: give the file beside it",
    ),
}


def _files(name: str, content: dict[str, torch.Tensor] | bytes, words: str) -> None:
    @refused(name, words)
    def _(shelf):
        return (shelf.bytes(content) if isinstance(content, bytes) else shelf.write(content)), shelf.sd


for _name, (_content, _words) in {**NO_MODEL, **BYTES}.items():
    _files(_name, _content, _words)


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


FORMATS = [case.format for case in CASES]


@pytest.fixture
def shelf(request, tmp_path):
    kinds = ("sd", "sdxl", "sd3", "flux", "z_image", "flux2_klein", "flux2_dev", "qwen_image", "krea2")
    folders = [request.getfixturevalue(f"tiny_{kind}_folder") for kind in (*kinds, "chroma", "lumina2", "sana")]
    return Shelf(*folders, tmp_path)


def _named(answer):
    return [pytest.param(case, id=case.format.name) for case in CASES if (case.format.answer == "refused") == answer]


@pytest.mark.parametrize("case", _named(True))
def test_refused_in_one_line(case, shelf):
    model, config = case.make(shelf)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load_pipeline(model, model_config=config)
    message = str(error.value)
    assert case.format.words in message
    assert "\n" not in message and (": " in message)


@pytest.mark.parametrize("case", _named(False))
def test_read(case, shelf, caplog):
    """Every weight equals that of the folder from which the file was made."""
    model, config = case.make(shelf)
    if config is not None and "alone" in case.format.name:  # the folder's own denoiser is not what is read
        config = shutil.copytree(config, shelf.here / "config", ignore=_without_denoiser)
    pipe = load_pipeline(model, model_config=config)
    notes = [record.getMessage() for record in caplog.records if record.name.startswith("alignprop_fast")]
    assert [bool(case.format.words) and case.format.words in note for note in notes] == [True] * bool(case.format.words)
    if not case.same_as:
        return
    expected = DiffusionPipeline.from_pretrained(getattr(shelf, case.same_as), local_files_only=True)
    for name, part in expected.components.items():
        if isinstance(part, torch.nn.Module):
            mine, theirs = pipe.components[name].state_dict(), part.state_dict()
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[key], theirs[key]) for key in mine), name


def _without_denoiser(folder, names):
    return [name for name in names if Path(folder).name in ("unet", "transformer") and name.endswith(".safetensors")]


@pytest.mark.parametrize("name", ["UNet alone", "LoRA"])
def test_the_command_ends_with_one_line(command, tiny_sd_folder, tmp_path, name):
    state = weights(tiny_sd_folder / "unet") if name == "UNet alone" else NO_MODEL["LoRA in kohya's names"][0]
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "prompts.txt").write_text("red cat\n")
    out = ("--output-dir", tmp_path / "out", "--device", "cpu")
    code, _, error = command(
        "sample", "--model", tmp_path / "model.safetensors", "--prompts", tmp_path / "prompts.txt", *out
    )
    assert code == 2 and len(error.strip().splitlines()) == 1 and error.startswith("alignprop-fast: ")
    assert not (tmp_path / "out").exists()
