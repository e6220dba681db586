"""What every adapter of a pipeline answers at each evaluation of the denoiser."""

import pytest
import torch
from torch import nn

from alignprop_fast.models import adapt
from alignprop_fast.models.casting import cast_weights


@pytest.mark.parametrize("kind", ["sdxl", "flux", "krea2"])
def test_the_dtype_is_known_without_a_search(request, monkeypatch, kind):
    """diffusers searches all modules for hooks first, which takes SDXL with adapters 25 ms at each evaluation."""
    model = adapt(request.getfixturevalue(f"tiny_{kind}"))
    cast_weights(model.denoiser, torch.bfloat16)  # Krea 2 keeps its norms in fp32
    expected, modules = model.denoiser.dtype, sum(1 for _ in model.denoiser.modules())
    searched, original = [], nn.Module.named_modules

    def named_modules(self, *arguments, **options):
        for entry in original(self, *arguments, **options):
            searched.append(entry)
            yield entry

    monkeypatch.setattr(nn.Module, "named_modules", named_modules)
    assert model.dtype == expected == torch.bfloat16 and len(searched) < modules / 4
