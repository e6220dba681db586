"""Compares alignprop_fast with trl 0.23.1, the last release with AlignPropTrainer: rewards, time and memory.

    python -m venv trl-env
    trl-env/bin/pip install trl==0.23.1 transformers==4.56.2 diffusers==0.35.2 peft==0.17.1 torch
    python -m benchmarks.trl.compare_trl --trl-python trl-env/bin/python

Both train the same random-weight Stable Diffusion pipeline (UNet widths 64/128/256, latents 32 x 32, VAE of four
levels, batch 2, 12 steps, LoRA rank 4, fp32, CPU) from the same seed. Every run is a new process and the libraries take
turns. Times are compared step by step, because both draw the same gates. The first step of a process is not timed.

Seconds are wall seconds; CPU seconds are reported too, for machines with other work. Added memory is the peak of the
resident set over all steps minus the resident set before the first. Tensor bytes are the exact live bytes of tensors,
counted in one further run of each. Threads wait without spinning, because spinning would make CPU seconds meaningless.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import RESULTS
from benchmarks.provenance import commit

WORKER = Path(__file__).with_name("compare_trl_worker.py")
RUN_COLUMNS = [
    *("variant", "repetition", "step", "wall_seconds", "cpu_seconds", "reward_mean", "relative_reward_difference"),
    *("added_peak_bytes", "added_tensor_bytes", "threads", "cpu", "commit", "versions"),
]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", required=True, help="python of an environment with trl 0.23.1")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--optimizer-steps", type=int, default=4, help="per run; the first is not timed")
    parser.add_argument("--num-inference-steps", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--eta", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--memory-budget", action="append", default=[], help="a further variant of ours, e.g. 600MiB")
    parser.add_argument("--results", type=Path, default=RESULTS / "cpu", help="folder of the CSV files")
    return parser.parse_args()


def build_model(folder: Path) -> Path:
    from alignprop_fast.making.random_weights import make_folder

    return make_folder(
        "sd",
        folder,
        unet_widths=(64, 128, 256),
        latent_size=32,
        vae_widths=(16, 32, 64, 64),
        text_width=64,
        norm_groups=16,
        heads=4,
        layers_per_block=2,
    )


def run_worker(args: argparse.Namespace, variant: str, model: Path, folder: Path, count: bool) -> dict[str, Any]:
    """Run a worker in a new process; returns its measurements."""
    library, _, budget = variant.partition(" ")
    output = folder / "record.json"
    command = [
        args.trl_python if library == "trl" else sys.executable,
        *(str(WORKER), "--library", library, "--model", str(model), "--output", str(output)),
        *("--optimizer-steps", str(2 if count else args.optimizer_steps), "--seed", "0"),
        *("--num-inference-steps", str(args.num_inference_steps), "--batch-size", str(args.batch_size)),
        *("--eta", str(args.eta), "--threads", str(args.threads)),
        *(["--memory-budget", budget] if budget else []),
        *(["--count-tensor-bytes"] if count else []),
    ]
    quiet = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, env={**os.environ, **quiet}, capture_output=True, text=True, cwd=folder)
    if run.returncode:
        raise SystemExit(f"{variant} failed:\n{run.stderr[-3000:]}")
    return json.loads(output.read_text(encoding="utf-8"))


def largest_difference(first: list[list[float]], second: list[list[float]]) -> float:
    """Largest relative difference of two runs' rewards, over the batches that both have."""
    pairs = [pair for batches in zip(first, second, strict=False) for pair in zip(*batches, strict=True)]
    return max(abs(a - b) / abs(a) for a, b in pairs)


def measure(args: argparse.Namespace, variants: list[str], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Records per variant: the timed repetitions, then the counted run."""
    model = build_model(folder / "model")
    records: dict[str, list[dict[str, Any]]] = {variant: [] for variant in variants}
    for repetition in range(args.repetitions + 1):
        count = repetition == args.repetitions
        # Reverse the order each time, so that a machine that slows down affects both sides.
        for variant in variants if repetition % 2 == 0 else variants[::-1]:
            records[variant].append(run_worker(args, variant, model, folder, count))
            print(f"{'count' if count else repetition}: {variant}: {_one_line(records[variant][-1])}", flush=True)
    return records


def _one_line(record: dict[str, Any]) -> str:
    seconds = " ".join(f"{second:.2f}" for second in record["wall_seconds"])
    return f"{seconds} s, added peak {record['added_peak_bytes'] / 2**20:.0f} MiB"


def summary(records: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row per variant of ours: ratios to trl, as median, smallest and largest."""
    *base, base_counted = records["trl"]
    rows = []
    for variant, (*runs, counted) in records.items():
        if variant == "trl":
            continue
        row: dict[str, Any] = {"variant": variant}
        for clock in ("wall_seconds", "cpu_seconds"):
            ratios = [a / b for one, two in zip(base, runs, strict=True) for a, b in _steps(one, two, clock)]
            row[f"speed_{clock}"] = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        memory = [two["added_peak_bytes"] / one["added_peak_bytes"] for one, two in zip(base, runs, strict=True)]
        row["added_peak"] = f"{median(memory):.2f} ({min(memory):.2f} to {max(memory):.2f})"
        row["added_tensor_bytes"] = f"{counted['added_tensor_bytes'] / base_counted['added_tensor_bytes']:.2f}"
        difference = max(
            largest_difference(one["rewards"], two["rewards"]) for one, two in zip(base, runs, strict=True)
        )
        row["relative_reward_difference"] = f"{difference:.1e}"
        rows.append(row)
    return rows


def _steps(one: dict[str, Any], two: dict[str, Any], clock: str) -> list[tuple[float, float]]:
    return list(zip(one[clock][1:], two[clock][1:], strict=True))


def write_runs(path: Path, args: argparse.Namespace, records: dict[str, list[dict[str, Any]]]) -> None:
    """One row per step of every run."""
    same = {"threads": args.threads, "cpu": _cpu(), "commit": commit()}
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, RUN_COLUMNS)
        writer.writeheader()
        for variant, runs in records.items():
            for repetition, run in enumerate(runs):
                base = records["trl"][repetition]["rewards"]
                for step, scores in enumerate(run["rewards"]):
                    row = {
                        **{"variant": variant, "repetition": repetition, "step": step},
                        **{key: run[key] for key in ("added_peak_bytes", "added_tensor_bytes")},
                        **{key: round(run[key][step], 4) for key in ("wall_seconds", "cpu_seconds")},
                        "reward_mean": sum(scores) / len(scores),
                        "relative_reward_difference": largest_difference([base[step]], [scores]),
                        "versions": " ".join(f"{name}={number}" for name, number in run["versions"].items()),
                    }
                    writer.writerow({**row, **same})


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} x {len(names)}" if names else platform.processor()


def main() -> None:
    args = parse()
    variants = ["trl", "alignprop_fast", *(f"alignprop_fast {budget}" for budget in args.memory_budget)]
    with tempfile.TemporaryDirectory() as folder:
        records = measure(args, variants, Path(folder))
    args.results.mkdir(parents=True, exist_ok=True)
    write_runs(args.results / "compare_trl.csv", args, records)
    rows = summary(records)
    with open(args.results / "compare_trl_summary.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print("\n".join(f"{key:>28}: {value}" for key, value in row.items()), end="\n\n")


if __name__ == "__main__":
    main()
