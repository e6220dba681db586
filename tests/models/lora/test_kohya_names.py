"""Adapters in kohya's naming have the same effect on weights in the original layout, and through every reader."""

import re

import pytest
import torch
from diffusers import FluxPipeline
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from alignprop_fast.making.random_weights import make_folder
from alignprop_fast.models.lora.adapters import add_lora
from alignprop_fast.models.lora.factors import Factors
from alignprop_fast.models.lora.file import DOWN, UP, lora_content, lora_of, read_lora
from alignprop_fast.models.lora.kohya_file import save_kohya_lora, to_kohya
from alignprop_fast.models.lora.load_save import load_lora
from alignprop_fast.models.lora.names import family_of
from alignprop_fast.models.lora.targets import denoiser
from alignprop_fast.models.published import layers, published_layers

from ...adapters import draw_factors, factors_of
from ..load import original_layout

WIDTH = 3072  # of FLUX, at which alone diffusers converts its files
FLUX_ATTENTION = {
    **{f"transformer_blocks.{i}.attn.{part}": (WIDTH, WIDTH) for i in (0, 18) for part in ("to_q", "to_k", "to_v")},
    "transformer_blocks.0.attn.to_out.0": (WIDTH, WIDTH),
    **{f"transformer_blocks.18.attn.add_{part}_proj": (WIDTH, WIDTH) for part in "qkv"},
    "transformer_blocks.18.attn.to_add_out": (WIDTH, WIDTH),
    **{f"single_transformer_blocks.37.attn.{part}": (WIDTH, WIDTH) for part in ("to_q", "to_k", "to_v")},
}
FLUX_FEED_FORWARD = {
    "transformer_blocks.0.ff.net.0.proj": (WIDTH, 4 * WIDTH),
    "transformer_blocks.0.ff_context.net.2": (4 * WIDTH, WIDTH),
    "single_transformer_blocks.37.proj_mlp": (WIDTH, 4 * WIDTH),
    "single_transformer_blocks.37.proj_out": (5 * WIDTH, WIDTH),
    "single_transformer_blocks.0.norm.linear": (WIDTH, 3 * WIDTH),
    "transformer_blocks.0.norm1_context.linear": (WIDTH, 6 * WIDTH),
    "time_text_embed.text_embedder.linear_2": (WIDTH, WIDTH),
}  # Of FLUX's last layer diffusers 0.42 passes over alpha.


def made(shapes, rank=2, scale=1.5, part="transformer"):
    generator = torch.Generator().manual_seed(0)
    return {
        f"{part}.{name}": Factors(
            torch.randn(rank + i % 2, width, generator=generator),
            torch.randn(rows, rank + i % 2, generator=generator),
            scale,
        )
        for i, (name, (width, rows)) in enumerate(shapes.items())
    }


def assert_same_deltas(state, lora):
    """A state dict in PEFT's names has these deltas up to fp32 rounding; further modules must be zero."""
    modules = {key.removesuffix(DOWN) for key in state if key.endswith(DOWN)}
    assert modules >= set(lora)
    for module in modules:
        found = state[module + UP] @ state[module + DOWN]
        expected = lora[module].delta() if module in lora else torch.zeros(())
        assert (found - expected).abs().max() <= 1e-6 * max(1.0, expected.abs().max()), module


@pytest.mark.slow("builds FLUX at full width")
@pytest.mark.parametrize("shapes", [FLUX_ATTENTION, {**FLUX_ATTENTION, **FLUX_FEED_FORWARD}], ids=["attention", "all"])
def test_diffusers_reads_flux(shapes):
    lora = made(shapes)
    assert_same_deltas(_of_blocks(FluxPipeline.lora_state_dict(to_kohya(lora)), lora), lora)


def _of_blocks(state, lora):
    """diffusers drops the prefix of modules outside the blocks."""
    modules = {module.removeprefix("transformer."): module for module in lora}
    return {_with_prefix(key, modules): tensor for key, tensor in state.items()}


