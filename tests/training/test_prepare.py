"""Devices and dtypes: frozen weights in the mixed precision, and the trap of SDXL's VAE, which overflows in fp16."""

import pytest
import torch
from accelerate import Accelerator

from alignprop_fast.models import adapt
from alignprop_fast.models.ddpo_pipeline import DefaultDDPOStableDiffusionPipeline
from alignprop_fast.training.config import AlignPropConfig
from alignprop_fast.training.optimizers import state_bytes
from alignprop_fast.training.prepare import make_sampler, place_model, prepare_model
from alignprop_fast.training.weight_update import WeightUpdate

from ..eight_bits import EIGHT_BITS

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "no": torch.float32}


def placed(folder, precision, force_upcast):
    pipeline = DefaultDDPOStableDiffusionPipeline(str(folder))
    pipeline.vae.register_to_config(force_upcast=force_upcast)
    place_model(pipeline, torch.device("cpu"), AlignPropConfig(mixed_precision=precision))
    return pipeline


@pytest.mark.parametrize("precision", ["fp16", "bf16", "no"])
@pytest.mark.parametrize("force_upcast", [True, False])
def test_a_vae_that_overflows_in_fp16_stays_in_fp32(tiny_sdxl_folder, precision, force_upcast):
    """If it has `force_upcast`. The fp16-fix weights do not have it, and the range of bf16 is large enough."""
    pipeline = placed(tiny_sdxl_folder, precision, force_upcast)
    assert pipeline.unet.dtype == DTYPES[precision]
    assert {encoder.dtype for encoder in pipeline.text_encoders} == {DTYPES[precision]}
    upcast = precision == "fp16" and force_upcast
    assert pipeline.vae.dtype == (torch.float32 if upcast else DTYPES[precision])
    adapt(pipeline.sd_pipeline)  # accepts the placed modules


def test_the_sampler_refuses_such_a_vae_in_fp16(tiny_sdxl):
    tiny_sdxl.vae.register_to_config(force_upcast=True)
    tiny_sdxl.to(dtype=torch.float16)
    with pytest.raises(ValueError, match="overflows in fp16: load the pipeline in bfloat16, or the VAE in float32"):
        adapt(tiny_sdxl)
    tiny_sdxl.vae.float()
    adapt(tiny_sdxl)


KEPT_IN_FP32 = {("krea2", "bf16"), ("sd3", "fp16")}  # norms of the denoiser, and the last products of T5


@pytest.mark.parametrize(
    ("model", "precision"),
    [
        *((name, "bf16") for name in ("sd", "sdxl", "sd3", "flux", "z_image", "flux2_klein", "qwen_image", "krea2")),
        ("sd3", "fp16"),
    ],
)
def test_loading_in_a_dtype_gives_the_bits_of_casting_after_loading(model, precision, request):
    folder, config = request.getfixturevalue(f"tiny_{model}_folder"), AlignPropConfig(mixed_precision=precision)
    dtypes = torch.float32, DTYPES[precision]
    found = [DefaultDDPOStableDiffusionPipeline(str(folder), dtype=dtype) for dtype in dtypes]
    for own, dtype in zip(found, dtypes, strict=True):
        assert own.unet.dtype == dtype
        own.vae.register_to_config(force_upcast=False)
        place_model(own, torch.device("cpu"), config)
    placed_dtypes = {p.dtype for part in (found[0].unet, *found[0].text_encoders) for p in part.parameters()}
    assert placed_dtypes == {DTYPES[precision]} | ({torch.float32} if (model, precision) in KEPT_IN_FP32 else set())
    for cast, loaded in zip(*([p.unet, p.vae, *p.text_encoders] for p in found), strict=True):
        others = dict([*loaded.named_parameters(), *loaded.named_buffers()])
        for name, tensor in (*cast.named_parameters(), *cast.named_buffers()):
            assert tensor.dtype == others[name].dtype and torch.equal(tensor, others[name]), name


def test_a_denoiser_that_is_trained_whole_is_loaded_in_fp32(tiny_sd_folder):
    own = DefaultDDPOStableDiffusionPipeline(str(tiny_sd_folder), use_lora=False, dtype=torch.bfloat16)
    assert {p.dtype for p in own.unet.parameters()} == {torch.float32}


def test_what_is_switched_on_is_refused_before_anything_is_done(tiny_sd_folder):
    pipeline = DefaultDDPOStableDiffusionPipeline(tiny_sd_folder)
    pipeline.unet.enable_gradient_checkpointing()
    with pytest.raises(ValueError, match=r"pipe\.unet\.disable_gradient_checkpointing\(\)"):
        prepare_model(pipeline, torch.device("cpu"), AlignPropConfig(mixed_precision="bf16"))
    assert pipeline.unet.dtype == torch.float32 and not hasattr(pipeline.unet, "peft_config")


def test_what_learns_beside_the_denoiser_is_refused(tiny_sd_folder):
    """The trainer's optimizer would not have these parameters, and their gradients would add up."""
    pipeline = DefaultDDPOStableDiffusionPipeline(str(tiny_sd_folder))
    config = AlignPropConfig(mixed_precision="no", sample_num_steps=2)
    prepare_model(pipeline, torch.device("cpu"), config)
    pipeline.text_encoder.get_input_embeddings().weight.requires_grad_()
    with pytest.raises(ValueError, match="trains only the denoiser, but a text encoder or the VAE requires grad"):
        make_sampler(pipeline, config, None)


def test_the_plan_counts_optimizer_and_moving_average(tiny_sd_folder, fresh_process):
    pipeline = DefaultDDPOStableDiffusionPipeline(str(tiny_sd_folder))
    config = AlignPropConfig(mixed_precision="bf16", adapter_dtype="bf16", sample_num_steps=2, ema_decay=0.9)
    trained = prepare_model(pipeline, torch.device("cpu"), config)
    sampler = make_sampler(pipeline, config, None)
    update = WeightUpdate(config, Accelerator(cpu=True, mixed_precision="no"), trained, use_lora=True)
    for parameter in trained:
        parameter.grad = torch.ones(parameter.shape)
    update.step()
    average_bytes = sum(tensor.nbytes for tensor in update.average.state_dict()["weights"])
    assert average_bytes == 4 * sum(parameter.numel() for parameter in trained)
    assert sampler.optimizer_bytes == state_bytes(update.optimizer) + average_bytes


@pytest.mark.parametrize("kind", EIGHT_BITS)
def test_steps_without_gradient_run_in_the_8_bits_of_a_base_for_bf16(tiny_sd_folder, fresh_process, kind):
    """A cast of the model after it was quantised rounded the scales, and products in fp8 take scales in fp32 only."""
    pipeline = DefaultDDPOStableDiffusionPipeline(str(tiny_sd_folder))
    own = {"base_dtype": kind, "sampling_precision": kind}
    config = AlignPropConfig(mixed_precision="bf16", sample_num_steps=2, **own)
    prepare_model(pipeline, torch.device("cpu"), config)
    images = make_sampler(pipeline, config, None)(["a cat"], grad_steps=[1])
    rounded = [m.rounded for m in pipeline.unet.modules() if getattr(m, "rounded", None) is not None]
    assert rounded and {weight.scale.dtype for weight in rounded} == {torch.float32} and images.isfinite().all()
