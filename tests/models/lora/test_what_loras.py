"""LoRA files of every kind that is read: to the deltas of diffusers, PEFT or plain arithmetic."""

import re

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from alignprop_fast.models.lora.factors import Factors
from alignprop_fast.models.lora.file import DOWN, UP, lora_of, read_lora
from alignprop_fast.models.lora.kohya_file import to_kohya
from alignprop_fast.models.lora.load_save import load_lora
from alignprop_fast.models.lora.targets import denoiser
from alignprop_fast.models.published import layers, published_layers

from ...loadable import Format
from ..load import original_layout
from .lora_files import BLOCK, ENDS, KOHYA, PEFT, PLAIN, kohya_with, pair
from .test_what_loras_refused import REFUSED, SETTINGS

UNET = [f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_out.0", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"]
WIDE = [f"{BLOCK}.ff.net.0.proj", "down_blocks.0.resnets.0.conv1", "up_blocks.1.resnets.0.conv_shortcut"]
TEXT = [f"text_model.encoder.layers.1.{leaf}" for leaf in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1")]


FLUX = [
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.to_add_out",
    "single_transformer_blocks.1.proj_out",
]


Z_IMAGE = ["layers.0.attention.to_q", "noise_refiner.0.attention.to_out.0", "context_refiner.0.feed_forward.w2"]
SHARED = ["transformer_blocks.0.attn.add_q_proj", "single_transformer_blocks.0.attn.to_q"]


def factors(pipe, paths, rank=2):
    """{part.path: Factors}, alpha 3, ranks of two sizes, for layers of the denoiser or of the text encoder."""
    generator, made = torch.Generator().manual_seed(0), {}
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    shapes = {name: layers(denoiser(pipe)), "text_encoder": layers(pipe.text_encoder)}
    for i, path in enumerate(paths):
        part = "text_encoder" if path.startswith("text_model.") else name
        shape = shapes[part].get(path) or shapes[part][path.removeprefix("text_model.")]
        r = rank + i % 2
        down = torch.randn(r, *shape[1:], generator=generator)
        up = torch.randn(shape[0], r, *(1 for _ in shape[2:]), generator=generator)
        made[f"{part}.{path}"] = Factors(down, up, 3 / r)
    return made


def written(lora, path, name, down=DOWN, up=UP, alpha=".alpha"):
    """A file in which each module has the name that `name` makes of it; alpha None: in the factors."""
    tensors = {}
    for module, one in lora.items():
        tensors[name(module) + down] = one.down
        tensors[name(module) + up] = one.up if alpha else one.scaled_up()
        if alpha:
            tensors[name(module) + alpha] = torch.tensor(3.0)
    save_file(tensors, path)
    return path


def flat(module):
    part, _, path = module.partition(".")
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_", "transformer": "lora_transformer_"}[part]
    return prefix + path.replace(".", "_")


def processor(module):
    module = re.sub(r"(attn\d?)\.(to_\w)", r"\1.processor.\2", module.removesuffix(".0"))
    return re.sub(r"\.(\w)_proj$", r".to_\1", module).replace("out_proj", "to_out") + "_lora"


def attention_processors(pipe, path):
    return written(factors(pipe, UNET), path, processor, ".down.weight", ".up.weight", alpha=None)


def linear_layers(pipe, path):
    return written(
        factors(pipe, TEXT), path, lambda m: m + ".lora_linear_layer", ".down.weight", ".up.weight", alpha=None
    )


def older_diffusers(pipe, path):
    return written(factors(pipe, UNET), path, str, ".lora.down.weight", ".lora.up.weight", alpha=None)


def diffusers_names(pipe, path):
    return written(factors(pipe, UNET + WIDE + TEXT), path, str, alpha=None)


def saved_by_diffusers(pipe, path):
    """As in diffusers' training scripts: factors of UNet and text encoder, and their settings in the header."""
    parts = {}
    for part, targets in ((pipe.unet, ["to_q", "to_out.0", "conv1"]), (pipe.text_encoder, ["q_proj", "fc1"])):
        config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, use_rslora=True, alpha_pattern={targets[0]: 5})
        part.add_adapter(config)
        randomise(part)
        parts[part] = get_peft_model_state_dict(part), config.to_dict()
    (unet, unet_config), (text, text_config) = parts.values()
    configs = {"unet_lora_adapter_metadata": unet_config, "text_encoder_lora_adapter_metadata": text_config}
    type(pipe).save_lora_weights(path.parent, unet, text, weight_name=path.name, **configs)
    return path


