"""Without a GPU the kernels run in Triton's interpreter, also in bf16."""

import pytest
import torch

from ..emulated_gpu.interpreter_bf16 import bf16_of_the_interpreter


@pytest.fixture(scope="session", autouse=True)
def rounded_bf16():
    if not torch.cuda.is_available():
        bf16_of_the_interpreter()
