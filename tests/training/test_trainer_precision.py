"""The trainer with weights, adapters and a base model in other precisions, and what needs a GPU."""

import pytest
import torch

from .tiny_trainer import make_config, make_trainer, same, weights


def test_full_fine_tuning_under_bf16_keeps_fp32_weights(tiny_sd_folder, tmp_path):
    config = make_config(tmp_path, mixed_precision="bf16", truncation="last:1", num_epochs=1)
    trainer = make_trainer(tiny_sd_folder, config, use_lora=False)
    assert {weight.dtype for weight in weights(trainer)} == {torch.float32}
    assert trainer.sd_pipeline.vae.dtype == torch.bfloat16
    before = weights(trainer)
    trainer.train()
    assert trainer.metrics.status == "ok" and not same(before, weights(trainer))


def test_lora_under_bf16(tiny_sd_folder, tmp_path):
    config = make_config(tmp_path, mixed_precision="bf16", truncation="last:1", num_epochs=1)
    trainer = make_trainer(tiny_sd_folder, config)
    assert trainer.sd_pipeline.unet.conv_in.weight.dtype == torch.bfloat16
    assert {weight.dtype for weight in weights(trainer)} == {torch.float32}
    trainer.train()
    assert trainer.metrics.status == "ok"


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 works on a GPU")
def test_fp16_without_a_gpu_is_refused(tiny_sd_folder, tmp_path):
    with pytest.raises(ValueError, match='needs a GPU: use "no"'):
        make_trainer(tiny_sd_folder, make_config(tmp_path, mixed_precision="fp16"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="they work on a GPU")
@pytest.mark.parametrize(("name", "value"), [("cuda_graphs", "on"), ("compiled", True)])
def test_what_needs_a_gpu_is_refused_without_one(tiny_sd_folder, tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name} needs a GPU, but the model is on the CPU: leave it out"):
        make_trainer(tiny_sd_folder, make_config(tmp_path, **{name: value}))


def test_graphs_are_refused_under_autocast(tiny_sd_folder, tmp_path):
    config = make_config(tmp_path, mixed_precision="bf16", cuda_graphs="on")
    with pytest.raises(ValueError, match="train adapters, or leave it out"):
        make_trainer(tiny_sd_folder, config, use_lora=False)


@pytest.mark.parametrize("base", ["int8", "fp8"])
def test_lora_on_a_quantised_base(tmp_path, base):
    config = make_config(tmp_path, mixed_precision="bf16", truncation="last:1", num_epochs=1, base_dtype=base)
    trainer = make_trainer("demo", config)
    assert any(name.endswith("attn1.to_q.base_layer.packed") for name, _ in trainer.sd_pipeline.unet.named_buffers())
    before = weights(trainer)
    trainer.train()
    assert trainer.metrics.status == "ok" and not same(before, weights(trainer))
    with pytest.raises(ValueError, match="quantised: save only its adapters"):
        trainer.save_pretrained(tmp_path / "saved")


def test_a_quantised_base_cannot_be_trained_itself(tiny_sd_folder, tmp_path):
    with pytest.raises(ValueError, match="use adapters"):
        make_trainer(tiny_sd_folder, make_config(tmp_path, base_dtype="int8"), use_lora=False)


def test_bf16_adapters(tiny_sd_folder, tmp_path):
    options = {"mixed_precision": "bf16", "truncation": "last:1", "num_epochs": 1}
    trainer = make_trainer(tiny_sd_folder, make_config(tmp_path, adapter_dtype="bf16", **options))
    before = weights(trainer)
    assert {weight.dtype for weight in before} == {torch.bfloat16}
    trainer.train()
    assert trainer.metrics.status == "ok" and not same(before, weights(trainer))
    with pytest.raises(ValueError, match="the whole denoiser is trained"):
        make_trainer(tiny_sd_folder, make_config(tmp_path / "2", adapter_dtype="bf16", **options), use_lora=False)