def randomise(model):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def kohya(pipe, path):
    return written(factors(pipe, UNET + WIDE + TEXT), path, flat, ".lora_down.weight", ".lora_up.weight")


def lora_transformer(pipe, path):
    return written(factors(pipe, FLUX[:2]), path, flat, ".lora_down.weight", ".lora_up.weight")


def transformer_with_alpha(pipe, path):
    lora = factors(pipe, FLUX[:2])
    return written({**lora}, path, str)


def ai_toolkit(pipe, path):
    return written(
        factors(pipe, Z_IMAGE), path, lambda name: name.replace("transformer.", "diffusion_model."), alpha=None
    )


def ai_toolkit_flux2(pipe, path):
    """The names of the original release, its joined matrices included."""
    generator = torch.Generator().manual_seed(0)
    rows = {"double_blocks.0.img_attn.qkv": 96, "single_blocks.1.linear1": 288, "double_blocks.0.txt_mlp.0": 192}
    tensors = {}
    for name, count in rows.items():
        tensors[f"diffusion_model.{name}{DOWN}"] = torch.randn(2, 32, generator=generator)
        tensors[f"diffusion_model.{name}{UP}"] = torch.randn(count, 2, generator=generator)
    save_file(tensors, path)
    return path


def xlabs(pipe, path):
    whole = factors(pipe, [*FLUX, *SHARED])
    names = {
        "transformer_blocks.0.attn.to_q": ("double_blocks.0.processor.qkv_lora1", 3),
        "transformer_blocks.0.attn.to_add_out": ("double_blocks.0.processor.proj_lora2", 1),
        "transformer_blocks.0.attn.add_q_proj": ("double_blocks.0.processor.qkv_lora2", 3),
        "single_transformer_blocks.1.proj_out": ("single_blocks.1.processor.proj_lora", 1),
        "single_transformer_blocks.0.attn.to_q": ("single_blocks.0.processor.qkv_lora", 3),
    }
    tensors = {}
    for module, one in whole.items():
        name, times = names[module.removeprefix("transformer.")]
        tensors[f"{name}.down.weight"] = one.down
        tensors[f"{name}.up.weight"] = torch.cat([one.up * (i + 1) for i in range(times)])
    save_file(tensors, path)
    return path


READ_BY_DIFFUSERS = {
    Format("diffusers, UNet and text encoder, settings in the header", "read exactly"): ("sd", saved_by_diffusers),
    Format("diffusers, PEFT's names without settings", "read exactly"): ("sd", diffusers_names),
    Format("diffusers, older names of attention (`.lora.down.weight`)", "read exactly"): ("sd", older_diffusers),
    Format("diffusers, `attn_procs` (`.processor.to_q_lora.down.weight`)", "read exactly"): (
        "sd",
        attention_processors,
    ),
    Format("diffusers, text encoder with `lora_linear_layer`", "read exactly"): ("sd", linear_layers),
    Format("kohya's scripts, UNet in diffusers' names and text encoder", "read exactly"): ("sd", kohya),
    Format("FLUX, `lora_transformer_` (OneTrainer)", "read exactly"): ("flux", lora_transformer),
    Format("FLUX, diffusers' names with `.alpha`", "read exactly"): ("flux", transformer_with_alpha),
    Format("FLUX, XLabs' names", "read exactly"): ("flux", xlabs),
    Format("Z-Image, ai-toolkit's names (`diffusion_model.`)", "read exactly"): ("z_image", ai_toolkit),
    Format("FLUX.2, ai-toolkit's names (`diffusion_model.`)", "read exactly"): ("flux2_klein", ai_toolkit_flux2),
}


