"""One training run of compare_trl.py, in its own process and environment.

This is a typical script for trl 0.23.1. `--library` only decides the import line. It writes rewards, times and memory
of every optimizer step to a JSON file.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import time
import weakref
from importlib.metadata import version

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PROMPTS = ("the red cat", "a dog", "the cat and the dog", "red", "a red dog and the cat")


class LiveBytes(TorchDispatchMode):
    """Counts the live bytes of storages that operators allocate. It slows everything down."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self._known: dict[int, object] = {}

    def _free(self, key: int, size_bytes: int) -> None:
        del self._known[key]
        self.live_bytes -= size_bytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if not isinstance(leaf, torch.Tensor):
                continue
            storage = leaf.untyped_storage()
            key, size_bytes = id(storage), storage.nbytes()
            if key not in self._known and key not in before:
                self._known[key] = weakref.finalize(storage, self._free, key, size_bytes)
                self.live_bytes += size_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return out


def status_bytes(field: str) -> int:
    """A field of /proc/self/status given in kB: VmRSS, VmHWM."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def reset_peak() -> None:
    """Reset VmHWM to the current resident set."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def reward(images_BCHW, prompts, metadata):
    """Minus the squared distance to a diagonal ramp: smooth, and different for every pixel."""
    height, width = images_BCHW.shape[-2:]
    ramp_HW = torch.linspace(0, 1, height)[:, None] * torch.linspace(0, 1, width)[None, :]
    return -((images_BCHW - ramp_HW) ** 2).mean(dim=(1, 2, 3)), {}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", choices=("trl", "alignprop_fast"), required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--optimizer-steps", type=int, required=True)
    parser.add_argument("--num-inference-steps", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--eta", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--memory-budget", help="for alignprop_fast alone")
    parser.add_argument("--count-tensor-bytes", action="store_true", help="exact live bytes; times are then invalid")
    return parser.parse_args()


def make_trainer(args: argparse.Namespace):
    if args.library == "trl":
        from accelerate import PartialState

        PartialState()  # trl's logger fails before accelerate has been initialised
        from trl import AlignPropConfig, AlignPropTrainer, DefaultDDPOStableDiffusionPipeline
    else:
        from alignprop_fast import AlignPropConfig, AlignPropTrainer, DefaultDDPOStableDiffusionPipeline

    ours = {"memory_budget": args.memory_budget} if args.memory_budget else {}
    config = AlignPropConfig(
        seed=args.seed,
        mixed_precision="no",
        save_freq=10**9,
        sample_num_steps=args.num_inference_steps,
        sample_eta=args.eta,
        train_batch_size=args.batch_size,
        truncated_rand_backprop_minmax=(0, args.num_inference_steps),
        log_with=None,
        logdir=args.output + ".logs",
        **ours,
    )
    pipeline = DefaultDDPOStableDiffusionPipeline(args.model, use_lora=True)
    return AlignPropTrainer(config, reward, lambda: (random.choice(PROMPTS), {}), pipeline)


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    trainer = make_trainer(args)
    rewards: list[list[float]] = []
    score = trainer.reward_fn

    def recorded(images, prompts, metadata):
        scores, info = score(images, prompts, metadata)
        rewards.append(scores.detach().double().tolist())
        return scores, info

    trainer.reward_fn = recorded
    meter = LiveBytes() if args.count_tensor_bytes else None
    before_bytes = status_bytes("VmRSS")
    reset_peak()
    wall_seconds, cpu_seconds = [], []
    for step in range(args.optimizer_steps):
        wall, cpu = time.perf_counter(), time.process_time()
        if meter is None:
            trainer.step(step, step)
        else:
            with meter:
                trainer.step(step, step)
        wall_seconds.append(time.perf_counter() - wall)
        cpu_seconds.append(time.process_time() - cpu)
    record = {
        "rewards": rewards,
        "wall_seconds": wall_seconds,
        "cpu_seconds": cpu_seconds,
        "before_bytes": before_bytes,
        "added_peak_bytes": status_bytes("VmHWM") - before_bytes,
        "added_tensor_bytes": meter.peak_bytes if meter else None,
        "page_faults": resource.getrusage(resource.RUSAGE_SELF).ru_minflt,
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "peft", "accelerate")},
    }
    with open(args.output, "w", encoding="utf-8") as file:
        json.dump(record, file)


if __name__ == "__main__":
    main()
