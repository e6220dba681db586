"""LoRA files of every kind that is refused, in one line."""

import json

import pytest
import torch
from safetensors.torch import save_file

from alignprop_fast.models.lora.file import DOWN, METADATA_KEY, UP, WEIGHTS_NAME, lora_of, read_lora
from alignprop_fast.models.lora.load_save import load_lora

from ...loadable import Format
from .lora_files import ENDS, KOHYA, MIDDLE, PEFT, PLAIN, kohya_with, pair

ONE = torch.ones(1)
FORM = "whose deltas have another form: give plain LoRA files"
MODEL = "and no LoRA factor in diffusers', kohya's, PEFT's or ComfyUI's naming: if it is a model"


REFUSED = {
    Format("DoRA (`dora_scale`)", "refused", f"is a DoRA, {FORM}"): kohya_with(dora_scale=ONE),
    Format("DoRA (`lora_magnitude_vector`)", "refused", f"is a DoRA, {FORM}"): {
        **pair(PLAIN),
        f"{PLAIN}.lora_magnitude_vector": ONE,
    },
    Format("LoHa", "refused", f"is a LoHa, {FORM}"): {f"{KOHYA}.hada_w1_a": ONE},
    Format("LoKr", "refused", f"is a LoKr, {FORM}"): {f"{KOHYA}.lokr_w1": ONE},
    Format("LoCon with Tucker factors", "refused", "is a LoCon with Tucker factors"): kohya_with(
        **{"lora_mid.weight": ONE}
    ),
    Format("OFT", "refused", f"is an OFT, {FORM}"): {f"{KOHYA}.oft_blocks": ONE},
    Format("BOFT", "refused", f"is an OFT, {FORM}"): {f"{PEFT}.boft_R": ONE},
    Format("GLoRA", "refused", f"is a GLoRA, {FORM}"): {f"{KOHYA}.{one}.weight": ONE.clone() for one in ("a1", "b1")},
    Format("IA3 of LyCORIS", "refused", f"is an IA3, {FORM}"): {f"{KOHYA}.on_input": ONE},
    Format("IA3 of PEFT", "refused", f"is an IA3, {FORM}"): {f"{PEFT}.ia3_l": ONE},
    Format("VeRA", "refused", f"is a VeRA, {FORM}"): {f"{PEFT}.vera_lambda_b": ONE},
    Format("AdaLoRA", "refused", ".lora_E, which names no LoRA factor"): {
        **pair(PEFT, ".lora_A", ".lora_B"),
        f"{PEFT}.lora_E": ONE,
    },
    Format("a LoRA with biases (`lora_bias=True`)", "refused", ".lora_B.bias, which names no LoRA factor"): {
        **pair(PLAIN),
        f"{PLAIN}.lora_B.bias": ONE,
    },
    Format("a LoRA with differences of biases or norms", "refused", ".diff_b, which names no LoRA factor"): kohya_with(
        diff_b=ONE
    ),
    Format("whole differences of weights (`.diff`)", "refused", "holds whole differences"): {f"{KOHYA}.diff": ONE},
    Format("a control LoRA of FLUX", "refused", "is a control LoRA"): {
        "double_blocks.0.img_attn.norm.query_norm.scale": ONE
    },
    Format("a LoRA with learned words (`bundle_emb`)", "refused", "is a LoRA with learned words"): {
        "bundle_emb.cat.string_to_param.*": ONE
    },
    Format("a textual inversion", "refused", "is a textual inversion (a learned word)"): {"emb_params": ONE},
    Format("a textual inversion of SDXL", "refused", "is a textual inversion (a learned word)"): {
        "clip_l": ONE,
        "clip_g": ONE.clone(),
    },
    Format("a textual inversion of diffusers", "refused", "is a textual inversion (a learned word)"): {"<cat>": ONE},
    Format("a whole model in one file", "refused", MODEL): {"model.diffusion_model.input_blocks.0.0.weight": ONE},
    Format("a UNet or transformer in place of a LoRA", "refused", MODEL): {"conv_in.weight": ONE},
    Format("two adapters in one file", "refused", "for one layer: give a file of one adapter"): {
        **pair(PEFT, ".lora_A.one.weight", ".lora_B.one.weight"),
        **pair(PEFT, ".lora_A.two.weight", ".lora_B.two.weight"),
    },
    Format("two names for one layer", "refused", f"has both {KOHYA!r} and {MIDDLE!r} for {PLAIN}"): {
        **kohya_with(),
        **pair(MIDDLE, *ENDS),
    },
    Format("a name of no layer", "refused", "has lora_unet_mid_block_attn_q, no name of kohya's"): pair(
        "lora_unet_mid_block_attn_q", *ENDS
    ),
    Format("alpha that is no number", "refused", "is not a finite number"): kohya_with(alpha=torch.tensor(torch.nan)),
    Format("alpha of several numbers", "refused", "is not a finite number"): kohya_with(alpha=torch.ones(2)),
    Format("alpha of a layer without factors", "refused", "x.alpha, which names no LoRA factor"): {
        **kohya_with(),
        "x.alpha": ONE,
    },
    Format("a layer with one factor", "refused", "the LoRA factor up is missing"): {
        f"{KOHYA}.lora_down.weight": torch.ones(2, 64)
    },
    Format(
        "a pickle (.bin, .pt, .ckpt)", "refused", "which could run code when it is loaded: give a .safetensors file"
    ): None,
    Format("a GGUF file", "refused", "is a GGUF"): b"GGUF\x03\x00\x00\x00" + bytes(64),
    Format("the pointer of a file that git lfs has not fetched", "refused", "fetch the file with git lfs pull"): (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    ),
    Format("a web page saved in place of the file", "refused", "is a web page"): b"<html>not found</html>",
    Format("an empty file", "refused", "is empty (0 bytes), damaged"): b"",
}


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row.name)
def test_refused_in_one_line(tmp_path, row):
    file, content = tmp_path / "x.safetensors", REFUSED[row]
    if content is None:
        torch.save(kohya_with(), file)
    elif isinstance(content, bytes):
        file.write_bytes(content)
    else:
        save_file(content, file)
    with pytest.raises(ValueError) as caught:
        read_lora(file)
    assert row.words in str(caught.value) and str(caught.value).startswith((str(file), "the ", f"{file} "))
    assert "\n" not in str(caught.value)


