"""Work that runs out of memory is repeated after the failed run is freed, for every message of the device."""

import weakref

import pytest
import torch
from peft import LoraConfig

from alignprop_fast.cli import app as command_line
from alignprop_fast.generate.sampler import DifferentiableSampler
from alignprop_fast.planner import Plan, StageChoice
from alignprop_fast.training import out_of_memory

FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported later", 2),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
]
KEPT = Plan(3, (1, 2), (), ({}, {}), {}, StageChoice("batch"))


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_the_failed_chain_is_gone_before_its_repetition_begins(tiny_sd, monkeypatch, error):
    """The sampler's `base_mse` kept all resident steps of the failed run alive."""
    tiny_sd.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    sampler = DifferentiableSampler(tiny_sd, 3, compare_with_base=True)
    monkeypatch.setattr(out_of_memory, "_tighten", lambda sampler, reason: reasons.append(reason))
    reasons, tapes, alive = [], [], []
    tiny_sd.unet.register_forward_pre_hook(lambda *_: alive.append([tape() is not None for tape in tapes]))

    def work():
        images = sampler(["a dog"], None, torch.Generator().manual_seed(0), plan=KEPT)
        if not tapes:
            tapes.append(weakref.ref(sampler.base_mse.grad_fn.next_functions[0][0].tape))
            assert tapes[0]().graphs, "steps are resident"
            raise error
        return images

    images = out_of_memory.with_less_memory(sampler, work)
    assert images.requires_grad and sampler.base_mse is not None
    assert [True] not in alive and [False] in alive
    assert reasons == [str(error).partition("\n")[0]]


def test_another_error_is_not_taken_for_a_full_device(tiny_sd):
    def work():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        out_of_memory.with_less_memory(DifferentiableSampler(tiny_sd, 3), work)


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_the_command_line_ends_in_one_line(monkeypatch, capsys, error):
    def app(*arguments, **options):
        raise error

    monkeypatch.setattr(command_line, "app", app)
    with pytest.raises(SystemExit) as end:
        command_line.main(["train"])
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 1 and "use a smaller --batch-size" in lines[0]
