"""One training run of sample_efficiency.py, in its own process and environment.

`--method` is `ddpo` (trl 0.23.1's DDPOTrainer, in trl's environment) or a truncation rule of this package, such as
`uniform` or `last:1`. Model, adapters, reward, prompts, sampling and evaluation are the same for all. `--output` gets
one line of JSON per evaluation. The state of the run is saved beside it, and a run that was cut off continues from it.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import deque
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from alignprop_fast.demo import model_path
from alignprop_fast.prompts.rows import load_prompts
from alignprop_fast.rewards import get_reward

PROMPTS = 8  # from each of the bundled prompt sets, at even distances
# Pictures of every evaluation, with other seeds than training: column, prompt set, pictures per prompt.
JUDGED = (("reward", "demo", 4), ("heldout_reward", "demo-heldout", 2))
SAMPLING = {"num_inference_steps": 12, "guidance_scale": 2.0, "eta": 1.0}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--evaluate-at", type=int, nargs="+", required=True, help="queries; the last ends the run")
    parser.add_argument("--reward", required=True)
    parser.add_argument("--inner-epochs", type=int, default=1, help="of ddpo")
    parser.add_argument("--update-pictures", type=int, default=32, help="per optimizer step of ddpo: 16, 32 or 64")
    parser.add_argument("--clip-range", type=float, default=1e-4, help="of ddpo")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def chosen(name: str) -> list[str]:
    prompts = load_prompts(name)
    return [prompts[i * len(prompts) // PROMPTS] for i in range(PROMPTS)]


def alignprop_trainer(args: argparse.Namespace, reward_fn: Any, prompt_fn: Any) -> Any:
    """Four pictures per optimizer step, as in `alignprop-fast demo`."""
    from alignprop_fast import AlignPropConfig, AlignPropTrainer, DefaultDDPOStableDiffusionPipeline

    config = AlignPropConfig(
        truncation=args.method,
        train_batch_size=4,
        memory_budget="2GiB",  # enough to run no step twice; trl's trainer does not checkpoint either
        **common_options(args),
    )
    return AlignPropTrainer(config, reward_fn, prompt_fn, DefaultDDPOStableDiffusionPipeline(str(model_path())))


def ddpo_trainer(args: argparse.Namespace, reward_fn: Any, prompt_fn: Any) -> Any:
    """64 pictures per epoch, on average eight per prompt; advantages per prompt, as in trl's example."""
    from accelerate import PartialState

    PartialState()  # trl's logger fails before accelerate has been initialised
    from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

    config = DDPOConfig(
        sample_batch_size=16,
        sample_num_batches_per_epoch=4,
        train_batch_size=16,
        train_gradient_accumulation_steps=args.update_pictures // 16,
        train_num_inner_epochs=args.inner_epochs,
        train_clip_range=args.clip_range,
        train_adv_clip_max=5.0,
        per_prompt_stat_tracking=True,
        per_prompt_stat_tracking_buffer_size=32,
        per_prompt_stat_tracking_min_count=16,
        **common_options(args),
    )
    return DDPOTrainer(config, reward_fn, prompt_fn, DefaultDDPOStableDiffusionPipeline(str(model_path())))


def common_options(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "seed": args.seed,
        "mixed_precision": "no",
        "save_freq": 10**9,
        "log_with": None,
        "logdir": str(args.output) + ".logs",
        "sample_num_steps": SAMPLING["num_inference_steps"],
        "sample_guidance_scale": SAMPLING["guidance_scale"],
        "sample_eta": SAMPLING["eta"],
        "train_learning_rate": args.learning_rate,
    }


