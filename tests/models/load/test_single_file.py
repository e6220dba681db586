"""One .safetensors file in the usual layouts, with another model's folder for the configurations."""

import json
import shutil

import pytest
import torch
from diffusers import FluxTransformer2DModel, StableDiffusion3Pipeline, StableDiffusionPipeline
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file

from alignprop_fast.making.random_weights import make_folder
from alignprop_fast.models.load.pipeline import load_pipeline
from alignprop_fast.models.lora.targets import denoiser

from . import original_layout
from .original_layout import weights, whole_file


@pytest.fixture
def configuration(tiny_sd_folder, tmp_path):
    """The folder of a model of the same architecture, without any weights."""
    return shutil.copytree(tiny_sd_folder, tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors"))


def assert_same(pipe, folder, dtype=torch.float32):
    """Every weight and a picture equal the folder's; CLIP's names depend on the version of transformers."""
    other = type(pipe).from_pretrained(folder, local_files_only=True, torch_dtype=dtype)
    for name, part in other.components.items():
        if isinstance(part, torch.nn.Module):
            mine, theirs = pipe.components[name].state_dict(), part.state_dict()
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[key], theirs[key]) for key in mine), name
    assert torch.equal(*(picture(aligned(one)) for one in (pipe, other)))


def aligned(pipe):
    """The pipeline with copies of its weights.

    On the CPU the rounding of a product depends on a weight's address. In a mapped file that is 8 bytes times a number
    that depends on the names of the tensors, so two files of the same weights differ; torch aligns copies to 64 bytes.
    """
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            for parameter in part.parameters():
                parameter.data = parameter.data.clone()
    return pipe


def picture(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    size = {"height": 16, "width": 16}
    return pipe(prompt="red cat", **size, num_inference_steps=2, generator=generator, output_type="pt").images


def without_weights(folder, to):
    return shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors"))


def test_stable_diffusion_in_the_original_layout(tiny_sd_folder, configuration, tmp_path):
    pipe = load_pipeline(whole_file(tiny_sd_folder, tmp_path / "model.safetensors"), model_config=configuration)
    assert_same(pipe, tiny_sd_folder)


def test_sdxl_in_the_original_layout(tmp_path):
    """diffusers tells SDXL's text encoders apart by their widths, 768 and 1280."""
    folder = make_folder("sdxl", tmp_path / "sdxl", second_text_width=32)
    file = whole_file(folder, tmp_path / "model.safetensors")
    assert_same(load_pipeline(file, model_config=without_weights(folder, tmp_path / "config")), folder)


LAYOUTS = {"sd3": original_layout.mmdit, "z_image": original_layout.z_image, "flux2_klein": original_layout.flux2}


@pytest.mark.parametrize(
    ("kind", "prefix"), [("sd3", ""), ("z_image", original_layout.UNET_PREFIX), ("flux2_klein", "")]
)
def test_transformers_in_the_original_layout(kind, request, tmp_path, prefix):
    folder = request.getfixturevalue(f"tiny_{kind}_folder")
    state = LAYOUTS[kind](weights(folder / "transformer"))
    file = original_layout.write({prefix + k: v for k, v in state.items()}, tmp_path / "model.safetensors")
    config = shutil.copytree(folder, tmp_path / "config", ignore=shutil.ignore_patterns("diffusion*"))
    shutil.copytree(folder / "vae", config / "vae", dirs_exist_ok=True)
    assert_same(load_pipeline(file, model_config=config), folder)


def test_a_file_without_vae_takes_the_folders(tiny_sd_folder, tmp_path):
    file = whole_file(tiny_sd_folder, tmp_path / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in load_file(file).items() if "first_stage" not in name}, file)
    pipe = load_pipeline(file, model_config=tiny_sd_folder)
    assert torch.equal(pipe.unet.conv_in.weight, 2 * weights(tiny_sd_folder / "unet")["conv_in.weight"])
    assert torch.equal(pipe.vae.decoder.conv_in.weight, weights(tiny_sd_folder / "vae")["decoder.conv_in.weight"])


def test_flux_in_the_original_layout():
    """diffusers takes FLUX's fused layers apart at their published width alone, so here with thin matrices.

    A pipeline of that width takes gigabytes.
    """
    transformer = FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=2,
        num_attention_heads=1,
        attention_head_dim=8,
        axes_dims_rope=(2, 2, 4),
        joint_attention_dim=8,
        pooled_projection_dim=8,
        guidance_embeds=True,
    )
    wide = {"attn.to_q": 3072, "attn.to_k": 3072, "attn.to_v": 3072, "proj_mlp": 12288}
    state = {}
    for name, tensor in transformer.state_dict().items():
        rows = next((n for part, n in wide.items() if name.startswith("single_") and f".{part}." in name), len(tensor))
        state[name] = torch.randn(rows, *tensor.shape[1:])
    back = convert_flux_transformer_checkpoint_to_diffusers(original_layout.flux(state))
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)