def _with_prefix(key, modules):
    module, lora, rest = key.partition(".lora_")
    return modules.get(module, module) + lora + rest


def test_a_foreign_flux_file_whose_parts_share_their_factors():
    """As kohya's scripts train it, one pair for q, k and v together."""
    generator, names = torch.Generator().manual_seed(0), {}
    for name, rows in (("double_blocks_3_img_attn_qkv", 3 * WIDTH), ("single_blocks_5_linear1", 7 * WIDTH)):
        names[f"lora_unet_{name}.lora_down.weight"] = torch.randn(4, WIDTH, generator=generator)
        names[f"lora_unet_{name}.lora_up.weight"] = torch.randn(rows, 4, generator=generator)
        names[f"lora_unet_{name}.alpha"] = torch.tensor(2.0)
    lora = lora_of(names, "file")
    assert len(lora) == 7 and {factors.rank for factors in lora.values()} == {4}
    assert_same_deltas(FluxPipeline.lora_state_dict(dict(names)), lora)


SD3 = {
    **{f"transformer_blocks.1.{attn}.{part}": (32, 32) for attn in ("attn", "attn2") for part in ("to_q", "to_v")},
    "transformer_blocks.1.attn2.to_out.0": (32, 32),
    "transformer_blocks.2.attn.add_k_proj": (32, 32),
    "transformer_blocks.1.attn.to_add_out": (32, 32),
    "transformer_blocks.1.ff_context.net.0.proj": (32, 128),
    "transformer_blocks.1.ff.net.2": (128, 32),
    "transformer_blocks.1.norm1.linear": (32, 9 * 32),
    "transformer_blocks.1.norm1_context.linear": (32, 6 * 32),
    "transformer_blocks.2.norm1_context.linear": (32, 2 * 32),
    "context_embedder": (32, 32),
    "time_text_embed.text_embedder.linear_1": (64, 32),
    "norm_out.linear": (32, 2 * 32),
    "proj_out": (32, 64),
}
FLUX = {
    "transformer_blocks.0.attn.to_k": (32, 32),
    **{f"transformer_blocks.0.attn.add_{part}_proj": (32, 32) for part in "qv"},
    "transformer_blocks.0.attn.to_out.0": (32, 32),
    "transformer_blocks.0.norm1.linear": (32, 6 * 32),
    "single_transformer_blocks.0.attn.to_q": (32, 32),
    "single_transformer_blocks.1.attn.to_v": (32, 32),
    "single_transformer_blocks.1.proj_mlp": (32, 4 * 32),
    "single_transformer_blocks.1.proj_out": (5 * 32, 32),
    "x_embedder": (64, 32),
    "norm_out.linear": (32, 2 * 32),
}


@pytest.mark.parametrize(("kind", "shapes"), [("sd3", SD3), ("flux", FLUX)])
def test_the_effect_on_weights_in_the_original_layout(request, kind, shapes):
    """As ComfyUI, Forge and kohya's scripts do: W += alpha / rank * up @ down at the original's names."""
    pipe, layout = request.getfixturevalue(f"tiny_{kind}"), {"sd3": original_layout.mmdit, "flux": original_layout.flux}
    lora = made(shapes)
    before = pipe.transformer.state_dict()
    after = {
        name: tensor + lora[f"transformer.{name.removesuffix('.weight')}"].delta()
        if f"transformer.{name.removesuffix('.weight')}" in lora
        else tensor
        for name, tensor in before.items()
    }
    original, expected = layout[kind](before), layout[kind](after)
    tensors, places = to_kohya(lora), {name.removesuffix(".weight").replace(".", "_"): name for name in original}
    names = {name.partition(".")[0] for name in tensors}
    for name in names:
        down, up, alpha = (tensors[f"{name}.{end}"] for end in ("lora_down.weight", "lora_up.weight", "alpha"))
        place = places[name.removeprefix("lora_unet_")]
        original[place] = original[place] + alpha / len(down) * (up @ down)
    assert all((original[name] - tensor).abs().max() <= 1e-5 for name, tensor in expected.items())
    assert sum(not torch.equal(tensor, layout[kind](before)[name]) for name, tensor in expected.items()) == len(names)