class Run:
    """A trainer that is evaluated from time to time, and counts of its reward queries and seconds."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.reward = args, get_reward(args.reward)
        prompts = chosen("demo")
        self.queries, self.epoch, self.wall_seconds, self.cpu_seconds = 0, 0, 0.0, 0.0
        self.rows: list[dict[str, Any]] = []
        make = ddpo_trainer if args.method == "ddpo" else alignprop_trainer
        self.trainer = make(args, self.score, lambda: (random.choice(prompts), {}))
        self.state_path = args.output.with_suffix(".pt")

    def score(self, images_BCHW: torch.Tensor, prompts: Any, metadata: Any) -> Any:
        if images_BCHW.detach().any():  # black pictures only measure the reward's cost, once
            self.queries += len(images_BCHW)
        return self.reward(images_BCHW, prompts, metadata)

    def train(self) -> None:
        """Train until the budget of queries is spent. The time is that of the trainer's steps, without evaluation."""
        if self.state_path.exists():
            self.restore()
        else:
            self.judge()
        for due in self.args.evaluate_at:
            if self.queries >= due:
                continue
            wall, cpu = time.perf_counter(), time.process_time()
            while self.queries < due:
                self.trainer.step(self.epoch, self.epoch)
                self.epoch += 1
            self.wall_seconds += time.perf_counter() - wall
            self.cpu_seconds += time.process_time() - cpu
            self.judge()

    @torch.no_grad()
    def judge(self) -> None:
        """Add a row with the mean rewards of the fixed pictures, and save it with the state to continue from."""
        pipe = self.trainer.sd_pipeline.sd_pipeline
        pipe.set_progress_bar_config(disable=True)
        pipe.unet.eval()
        row: dict[str, Any] = {"queries": self.queries, "epoch": self.epoch}
        row |= {"wall_seconds": round(self.wall_seconds, 2), "cpu_seconds": round(self.cpu_seconds, 2)}
        for name, prompt_set, pictures in JUDGED:
            prompts, scores = chosen(prompt_set), []
            for picture in range(pictures):
                seeds = [10_000 + picture * PROMPTS + i for i in range(PROMPTS)]
                generators = [torch.Generator().manual_seed(seed) for seed in seeds]
                images = pipe(prompts, generator=generators, output_type="pt", **SAMPLING).images
                scores += self.reward(images, prompts, [{} for _ in prompts])[0].tolist()
            row[name] = sum(scores) / len(scores)
        packages = ("torch", "diffusers", "trl" if self.args.method == "ddpo" else "alignprop_fast")
        row["versions"] = " ".join(f"{name}={import_module(name).__version__}" for name in packages)
        self.rows.append(row)
        self.save()
        print(json.dumps(row), flush=True)

    def save(self) -> None:
        trackers = getattr(self.trainer, "stat_tracker", None)
        state = {
            "rows": self.rows,
            "counts": (self.queries, self.epoch, self.wall_seconds, self.cpu_seconds),
            "adapters": [parameter.data for parameter in self.trainer.trainable_layers],
            "optimizer": self.trainer.optimizer.state_dict(),
            "random": (random.getstate(), torch.get_rng_state()),
            "tracker": {str(key): [float(v) for v in values] for key, values in trackers.stats.items()}
            if trackers
            else {},
        }
        partial = self.state_path.with_suffix(".part")
        torch.save(state, partial)
        partial.replace(self.state_path)
        self.args.output.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")

    def restore(self) -> None:
        state = torch.load(self.state_path, weights_only=True)
        self.rows = state["rows"]
        self.queries, self.epoch, self.wall_seconds, self.cpu_seconds = state["counts"]
        for parameter, saved in zip(self.trainer.trainable_layers, state["adapters"], strict=True):
            parameter.data.copy_(saved)
        self.trainer.optimizer.load_state_dict(state["optimizer"])
        random.setstate(state["random"][0])
        torch.set_rng_state(state["random"][1])
        for key, values in state["tracker"].items():
            self.trainer.stat_tracker.stats[key] = deque(values, self.trainer.stat_tracker.buffer_size)


if __name__ == "__main__":
    torch.set_num_threads(1)
    Run(parse()).train()