def test_a_flux_of_another_width_says_what_to_give(tiny_flux_folder, tmp_path):
    state = original_layout.flux(weights(tiny_flux_folder / "transformer"))
    file = original_layout.write(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"FLUX of width 32 in the original layout, .*the diffusers format") as error:
        load_pipeline(file, model_config=tiny_flux_folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conditioner.embedders.0.model.ln_final.bias": torch.ones(2)}, "SDXL's refiner"),
        ({"edm_mean": torch.ones(4)}, "Playground v2.5"),
        ({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(32, 9, 3, 3)}, "UNet of 9 channels"),
        ({"model.diffusion_model.out.2.scale_weight": torch.ones(1)}, "--base-dtype fp8"),
        ({"v_pred": torch.ones(0)}, '"prediction_type": "v_prediction"'),
        ({"v_pred": torch.ones(0), "ztsnr": torch.ones(0)}, '"v_prediction", "rescale_betas_zero_snr": true'),
    ],
)
def test_files_of_other_kinds(tiny_sd_folder, tmp_path, changes, message):
    file = whole_file(tiny_sd_folder, tmp_path / "model.safetensors")
    save_file({**load_file(file), **changes}, file)
    with pytest.raises(ValueError, match=message) as error:
        load_pipeline(file, model_config=tiny_sd_folder)
    assert "\n" not in str(error.value)


def test_a_width_of_text_for_each_block_is_no_other_width(tiny_sd_folder, configuration, tmp_path):
    """UNets may write it this way, and diffusers reads them."""
    file = whole_file(tiny_sd_folder, tmp_path / "model.safetensors")
    settings = configuration / "unet" / "config.json"
    content = json.loads(settings.read_text())
    blocks = len(content["down_block_types"])
    settings.write_text(json.dumps({**content, "cross_attention_dim": [content["cross_attention_dim"]] * blocks}))
    pipe = load_pipeline(file, model_config=configuration)
    expected = weights(tiny_sd_folder / "unet")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in pipe.unet.state_dict().items())


@pytest.mark.parametrize("content", [None, "", "3", "{}"])
@pytest.mark.parametrize("part", ["unet/config.json", "scheduler/scheduler_config.json"])
def test_a_configuration_that_lacks_something(tiny_sd_folder, configuration, tmp_path, part, content):
    file = whole_file(tiny_sd_folder, tmp_path / "model.safetensors")
    save_file({**load_file(file), "v_pred": torch.ones(0)}, file)
    (configuration / part).unlink()
    if content is not None:
        (configuration / part).write_text(content)
    with pytest.raises(ValueError) as error:
        load_pipeline(file, model_config=configuration)
    assert "\n" not in str(error.value) and str(configuration) in str(error.value)


def test_a_fine_tune_that_says_that_it_predicts_v(tiny_sd_folder, configuration, tmp_path):
    file = whole_file(tiny_sd_folder, tmp_path / "model.safetensors")
    save_file({**load_file(file), "v_pred": torch.ones(0), "ztsnr": torch.ones(0)}, file)
    settings = json.loads((configuration / "scheduler" / "scheduler_config.json").read_text())
    settings |= {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    (configuration / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    assert load_pipeline(file, model_config=configuration).scheduler.config.prediction_type == "v_prediction"


def test_the_folder_may_hold_a_variant_alone_or_lack_t5(tiny_sd3_folder, tiny_sd_folder, tmp_path):
    pipe = StableDiffusion3Pipeline.from_pretrained(tiny_sd3_folder, text_encoder_3=None, tokenizer_3=None)
    pipe.save_pretrained(tmp_path / "sd3", variant="fp16")
    state = original_layout.mmdit(weights(tiny_sd3_folder / "transformer"))
    (tmp_path / "sd3" / "transformer" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    file = original_layout.write(state, tmp_path / "model.safetensors")
    assert load_pipeline(file, model_config=tmp_path / "sd3").text_encoder_3 is None
    file = whole_file(tiny_sd_folder, file)
    save_file({name: tensor for name, tensor in load_file(file).items() if "first_stage" not in name}, file)
    StableDiffusionPipeline.from_pretrained(tiny_sd_folder).save_pretrained(tmp_path / "sd", variant="fp16")
    assert not any(
        parameter.is_meta for parameter in load_pipeline(file, model_config=tmp_path / "sd").vae.parameters()
    )


@pytest.mark.parametrize("kind", ["sd3", "flux", "z_image", "flux2_klein", "qwen_image"])
def test_a_transformer_alone_takes_the_rest_from_the_folder(kind, request, tmp_path):
    folder = request.getfixturevalue(f"tiny_{kind}_folder")
    state = {name: 2 * tensor for name, tensor in weights(folder / "transformer").items()}
    save_file(state, tmp_path / "model.safetensors")
    pipe = load_pipeline(tmp_path / "model.safetensors", dtype=torch.bfloat16, model_config=folder)
    for name, tensor in pipe.transformer.state_dict().items():
        assert torch.equal(tensor, state[name].to(tensor.dtype))
    assert denoiser(pipe).dtype == pipe.vae.dtype == torch.bfloat16
    assert torch.equal(pipe.vae.decoder.conv_in.weight, weights(folder / "vae")["decoder.conv_in.weight"].bfloat16())


def test_what_goes_wrong(tiny_sd_folder, tiny_sdxl_folder, configuration, tmp_path):
    file = whole_file(tiny_sd_folder, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="--model-config FOLDER"):
        load_pipeline(file)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_pipeline(file, model_config=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="leave it out"):
        load_pipeline(tiny_sd_folder, model_config=configuration)
    with pytest.raises(ValueError, match="same architecture"):
        load_pipeline(file, model_config=tiny_sdxl_folder)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="damaged"):
        load_pipeline(file, model_config=configuration)
