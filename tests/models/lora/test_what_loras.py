"""LoRA files of every kind that is read: to the deltas of diffusers, PEFT or plain arithmetic."""

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import PeftModel
from peft.tuners.lora import LoraLayer
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
from .lora_writers import READ_BY_DIFFUSERS, READ_BY_PEFT, peft_text
from .test_what_loras_refused import REFUSED, SETTINGS


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
