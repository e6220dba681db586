"""The 8-bit formats whose products run on the CPU: PyTorch 2.11 has none in fp8 with a scale for each row."""

import pytest
import torch

from alignprop_fast.ops.rounded_linear import why_not

needs_fp8 = pytest.mark.skipif(why_not("fp8", torch.device("cpu")) is not None, reason="no such products in fp8 here")
EIGHT_BITS = ["int8", pytest.param("fp8", marks=needs_fp8)]