def deltas(pipe):
    """What each layer's weight is changed by, as PEFT computes it."""
    return {
        f"{part}.{with_prefix(path)}": layer.get_delta_weight(name).detach()
        for part, model in pipe.components.items()
        if isinstance(model, torch.nn.Module)
        for path, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
        for name in layer.lora_A
    }


def with_prefix(path):
    """One class of transformers 5 has no `text_model`."""
    return f"text_model.{path}" if path.startswith("encoder.") else path


def assert_same(found, expected):
    """Up to fp32 rounding of products of two or three terms of size one to ten."""
    assert found.keys() == expected.keys()
    for module, delta in expected.items():
        torch.testing.assert_close(found[module].reshape(delta.shape), delta, rtol=1e-5, atol=1e-5)
    assert all(delta.abs().max() > 0.1 for delta in expected.values())


def fresh(request, kind):
    folder = request.getfixturevalue(f"tiny_{kind}_folder")
    return DiffusionPipeline.from_pretrained(folder, local_files_only=True)


@pytest.mark.parametrize("row", READ_BY_DIFFUSERS, ids=lambda row: row.name)
def test_as_diffusers_reads_it(request, tmp_path, row):
    kind, write = READ_BY_DIFFUSERS[row]
    file = write(fresh(request, kind), tmp_path / "x.safetensors")
    theirs, ours = fresh(request, kind), fresh(request, kind)
    theirs.load_lora_weights(tmp_path, weight_name=file.name)
    load_lora(ours, file)
    assert_same(deltas(ours), deltas(theirs))
    assert_same({module: one.delta() for module, one in read_lora(file).items()}, deltas(theirs))


def peft_unet(pipe, folder):
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["to_q", "to_out.0", "conv1"]},
        **{"alpha_pattern": {"mid_block.*to_q": 5}, "rank_pattern": {"attn2.to_q": 3}},
    )
    return save_peft(pipe.unet, config, folder)


def peft_text(pipe, folder):
    return save_peft(pipe.text_encoder, LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "fc1"]), folder)


def peft_transformer(pipe, folder):
    return save_peft(pipe.transformer, LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "proj_mlp"]), folder)


def save_peft(model, config, folder):
    model = get_peft_model(model, config)
    randomise(model)
    model.save_pretrained(folder)
    return folder


READ_BY_PEFT = {
    Format("PEFT, folder of a UNet's adapters (`adapter_model.safetensors`)", "read exactly"): ("sd", peft_unet),
    Format("PEFT, folder of a text encoder's adapters", "read exactly"): ("sd", peft_text),
    Format("PEFT, folder of a FLUX transformer's adapters", "read exactly"): ("flux", peft_transformer),
}


@pytest.mark.parametrize("row", READ_BY_PEFT, ids=lambda row: row.name)
def test_as_peft_reads_it(request, tmp_path, row):
    kind, write = READ_BY_PEFT[row]
    folder, theirs, ours = write(fresh(request, kind), tmp_path / "x"), fresh(request, kind), fresh(request, kind)
    part = "text_encoder" if write is peft_text else "unet" if kind == "sd" else "transformer"
    setattr(theirs, part, PeftModel.from_pretrained(getattr(theirs, part), folder).base_model.model)
    load_lora(ours, folder)
    assert_same(deltas(ours), deltas(theirs))
    assert_same({module: one.delta() for module, one in read_lora(folder).items()}, deltas(theirs))
    assert len({tuple(delta.shape) for delta in deltas(ours).values()}) > 1


