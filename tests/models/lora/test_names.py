"""Names in LoRA files are looked up among the layers; each means one layer, in every spelling."""

from pathlib import Path

import pytest

from alignprop_fast.models.lora import names
from alignprop_fast.models.lora.names import find_modules, names_of, published_names
from alignprop_fast.models.published import published_layers

from ..load import original_layout


@pytest.mark.parametrize(("network", "levels"), [("sd15", 4), ("sdxl", 3)])
def test_every_layer_of_a_published_unet_in_three_spellings(network, levels):
    paths = list(published_layers(network))
    known, old = published_names("unet"), original_layout.unet({f"{path}.weight": path for path in paths}, levels, 2)
    spellings = {
        **{f"lora_unet_{path.replace('.', '_')}": path for path in paths},
        **{f"base_model.model.{path}": path for path in paths},
        **{f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}": path for name, path in old.items()},
    }
    assert len(spellings) == 3 * len(paths)  # all are different
    assert all(known.modules(name) == (f"unet.{path}",) for name, path in spellings.items())


@pytest.mark.parametrize(
    "name",
    [
        "module.unet.conv_in",
        "base_model.model._orig_mod.conv_in",
        "unet._orig_mod.conv_in",
        "conv_in",
        "diffusion_model.input_blocks.0.0",
        "model.diffusion_model.conv_in",
    ],
)
def test_prefixes_of_wrapped_models(tiny_sd, name):
    assert published_names("unet").modules(name) == names_of(tiny_sd).modules(name) == ("unet.conv_in",)


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_conv_inn",
        "lora_unet_mid_block",
        "lora_unet_input_blocks_3_0_in_layers_2",  # where there is a downsampler
        "lora_unet_output_blocks_1_1_conv",  # where there is none
        "lora_unet_input_blocks_1_5_in_layers_2",
        "lora_unet_input_blocks_3_1_op",
        "lora_unet_middle_block_3_in_layers_2",
        "lora_unet_middle_block_0_1_in_layers_2",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_ff_net_1",
        "lora_te1_mid_block_attentions_0_proj_in",
        "text_encoder.conv_in",
        "lora_unet_double_blocks_0_img_mlp_1",
        "lora_unet_",
        "",
    ],
)
def test_names_of_no_layer(name):
    assert all(published_names(family).modules(name) == () for family in ("unet", "sd3", "flux"))


def test_all_unknown_names_are_listed_in_order_the_first_four():
    names = [f"lora_unet_x{i}" for i in range(6, 0, -1)]
    with pytest.raises(ValueError, match="x1, lora_unet_x2, lora_unet_x3, lora_unet_x4 and 2 more, no name"):
        find_modules(square("lora_unet_conv_in", *names), "file")


def square(*names):
    return dict.fromkeys(names, (8, 8))


def test_a_pipeline_has_its_own_layers_alone(tiny_sd, tiny_sdxl):
    name = "lora_unet_add_embedding_linear_2"
    assert find_modules(square(name), "file", tiny_sdxl) == {name: ("unet.add_embedding.linear_2",)}
    with pytest.raises(ValueError, match=f"do not fit this model, which has no layer {name}: load"):
        find_modules(square(name), "file", tiny_sd)


def test_a_pipeline_is_searched_once_for_a_whole_file(tiny_sd, monkeypatch):
    """For each of SDXL's 700 modules it would take 11 s."""
    searched = []
    monkeypatch.setattr(names, "names_of", lambda pipe: searched.append(pipe) or names_of(pipe))
    found = names.find_modules({"unet.conv_in": (32, 4, 3, 3), "lora_unet_conv_out": (4, 32, 3, 3)}, Path("f"), tiny_sd)
    assert list(found.values()) == [("unet.conv_in",), ("unet.conv_out",)] and searched == [tiny_sd]


def test_t5_alone_is_of_two_models(tiny_sd3, tiny_flux):
    name = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    with pytest.raises(ValueError, match=f"has {name}, the name of different layers in several models: load it toge"):
        find_modules(square(name), "file")
    path = "encoder.block.0.layer.0.SelfAttention.q"
    for pipe, part, other in (
        (tiny_sd3, "text_encoder_3", "lora_unet_joint_blocks_0_x_block_attn_proj"),
        (tiny_flux, "text_encoder_2", "lora_unet_single_blocks_0_linear2"),
    ):
        assert find_modules(square(name), "file", pipe)[name] == (f"{part}.{path}",)
        assert find_modules(square(name, other), "file")[name] == (f"{part}.{path}",)


@pytest.mark.parametrize("width", [8, 3072])
@pytest.mark.parametrize(
    ("name", "flux", "flux2"),
    [
        ("single_blocks_0_linear1", (7, 1), (9, 1)),
        ("single_blocks_0_linear2", (1, 5), (1, 4)),
        ("double_blocks_0_img_mlp_0", (4, 1), (6, 1)),
        ("double_blocks_0_txt_mlp_2", (1, 4), (1, 3)),
    ],
)
def test_proportions_tell_flux_2_from_flux_1(name, flux, flux2, width):
    """At every width, though FLUX.1-dev and FLUX.2-klein-4B have the same; attention is the same layer in both."""
    attention = {"lora_unet_double_blocks_0_img_attn_proj": (width, width)}
    for family, (rows, columns) in (("flux", flux), ("flux2", flux2)):
        places = {f"lora_unet_{name}": (rows * width, columns * width), **attention}
        expected = {one: published_names(family).modules(one) for one in places}
        assert all(expected.values()) and find_modules(places, "file") == expected
