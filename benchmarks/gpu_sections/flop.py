"""FLOP of the models, as constants, so that no GPU waits while they are counted.

    python -m benchmarks.gpu_sections.flop          # counts them again, on tensors without data: about a minute of CPU

For one image at the model's own size, without recomputation. "forward" is a pair of evaluations with guidance; "both"
adds the backward pass into latents and adapters of rank 16; "decoder" and "reward" (HPS v2) are forward and backward.
"""

from __future__ import annotations

FLOP: dict[str, dict[str, float]] = {
    "sd15": {
        "forward": 1_611_103_469_568,
        "both": 3_612_457_222_144,
        "decoder": 5_080_577_474_560,
        "reward": 680_002_027_520,
    },
    "sdxl": {
        "forward": 13_564_151_070_720,
        "both": 29_539_100_590_080,
        "decoder": 21_765_418_909_696,
        "reward": 680_002_027_520,
    },
    # The model of a dry run.
    "small": {"forward": 92_700_672, "both": 197_580_800, "decoder": 44_257_280, "reward": 0},
}


def count(model: str) -> dict[str, float]:
    import torch

    from benchmarks.step.train_step_variants import Bench

    small = model == "small"
    return Bench(model, torch.device("cpu" if small else "meta"), 1, "mean" if small else "hpsv2").flop()


if __name__ == "__main__":
    for name in FLOP:
        print(name, {what: f"{flop:_.0f}" for what, flop in count(name).items()})
