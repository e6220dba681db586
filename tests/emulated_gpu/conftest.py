"""Fixtures for the checks of this folder; `tests/test_emulated_gpu.py` runs them in processes with the emulated GPU."""

import pytest


@pytest.fixture(scope="session")
def emulated():
    import emulate

    return emulate.started()


@pytest.fixture(autouse=True)
def examined_before(monkeypatch):
    """Skips training's first examination, which runs in another process without the GPU; check_doctor tests it."""
    monkeypatch.setattr("alignprop_fast.training.trainer.examine_once", lambda device, dtype: None)


@pytest.fixture(autouse=True)
def ways(monkeypatch):
    """The seconds of the ways to run a step, as they would be remembered: graphs are no faster, unless a check sets it.

    Timing them would take seconds in each check, and a busy machine would decide.
    """
    seconds = {"eager": 1.0, "graphs": 1.0, "replay eager": 1.0, "replay graphs": 1.0}
    monkeypatch.setattr("alignprop_fast.generate.graph_costs._remembered", lambda step: seconds)
    return seconds


@pytest.fixture(
    params=[
        *("tiny_sd", "tiny_sdxl", "tiny_sd3", "tiny_flux", "tiny_chroma", "tiny_z_image"),
        *("tiny_flux2_klein", "tiny_flux2_dev", "tiny_qwen_image", "tiny_krea2"),
        *(
            pytest.param(name, marks=pytest.mark.slow("ops and loops that the others run too"))
            for name in ("tiny_lumina2", "tiny_sana")
        ),
    ]
)
def adapted(request, emulated):
    """A pipeline of each architecture on the CPU, with adapters that are not zero."""
    import torch
    from peft import LoraConfig

    pipe = request.getfixturevalue(request.param)
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    torch.manual_seed(0)
    denoiser.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    return pipe


@pytest.fixture(scope="module")
def plain_kernels():
    """Leaves Triton out: its interpreter takes seconds per op, and these checks run hundreds. Other tests cover it.

    Attention uses the first of the GPU's fused kernels instead of autotuning.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("alignprop_fast.ops.backend._HAS_TRITON", False)
        patch.setattr(
            "alignprop_fast.ops.attention_backends.fastest", lambda problem, offered, device: next(iter(offered))
        )
        patch.setattr("alignprop_fast.ops.autotune._choices", {})
        yield
