"""Products of 8-bit numbers: exact where integers are, as close as 8 bits can be elsewhere."""

import pytest
import torch

from alignprop_fast.ops import rounded_linear
from alignprop_fast.ops.lora_linear import lora_linears
from alignprop_fast.ops.lora_linear_plain import Layer, plain_outputs
from alignprop_fast.ops.rounded_linear import KINDS, RoundedLayer, RoundedWeight, round_rows, rounded_outputs, why_not
from alignprop_fast.ops.rounded_linear_trials import _ExactTrial, _RoundedTrial, pays_by
from alignprop_fast.planner import find_gpu, roofline_seconds

# Rounding adds a uniform error of a 254th of the row's largest value to int8, and of 2^-4 of itself at most to e4m3.
# Of normal numbers that is 0.9 % and 2.6 %; a product of two such tensors has sqrt(2) times the error.
from ..eight_bits import EIGHT_BITS

ERRORS = {"int8": 0.016, "fp8": 0.045}


def layers(kind, dtype=torch.float32, rank=4):
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

    exact = [Layer(drawn(48, 64), drawn(48), drawn(rank, 64), drawn(48, rank), 0.5), Layer(drawn(32, 64))]
    return drawn(2, 9, 64) * 8, [
        RoundedLayer(RoundedWeight(*round_rows(one.weight, KINDS[kind])), one) for one in exact
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", EIGHT_BITS)
def test_outputs_are_those_of_the_rounded_numbers_and_near_the_exact_ones(kind, dtype):
    x, rounded = layers(kind, dtype)
    values, scale = round_rows(x.flatten(0, 1), KINDS[kind])
    for y, (weight, exact) in zip(rounded_outputs(x, rounded), rounded, strict=True):
        assert y.dtype == dtype and y.shape == (2, 9, len(exact.weight))
        twin = exact._replace(weight=(weight.values.double() * weight.scale))
        twin = Layer(*(t.double() if isinstance(t, torch.Tensor) else t for t in twin))
        bare = (values.double() * scale).view(2, 9, -1) @ twin.weight.T
        expected = bare + plain_outputs(x.double(), [twin])[0] - x.double() @ twin.weight.T
        # fp8 products are written in bf16, and bf16 layers are: three roundings by 2^-9 of the largest term.
        tolerance = 1e-6 if (kind, dtype) == ("int8", torch.float32) else 3 * 2**-9
        assert (y - expected).abs().max() <= tolerance * expected.abs().max()
        exactly = plain_outputs(x, [exact])[0].double()
        assert (
            0
            < (y - exactly).norm()
            < ERRORS[kind] * exactly.norm() + (0.005 * exactly.norm() if dtype != x.float().dtype else 0)
        )


@pytest.mark.parametrize("kind", KINDS)
def test_rows_keep_their_largest_values_and_rows_of_zeros_stay(kind):
    x = torch.tensor([[0.0, 0.0], [1e-3, -5e-4], [3e4, 1.0]])
    values, scale = round_rows(x, KINDS[kind])
    back = values.float() * scale
    assert values.dtype == KINDS[kind] and back[0].abs().max() == 0
    torch.testing.assert_close(back.abs().amax(1), x.abs().amax(1), rtol=1e-6, atol=0)


def test_layers_run_exactly_unless_all_of_them_are_rounded():
    x, rounded = layers("int8")
    exact = lora_linears(x, [layer.exact for layer in rounded])
    for faster, expected in ((True, rounded_outputs(x, rounded)), (False, exact)):
        with rounded_linear.rounding(lambda *arguments, faster=faster: faster):
            assert all(map(torch.equal, lora_linears(x, rounded), expected))
            assert all(map(torch.equal, lora_linears(x, [rounded[0], rounded[1].exact]), exact))


@pytest.mark.parametrize(
    ("gpu", "kind", "rows", "width", "faster"),
    [
        # SDXL's blocks of width 640 and 1280, FLUX's of width 3072.
        *(("RTX 4090", "int8", 8192, 640, False), ("RTX 4090", "int8", 2048, 1280, True)),
        *(("RTX 4090", "fp8", 2048, 1280, True), ("RTX 4090", "int8", 4608, 3072, True)),
        *(("H100", "fp8", 8192, 640, False), ("H100", "fp8", 4608, 3072, True), ("H100", "int8", 4608, 3072, True)),
    ],
)
def test_an_estimate_says_where_8_bits_pay(gpu, kind, rows, width, faster):
    with torch.device("meta"):
        x, weight = (torch.empty(size, width, dtype=torch.bfloat16) for size in (rows, width))
        rounded = [RoundedLayer(RoundedWeight(*round_rows(weight, KINDS[kind])), Layer(weight))]

    def roofline(flop, size_bytes, dtype):
        return roofline_seconds(flop, size_bytes, find_gpu(gpu), str(dtype).removeprefix("torch."))

    assert pays_by(roofline, x, rounded) is faster


@pytest.mark.parametrize("kind", EIGHT_BITS)
def test_a_trial_refuses_wrong_products(kind, monkeypatch):
    x, rounded = layers(kind)
    exact = _ExactTrial(x, [layer.exact for layer in rounded])
    trial = _RoundedTrial(x, rounded, exact)
    assert trial.fault() is None and exact.fault() is None
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: a.int() @ b.int().flip(1))
    monkeypatch.setattr(torch, "_scaled_mm", lambda a, b, s, t, **how: (a.float() * s) @ (b.float() * t).flip(1))
    assert "errors are" in trial.fault()


def test_a_device_says_why_it_has_no_such_products(monkeypatch):
    cpu = torch.device("cpu")
    assert why_not("int8", cpu) is None

    def refused(*arguments, **keywords):
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED when calling this\nand more")

    monkeypatch.setattr(torch, "_scaled_mm", refused)
    assert why_not("fp8", cpu) == "CUBLAS_STATUS_NOT_SUPPORTED when calling this"
    monkeypatch.setattr(rounded_linear, "rounded_product", lambda values, *rest: torch.zeros(32, 32))
    assert why_not("int8", cpu) == "it gives wrong numbers"