TITLES = {"sd": "SD", "sdxl": "SDXL", "sd3": "SD3 and SD3.5", "flux": "FLUX"}


TITLES |= {"z_image": "Z-Image", "flux2_klein": "FLUX.2", "qwen_image": "Qwen-Image"}


ORIGINAL = {
    **{
        Format(f"{title}, {writer}", "read exactly"): (kind, prefix)
        for kind, title in TITLES.items()
        for writer, prefix in {
            "ComfyUI's names (`diffusion_model.`)": "diffusion_model.",
            "kohya's": "lora_unet_",
        }.items()
    },
}


@pytest.mark.parametrize("row", ORIGINAL, ids=lambda row: row.name)
def test_every_layer_under_the_original_releases_names(request, tmp_path, row):
    """W += alpha / rank * up @ down on the weights in the original layout, which other tests check."""
    kind, prefix = ORIGINAL[row]
    is_flat = prefix.endswith("_")
    pipe = request.getfixturevalue(f"tiny_{kind}")
    model = denoiser(pipe)
    layout = {"sd": original_layout.unet, "sdxl": original_layout.unet}
    layout |= {"sd3": original_layout.mmdit, "flux": original_layout.flux, "z_image": original_layout.z_image}
    to_old = {**layout, "flux2_klein": original_layout.flux2, "qwen_image": dict}[kind]
    generator, tensors, expected = torch.Generator().manual_seed(0), {}, {}
    old = to_old(model.state_dict())
    for name, weight in old.items():
        if not name.endswith(".weight") or weight.dim() < 2:
            continue
        layer = name.removesuffix(".weight")
        layer = prefix + (layer.replace(".", "_") if is_flat else layer)
        down, up = ENDS if is_flat else (DOWN, UP)
        ones = [1 for _ in weight.shape[2:]]
        tensors[layer + down] = torch.randn(2, *weight.shape[1:], generator=generator)
        tensors[layer + up] = torch.randn(len(weight), 2, *ones, generator=generator)
        tensors[layer + ".alpha"] = torch.tensor([3.0], dtype=torch.bfloat16)
        expected[name] = 1.5 * torch.einsum("or,r...->o...", tensors[layer + up].flatten(1), tensors[layer + down])
    save_file(tensors, tmp_path / "x.safetensors")
    zeros = {name: torch.zeros_like(weight) for name, weight in model.state_dict().items()}
    load_lora(pipe, tmp_path / "x.safetensors")
    prefix = "unet." if "sd" in kind and kind != "sd3" else "transformer."
    changes = {module.removeprefix(prefix) + ".weight": delta for module, delta in deltas(pipe).items()}
    assert set(changes) == {f"{path}.weight" for path in layers(model)}
    found = to_old({**zeros, **changes})
    for name, delta in expected.items():
        torch.testing.assert_close(found[name], delta, rtol=1e-5, atol=1e-5)


PUBLISHED = {
    "unet": ("sd15", "sdxl"),
    "transformer": ("sd35-medium", "sd35-large", "flux-dev", "flux2-klein-9b", "z-image"),
    "text_encoder": ("clip-l", "clip-g"),
}


@pytest.mark.parametrize(("part", "network"), [(part, one) for part, those in PUBLISHED.items() for one in those])
def test_our_kohya_file_of_every_layer_reads_back(part, network):
    generator, lora = torch.Generator().manual_seed(0), {}
    for path, shape in published_layers(network).items():
        down = torch.randn(1, *shape[1:], generator=generator)
        up = torch.randn(shape[0], 1, *(1 for _ in shape[2:]), generator=generator)
        lora[f"{part}.{path}"] = Factors(down, up, 1.5)
    back = lora_of(to_kohya(lora), "file")
    assert back.keys() == lora.keys()
    for module, one in lora.items():
        assert torch.equal(back[module].down, one.down) and torch.equal(back[module].scaled_up(), one.scaled_up())