@pytest.mark.parametrize("shapes", [SD3, FLUX, FLUX_ATTENTION])
def test_there_and_back_are_the_same_factors(shapes):
    lora = made(shapes)
    assert family_of(lora) == ("sd3" if shapes is SD3 else "flux")
    back = lora_of(to_kohya(lora), "file")
    assert back.keys() == lora.keys()
    for module, factors in lora.items():
        assert back[module].scale == factors.scale
        assert torch.equal(back[module].down, factors.down) and torch.equal(back[module].up, factors.up)


@pytest.mark.parametrize("network", ["flux-dev", "sd35-medium", "sd35-large"])
@pytest.mark.parametrize("layer", ["attn.to_q", "attn.add_q_proj", "ff.net.2", "norm1_context.linear"])
def test_flux_without_single_stream_blocks_is_known_by_its_shapes(network, layer):
    module = f"transformer_blocks.1.{layer}"
    rows, width = published_layers(network)[module]
    lora = made({module: (width, rows)})
    blocks = "double_blocks" if network == "flux-dev" else "joint_blocks"
    assert all(name.startswith(f"lora_unet_{blocks}_1_") for name in to_kohya(lora))


@pytest.mark.parametrize("layer", ["attn.to_q", "attn.add_q_proj", "ff.net.2"])
@pytest.mark.parametrize(("kind", "blocks"), [("flux", "double_blocks"), ("sd3", "joint_blocks")])
def test_a_pipeline_says_whose_its_adapters_are(request, tmp_path, kind, blocks, layer):
    """With a width that no published model has, and layers that both models have."""
    pipe = request.getfixturevalue(f"tiny_{kind}")
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=rf"transformer_blocks\.\d+\.{re.escape(layer)}"))
    draw_factors(factors_of(pipe.transformer))
    file = save_kohya_lora(pipe, tmp_path)
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata()["ss_network_module"] == f"networks.lora_{kind}"
        assert all(key.startswith(f"lora_unet_{blocks}_") for key in opened.keys())  # noqa: SIM118
    other = type(pipe).from_pretrained(request.getfixturevalue(f"tiny_{kind}_folder"), local_files_only=True)
    load_lora(other, file)
    torch.testing.assert_close(drawn(other), drawn(pipe), rtol=0, atol=1e-5)


