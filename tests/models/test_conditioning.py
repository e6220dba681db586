"""Conditioning: what shapes in the denoiser know of the lengths of texts."""

import pytest
import torch

from alignprop_fast.models.conditioning import Conditioning


@pytest.mark.parametrize(
    ("lengths", "fills", "extent", "recurs"),
    [
        ((), False, (0, True), True),
        ((19, 19), False, (19, True), False),  # not padded, so a recording would serve this one length
        ((64, 64), False, (64, True), True),
        ((19, 33), False, (64, False), True),
        ((32, 19), False, (32, False), True),
        ((19, 33), True, (64, False), True),
        ((19, 22), True, (32, True), True),  # Z-Image
    ],
)
def test_extent(lengths, fills, extent, recurs):
    multiple = 32 if lengths else 1
    cond = Conditioning(torch.empty(2, 64, 8), None, 1, lengths=lengths, multiple=multiple, fills=fills)
    assert (cond.extent, cond.recurs) == (extent, recurs)
    assert not lengths or cond.longest().extent == (64, True)
