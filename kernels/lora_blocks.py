"""How the LoRA kernels cut their work. Without Triton, so that a plan made without a GPU knows it too."""

from collections.abc import Sequence
from functools import cache

import torch

MAX_RANK = 128
MAX_PROJECTIONS = 3
MAX_CHUNK = 512  # tokens
FEW_PROGRAMS = 132  # that keep an H100 busy
# Kind of input -> kernel -> block sizes. "product" computes y and gx in blocks of rows of T, columns, inner dimension.
CONFIGS = {
    "half": {
        "product": {"BLOCK_T": 128, "BLOCK_N": 128, "BLOCK_K": 32, "GROUP": 8, "num_warps": 8, "num_stages": 3},
        "down": {"BLOCK_T": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
        "add": {"BLOCK_T": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1},
        "grad": {"BLOCK_T": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
    },
    "fp32": {
        "product": {"BLOCK_T": 64, "BLOCK_N": 64, "BLOCK_K": 16, "GROUP": 8, "num_warps": 8, "num_stages": 2},
        "down": {"BLOCK_T": 32, "BLOCK_K": 16, "num_warps": 8, "num_stages": 2},
        "add": {"BLOCK_T": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
        "grad": {"BLOCK_T": 16, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
    },
}
# Above rank 32 in half precision, where the accumulators of three adapters would not fit the registers above.
HIGH_RANK = 32
HIGH_RANK_CONFIGS = {
    "down": {"BLOCK_T": 32, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2},
    "grad": {"BLOCK_T": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
}

# Sizes depend on shapes alone. They are kept, because computing them takes longer than allocating a tensor.


@cache
def rank_block(rank: int) -> int:
    """Padded rank. Raises ValueError beyond MAX_RANK."""
    if rank > MAX_RANK:
        raise ValueError(f"rank {rank} is above {MAX_RANK}, the largest that the lora_linear kernels take")
    return max(16, 1 << (rank - 1).bit_length())


@cache
def config(name: str, dtype: torch.dtype, block_r: int) -> dict[str, int]:
    """Block sizes, warps and stages of one kernel at a padded rank; raises KeyError for float64.

    "few" is "down" with the fewest rows of a tile, for few tokens. In two stages it spills on sm_90 with 8 warps at
    rank 128, and with 4 at some of the others.
    """
    if name == "few":
        warps = {"num_warps": 4} if block_r == MAX_RANK else {}
        return config("down", dtype, block_r) | {"BLOCK_T": 16, "num_stages": 2} | warps
    kind = {torch.float32: "fp32", torch.float16: "half", torch.bfloat16: "half"}[dtype]
    if kind == "half" and block_r > HIGH_RANK and name in HIGH_RANK_CONFIGS:
        return HIGH_RANK_CONFIGS[name]
    return CONFIGS[kind][name]


@cache
def chunk_tokens(n_tokens: int, columns: int, dtype: torch.dtype, block_r: int) -> int:
    """Tokens of one chunk of partial sums: as many as give each processor a program, at most MAX_CHUNK."""
    blocks = config("grad", dtype, block_r)
    chunk, across = MAX_CHUNK, -(-columns // blocks["BLOCK_N"])
    while chunk > blocks["BLOCK_T"] and -(-n_tokens // chunk) * across < FEW_PROGRAMS:
        chunk //= 2
    return chunk


def partial_sums(
    n_tokens: int, n_in: int, outs: Sequence[int], ranks: Sequence[int], dtype: torch.dtype
) -> tuple[int, int, list[int]]:
    """(tokens of a chunk, chunks, numbers in each chunk's part of all dA together and of each dB), summed in fp32."""
    chunk = chunk_tokens(n_tokens, min(n_in, *outs), dtype, rank_block(max(ranks)))
    sizes = [sum(ranks) * n_in, *(rank * out for rank, out in zip(ranks, outs, strict=True))]
    return chunk, -(-n_tokens // chunk), sizes
