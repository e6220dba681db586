"""Without a GPU the kernels run in Triton's interpreter, also in bf16."""

import pytest
import torch

from ..emulated_gpu.interpreter_bf16 import bf16_of_the_interpreter


@pytest.fixture(scope="session", autouse=True)
def rounded_bf16():
    if not torch.cuda.is_available():
        bf16_of_the_interpreter()


@pytest.fixture
def poisoned(monkeypatch):
    """Every buffer that a launcher takes is NaN until a kernel has written it."""
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, _filled(getattr(owner, name)))


def _filled(allocate):
    def filled(*arguments, **keywords):
        buffer = allocate(*arguments, **keywords)
        return buffer.fill_(torch.nan) if buffer.is_floating_point() else buffer

    return filled