def test_parts_of_different_scales():
    lora = made({"transformer_blocks.1.attn.to_q": (8, 8), "transformer_blocks.1.attn.to_k": (8, 8)}, scale=0.5)
    lora["transformer.transformer_blocks.1.attn.to_k"] = Factors(torch.ones(2, 8), torch.ones(8, 2), 3.0)
    back = lora_of(to_kohya(lora), "file")
    for module, factors in lora.items():
        torch.testing.assert_close(back[module].delta(), factors.delta(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shapes", [SD3, FLUX_ATTENTION])
def test_joined_matrices_stay_on_the_device_of_their_parts(shapes):
    """A GPU's adapters: the zeros of a part without adapter must not lie on the CPU, nor widen the others to fp32."""
    far = ("meta", torch.bfloat16)
    lora = {name: Factors(f.down.to(*far), f.up.to(*far), f.scale) for name, f in made(shapes).items()}
    factors = [tensor for name, tensor in to_kohya(lora).items() if not name.endswith(".alpha")]
    assert all(tensor.is_meta and tensor.dtype is torch.bfloat16 for tensor in factors)


def test_adapters_that_have_not_learned_yet_keep_their_places():
    zeros = {name: Factors(f.down, torch.zeros_like(f.up), f.scale) for name, f in made(SD3).items()}
    back = lora_of(to_kohya(zeros), "file")
    assert back.keys() >= zeros.keys() and not any(factors.up.any() for factors in back.values())


def drawn(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator, size = torch.Generator().manual_seed(1), {"height": 16, "width": 16}
    return pipe(prompt="red cat", num_inference_steps=2, generator=generator, output_type="pt", **size).images


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        *((kind, targets) for kind in ("sd", "sdxl", "sd3", "flux") for targets in ("attention", "all")),
        ("z_image", "all"),
        ("flux2_klein", "all"),
    ],
)
def test_the_file_that_training_writes_loads_here(request, tmp_path, kind, targets):
    pipe = request.getfixturevalue(f"tiny_{kind}")
    untrained = drawn(pipe)
    draw_factors(add_lora(pipe, 3, 12, targets))
    file = save_kohya_lora(pipe, tmp_path)
    other = type(pipe).from_pretrained(request.getfixturevalue(f"tiny_{kind}_folder"), local_files_only=True)
    load_lora(other, file)
    assert (drawn(pipe) - untrained).abs().max() > 1e-2
    torch.testing.assert_close(drawn(other), drawn(pipe), rtol=0, atol=1e-5)
    mine, theirs = ({n for n, _ in denoiser(one).named_parameters() if ".lora_A." in n} for one in (pipe, other))
    assert {name.replace(".default_0.", ".default.") for name in theirs} == mine
    with pytest.raises(ValueError, match="kohya's naming, but the denoiser already has adapters"):
        load_lora(other, file)


def test_a_file_in_sgm_names(tmp_path):
    """As kohya's scripts write SDXL; blocks of two layers, as SDXL's are."""
    from diffusers import StableDiffusionXLPipeline

    folder = make_folder("sdxl", tmp_path / "sdxl", layers_per_block=2)
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)
    draw_factors(add_lora(pipe, 2, 3, "attention+ff"))
    blocks = {n.replace(".", "_"): o.replace(".", "_") for n, o in original_layout.unet_blocks(2, 2).items()}
    tensors = {}
    for key, tensor in load_file(save_kohya_lora(pipe, tmp_path)).items():
        name = next(name for name in blocks if key.startswith(f"lora_unet_{name}_"))
        tensors[key.replace(name, blocks[name], 1)] = tensor
    assert any(re.match("lora_unet_output_blocks_5_1_transformer_blocks_0_ff_net_0_proj", key) for key in tensors)
    save_file(tensors, tmp_path / "sgm.safetensors")
    other = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)
    load_lora(other, tmp_path / "sgm.safetensors")
    torch.testing.assert_close(drawn(other), drawn(pipe), rtol=0, atol=1e-5)
    third = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)
    third.load_lora_weights(tmp_path, weight_name="sgm.safetensors")
    torch.testing.assert_close(drawn(other), drawn(third), rtol=0, atol=1e-5)


