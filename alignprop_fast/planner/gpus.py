"""Data sheets of GPUs, and an estimate (roofline) of how long work takes on a GPU that is not here."""

import difflib
import re
from dataclasses import dataclass

GIB = 2**30
# No kernel reaches the rates of a data sheet. Large matrix products of vendor libraries reach about 0.7 of the tensor
# rate, copies about 0.85 of the bandwidth, and a launch takes some microseconds. These are assumptions for every GPU,
# not measurements.
MATMUL_FRACTION = 0.7
BANDWIDTH_FRACTION = 0.85
LAUNCH_SECONDS = 4e-6
GRAPH_LAUNCH_SECONDS = 1.5e-6  # inside a CUDA graph, where no host takes part


@dataclass(frozen=True)
class Gpu:
    """One GPU by its data sheet.

    memory_bytes: total memory that a CUDA program sees, which is less than on the box; the context takes about 0.5 GiB
        of it.
    bf16_flops: dense tensor rate of bf16 and fp16 with fp32 accumulation, FLOP/s. GeForce cards accumulate in fp32 at
        half the rate advertised for fp16.
    fp32_flops: rate outside the tensor cores, FLOP/s.
    bandwidth: of its memory, bytes/s.
    link: to or from host memory, bytes/s in one direction, over an x16 link with pinned memory.
    arch: compute capability, 89 for 8.9.
    """

    name: str
    memory_bytes: int
    bf16_flops: float
    fp32_flops: float
    bandwidth: float
    link: float
    arch: int


_PCIE_4, _PCIE_5 = 25e9, 50e9  # bytes/s; the x16 links have 32 and 63 GB/s on paper

GPUS = tuple(
    Gpu(name, int(memory * GIB), bf16 * 1e12, fp32 * 1e12, bandwidth * 1e9, link, arch)
    for name, memory, bf16, fp32, bandwidth, link, arch in (
        ("RTX 3060", 11.65, 25.5, 12.7, 360, _PCIE_4, 86),
        ("RTX 3090", 23.6, 71.2, 35.6, 936, _PCIE_4, 86),
        ("RTX 4080", 15.6, 97.5, 48.7, 717, _PCIE_4, 89),
        ("RTX 4090", 23.6, 165.2, 82.6, 1008, _PCIE_4, 89),
        ("RTX 5090", 31.3, 209.5, 104.8, 1792, _PCIE_5, 120),
        ("A10", 22.0, 125.0, 31.2, 600, _PCIE_4, 86),
        ("L4", 22.0, 121.0, 30.3, 300, _PCIE_4, 89),
        ("L40S", 44.4, 362.0, 91.6, 864, _PCIE_4, 89),
        ("A100 40GB", 39.4, 312.0, 19.5, 1555, _PCIE_4, 80),
        ("A100 80GB", 79.1, 312.0, 19.5, 2039, _PCIE_4, 80),
        ("H100 SXM", 79.1, 989.4, 66.9, 3352, _PCIE_5, 90),
        ("H200", 139.7, 989.4, 66.9, 4800, _PCIE_5, 90),
    )
)

# Words that do not distinguish the GPUs of the table. "Laptop", "Ti", "Super" and "PCIe" do: those are other chips.
_NOISE = r"nvidia|geforce|tesla|rtx|\bgpu\b|sxm\d?|hbm\d?e?|tensor core|[\s_-]+"


def _key(name: str) -> tuple[str, int | None]:
    """Model and gigabytes: ("4090", None) for "NVIDIA GeForce RTX 4090", ("a100", 80) for "A100-SXM4-80GB"."""
    text = name.lower().strip()
    memory = re.search(r"(?<!\d)(\d+)\s*gi?b\b|[\s_-](\d{2,3})$", text)
    if memory:
        text = text[: memory.start()] + " " + text[memory.end() :]
    key = re.sub(_NOISE, "", text)
    # An A100 has the same rates on either board.
    return "a100" if key == "a100pcie" else key, int(memory[1] or memory[2]) if memory else None


def find_gpu(name: str) -> Gpu:
    """The GPU of a name as people or the driver write it: "4090", "rtx4090", "NVIDIA A100-SXM4-80GB".

    Raises:
        ValueError: the name is unknown, or is an A100 without its memory. The message suggests the nearest names.
    """
    key, memory = _key(name)
    matches = [
        gpu
        for gpu in GPUS
        if _key(gpu.name)[0] == key and (memory is None or abs(gpu.memory_bytes / GIB / memory - 1) < 0.1)
    ]
    if len(matches) == 1:
        return matches[0]
    keys = {_key(gpu.name)[0]: gpu for gpu in GPUS}
    nearest = [gpu.name for gpu in matches] or [
        keys[near].name for near in difflib.get_close_matches(key, keys, n=1, cutoff=0.4)
    ]
    suggestion = f"; perhaps {' or '.join(nearest)}" if nearest else ""
    raise ValueError(f"unknown GPU {name!r}{suggestion}; known are {', '.join(gpu.name for gpu in GPUS)}")


def roofline_seconds(
    flops: float, num_bytes: float, gpu: Gpu, dtype: str, launches: int = 1, launch_seconds: float = LAUNCH_SECONDS
) -> float:
    """Seconds of an operation: the largest of the times for arithmetic, memory traffic and launches.

    Roofline model (Williams, Waterman and Patterson 2009) at the assumed fractions of the data sheet.

    Args:
        flops: multiplications and additions.
        num_bytes: bytes read and written.
        dtype: "bfloat16" and "float16" run on the tensor cores, "float32" outside them.
        launches: number of kernel launches, each of launch_seconds.

    Raises:
        ValueError: the dtype is another one.
    """
    rates = {"bfloat16": gpu.bf16_flops, "float16": gpu.bf16_flops, "float32": gpu.fp32_flops}
    if dtype not in rates:
        raise ValueError(f"no roofline for {dtype}: use one of {', '.join(rates)}")
    arithmetic = flops / (rates[dtype] * MATMUL_FRACTION)
    return max(arithmetic, num_bytes / (gpu.bandwidth * BANDWIDTH_FRACTION), launches * launch_seconds)