SETTINGS = {
    Format(
        "PiSSA, OLoRA, CorDA, LoftQ (`init_lora_weights`)",
        "refused",
        "='pissa', which changed the base model: save it again",
    ): {"init_lora_weights": "pissa"},
    Format("DoRA (`use_dora` in the settings)", "refused", f"is a DoRA, {FORM}"): {"use_dora": True},
    Format("another kind of PEFT's (`peft_type` in the settings)", "refused", f"is a ADALORA, {FORM}"): {
        "peft_type": "ADALORA"
    },
}


@pytest.mark.parametrize("beside", [True, False], ids=["adapter_config.json", "header"])
@pytest.mark.parametrize("row", SETTINGS, ids=lambda row: row.name)
def test_refused_by_the_settings(tmp_path, row, beside):
    settings = SETTINGS[row]
    if beside:
        save_file(pair(PEFT), tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    else:
        header = json.dumps({f"unet.{key}": value for key, value in settings.items()})
        save_file(pair(PLAIN), tmp_path / WEIGHTS_NAME, {METADATA_KEY: header})
    with pytest.raises(ValueError) as caught:
        read_lora(tmp_path)
    assert row.words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("prefix", "shape", "name", "beyond"),
    [
        ("lora_unet_", (1280, 1280, 3, 3), "mid_block_resnets_{}_conv1", 7),
        ("lora_transformer_", (3072, 3072), "transformer_blocks_{}_attn_to_q", 99),
        ("lora_unet_", (9216, 3072), "double_blocks_{}_img_attn_qkv", 19),
        ("lora_te1_", (3072, 768), "text_model_encoder_layers_{}_mlp_fc1", 12),
    ],
)
@pytest.mark.parametrize("is_published", [True, False])
def test_a_block_that_the_published_model_lacks(prefix, shape, name, beyond, is_published):
    """The shapes tell which model a file is for; a file without published shapes may have any number of blocks."""
    rows, width, *kernel = shape if is_published else (3 * 40, 40, *shape[2:])
    tensors = {}
    for i in (0, 1, beyond):
        tensors[f"{prefix}{name.format(i)}.lora_down.weight"] = torch.ones(1, width, *kernel)
        tensors[f"{prefix}{name.format(i)}.lora_up.weight"] = torch.ones(rows, 1, *(1 for _ in kernel))
    if is_published:
        with pytest.raises(ValueError, match=f"has {prefix}{name.format(beyond)}, no name of kohya's"):
            lora_of(tensors, "file")
    else:
        assert len(lora_of(tensors, "file")) in (3, 9)


def test_diffusers_does_not_widen_flux_for_a_file(tiny_flux, tmp_path):
    """As for FLUX's control LoRAs, whose first layer also takes a picture."""
    before = tiny_flux.transformer.x_embedder.weight.shape
    wide = {f"transformer.x_embedder{DOWN}": torch.ones(2, 128), f"transformer.x_embedder{UP}": torch.ones(32, 2)}
    save_file(wide, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"do not fit this model, which has transformer\.x_embedder in another shape"):
        load_lora(tiny_flux, tmp_path / "x.safetensors")
    assert tiny_flux.transformer.x_embedder.weight.shape == before