# Formats that are read, and the value of every element in the delta of their only layer.
NUMBERS = {
    Format("a LoRA without alpha: the scale is 1", "read exactly"): (kohya_with(), 2),
    Format("alpha of shape [1], in bf16", "read exactly"): (kohya_with(alpha=torch.ones(1, dtype=torch.bfloat16)), 1),
    Format("a negative alpha", "read exactly"): (kohya_with(alpha=torch.tensor(-4.0)), -4),
    Format("alpha 0", "read with a note", "alpha 0 for some layers"): (kohya_with(alpha=torch.tensor(0.0)), 0),
    Format("factors in fp8", "read exactly"): (pair(KOHYA, *ENDS, dtype=torch.float8_e4m3fn), 2),
    Format("differences of biases (`.diff_b`) that are zero", "read exactly"): (kohya_with(diff_b=torch.zeros(64)), 2),
    Format(
        "PEFT's state with the adapter's name (`.lora_A.default.weight`)", "read with a note", "to equal the rank"
    ): (
        pair(PEFT, ".lora_A.default.weight", ".lora_B.default.weight"),
        2,
    ),
    Format("names without the part of the pipeline", "read exactly"): (
        pair(f"{BLOCK}.attn1.processor.to_q_lora", ".down.weight", ".up.weight"),
        2,
    ),
    Format("bare factors (`.lora_A`, `.lora_B`)", "read exactly"): (pair(PLAIN, ".lora_A", ".lora_B"), 2),
}


@pytest.mark.parametrize("row", NUMBERS, ids=lambda row: row.name)
def test_numbers(tiny_sd, tmp_path, caplog, row):
    content, number = NUMBERS[row]
    save_file(content, tmp_path / "x.safetensors")
    load_lora(tiny_sd, tmp_path / "x.safetensors")
    expected = {PLAIN: torch.full((64, 64), float(number))}
    assert {module: one.delta() for module, one in read_lora(tmp_path / "x.safetensors").items()}.keys() == {PLAIN}
    for found in (deltas(tiny_sd), {m: one.delta() for m, one in read_lora(tmp_path / "x.safetensors").items()}):
        assert torch.equal(found[PLAIN], expected[PLAIN])
    notes = [record.message for record in caplog.records if record.name.startswith("alignprop_fast")]
    assert any(row.words in note for note in notes) if row.words else not notes


def test_text_encoders_of_every_prefix(tiny_sd3, tmp_path):
    """Adapters that diffusers cannot load are refused with a pipeline, and kept in files without one."""
    clip = "text_model.encoder.layers.0.mlp.fc1"
    names = {
        **{f"lora_te{i}_{clip.replace('.', '_')}": f"text_encoder{end}.{clip}" for i, end in ((1, ""), (2, "_2"))},
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q": "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q",
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.1.DenseReluDense.wo": (
            "text_encoder_3.encoder.block.0.layer.1.DenseReluDense.wo"
        ),
        "lora_te2_text_projection": "text_encoder_2.text_projection",
        "lora_unet_joint_blocks_0_x_block_attn_proj": "transformer.transformer_blocks.0.attn.to_out.0",
    }
    lora = lora_of({key: one for name in names for key, one in pair(name).items()}, "file")
    assert set(lora) == set(names.values())
    assert lora_of(to_kohya(lora), "file").keys() == lora.keys()
    name = next(name for name in names if "te3" in name)
    save_file({f"{name}{DOWN}": torch.ones(1, 32), f"{name}{UP}": torch.ones(32, 1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"diffusers loads no adapters for text_encoder_3\.encoder"):
        load_lora(tiny_sd3, tmp_path / "x.safetensors")


FORMATS = [*SETTINGS, *READ_BY_DIFFUSERS, *READ_BY_PEFT, *ORIGINAL, *NUMBERS, *REFUSED]


def test_rows_are_told_apart():
    assert len({row.name for row in FORMATS}) == len(FORMATS)
