"""The table of GPUs: names as people write them, and the roofline."""

import pytest

from alignprop_fast.planner import GPUS, find_gpu, roofline_seconds


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("4090", "RTX 4090"),
        ("rtx4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("RTX 3060 12 GB", "RTX 3060"),
        ("A100-80GB", "A100 80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("A100-PCIE-40GB", "A100 40GB"),
        ("a100 80", "A100 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("h100", "H100 SXM"),
        ("NVIDIA H200", "H200"),
        ("nvidia_l40s", "L40S"),
        ("Tesla L4", "L4"),
    ],
)
def test_names(name, expected):
    assert find_gpu(name).name == expected


def test_every_gpu_is_found_by_its_own_name():
    assert [find_gpu(gpu.name) for gpu in GPUS] == list(GPUS) and len(GPUS) == 12


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("RTX 4091", "RTX 4090"),
        ("A100", "A100 40GB or A100 80GB"),
        ("RTX 4090 Laptop GPU", "RTX 4090"),
        ("RTX 4080 SUPER", "RTX 4080"),
        ("H100 PCIe", "H100 SXM"),
        ("RTX 4090 48GB", "RTX 4090"),
    ],
)
def test_unknown_names_suggest_the_nearest(name, suggestion):
    with pytest.raises(ValueError, match=f"perhaps {suggestion}.*known are RTX 3060, ") as error:
        find_gpu(name)
    assert "\n" not in str(error.value)


def test_a_name_like_no_other():
    with pytest.raises(ValueError, match="unknown GPU 'abacus'; known are"):
        find_gpu("abacus")


def test_roofline_takes_the_slower_of_arithmetic_and_traffic():
    gpu = find_gpu("4090")
    assert roofline_seconds(165.2e12 * 0.7, 1, gpu, "bfloat16") == pytest.approx(1.0)
    assert roofline_seconds(82.6e12 * 0.7, 1, gpu, "float32") == pytest.approx(1.0)
    assert roofline_seconds(1, 1008e9 * 0.85, gpu, "float16") == pytest.approx(1.0)
    # Data sheet: 660.6 TOPS in int8 and 330.3 TFLOPS in fp8 with fp32 sums; 1979 in both for an H100; 624 for an A100.
    assert roofline_seconds(660.6e12 * 0.7, 1, gpu, "int8") == pytest.approx(1.0, rel=1e-3)
    assert roofline_seconds(330.3e12 * 0.7, 1, gpu, "float8_e4m3fn") == pytest.approx(1.0, rel=1e-3)
    assert find_gpu("h100").int8_flops == find_gpu("h100").fp8_flops == pytest.approx(1979e12, rel=1e-3)
    assert find_gpu("a100 80").int8_flops == 624e12
    with pytest.raises(ValueError, match="A100 80GB has no products in fp8: use int8 or exact"):
        roofline_seconds(1, 1, find_gpu("a100 80"), "float8_e4m3fn")
    assert roofline_seconds(1, 1, gpu, "float16", launches=3) == pytest.approx(12e-6)
    with pytest.raises(ValueError, match="float32"):
        roofline_seconds(1, 1, gpu, "int4")