def test_text_encoders_in_a_foreign_file(tiny_sdxl, tiny_sdxl_folder, tmp_path):
    """Text encoders that kohya's scripts train beside the UNet are kept; diffusers reads the file in the same way."""
    ends = ("self_attn_q_proj", "self_attn_out_proj", "mlp_fc1")
    modules = [f"lora_{part}_text_model_encoder_layers_1_{end}" for part in ("te1", "te2") for end in ends]
    modules.append("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q")
    generator, tensors = torch.Generator().manual_seed(0), {}
    for module in modules:
        width, rows = (64, 64) if "unet" in module else (16, 32) if "fc1" in module else (16, 16)
        rank = 3 if "fc1" in module else 2
        tensors[f"{module}.lora_down.weight"] = torch.randn(rank, width, generator=generator)
        tensors[f"{module}.lora_up.weight"] = torch.randn(rows, rank, generator=generator)
        tensors[f"{module}.alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "x.safetensors")
    before = drawn(tiny_sdxl)
    load_lora(tiny_sdxl, tmp_path / "x.safetensors")
    other = type(tiny_sdxl).from_pretrained(tiny_sdxl_folder, local_files_only=True)
    other.load_lora_weights(tmp_path, weight_name="x.safetensors")
    assert (drawn(tiny_sdxl) - before).abs().max() > 1e-2
    torch.testing.assert_close(drawn(tiny_sdxl), drawn(other), rtol=0, atol=1e-5)
    lora = read_lora(tmp_path / "x.safetensors")
    assert "text_encoder_2.text_model.encoder.layers.1.self_attn.out_proj" in lora
    assert {name.partition(".")[0]: t.shape for name, t in to_kohya(lora).items()}.keys() == set(modules)


PAIR = {"lora_down.weight": torch.ones(2, 8), "lora_up.weight": torch.ones(8, 2)}


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({f"lora_te3_encoder_block_0_layer_0_Attention_q.{k}": t for k, t in PAIR.items()}, "no name of kohya's"),
        ({f"lora_unet_double_blocks_0_img_other.{k}": t for k, t in PAIR.items()}, "no name of kohya's"),
        ({f"lora_unet_double_blocks_0_img_attn_qkv.{k}": t for k, t in PAIR.items()}, "8 rows for an input of 8"),
        ({f"lora_unet_joint_blocks_0_x_block_attn_proj.{k}": -t / 0 for k, t in PAIR.items()}, "not finite"),
        ({"lora_unet_joint_blocks_0_x_block_attn_proj.lora_down.weight": torch.ones(2, 8)}, "do not fit each other"),
        ({"x.lora_down.weight": torch.ones(2, 8), "x.lora_up.weight": torch.ones(8, 2)}, "no name of kohya's"),
        (
            {**{f"lora_unet_a.{k}": t for k, t in PAIR.items()}, "lora_unet_a.diff_b": torch.ones(8)},
            "names no LoRA factor in kohya's files",
        ),
        ({**{f"lora_unet_a.{k}": t for k, t in PAIR.items()}, "lora_unet_a.dora_scale": torch.ones(8)}, "is a DoRA"),
        ({"lora_unet_a.hada_w1_a": torch.ones(8, 8)}, "is a LoHa"),
        ({"lora_unet_a.lokr_w1": torch.ones(8, 8)}, "is a LoKr"),
    ],
)
def test_refused_files(tmp_path, tensors, match):
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=match) as caught:
        read_lora(tmp_path / "x.safetensors")
    assert "\n" not in str(caught.value)


def test_a_module_that_these_names_have_no_place_for():
    with pytest.raises(ValueError, match=r"transformer\.other has no name in kohya's files"):
        to_kohya(made({"other": (8, 8), "transformer_blocks.0.attn2.to_q": (8, 8)}))


def test_both_writings_are_the_same_adapters(tmp_path):
    lora = made(SD3)
    for name, content in (("a", lora_content(lora)), ("b", None)):
        if content is None:
            save_file(to_kohya(lora), tmp_path / f"{name}.safetensors")
        else:
            (tmp_path / f"{name}.safetensors").write_bytes(content)
    one, two = read_lora(tmp_path / "a.safetensors"), read_lora(tmp_path / "b.safetensors")
    assert one.keys() == two.keys()
    for module in one:
        torch.testing.assert_close(one[module].delta(), two[module].delta(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "told_by_names"),
    [("z_image", True), ("flux2_klein", True), *((one, False) for one in ("chroma", "qwen_image", "krea2", "lumina2"))],
)
def test_every_layer_there_and_back(request, kind, told_by_names):
    pipe = request.getfixturevalue(f"tiny_{kind}")
    lora = made({path: shape[::-1] for path, shape in layers(pipe.transformer).items()})
    assert not told_by_names or family_of(lora) == family_of(lora, pipe)
    for at_hand in (pipe, None) if told_by_names else (pipe,):
        back = lora_of(to_kohya(lora, at_hand), "file", pipe=at_hand)
        assert back.keys() == lora.keys()
        for module, factors in lora.items():
            assert torch.equal(back[module].scaled_up() @ back[module].down, factors.scaled_up() @ factors.down), module
