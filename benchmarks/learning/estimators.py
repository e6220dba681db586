"""How far the gradient of each truncation rule is from the exact one of the whole chain, and what it costs.

    python -m benchmarks.learning.estimators

For every rule the adapters' gradient of the reward is drawn many times on the same prompts and the same noise. The CSV
has, for each rule and chain:

cosine, norm ratio    of the expected gradient to that of `full`, with standard errors (jackknife over the draws)
noise                 deviation of one draw, relative to the length of the expected gradient
evaluations           of the network per picture, forward and backward, in the mean; reward queries likewise

A rule without randomness is drawn once, and has no noise. The adapters are those after a few training steps, because
at their start half of them are zero and have no gradient.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignprop_fast.cli.demo import SETTINGS
from alignprop_fast.generate.sampler import DifferentiableSampler
from alignprop_fast.models.load.pipeline import load_pipeline
from alignprop_fast.models.lora.adapters import add_lora
from alignprop_fast.prompts.rows import load_prompts, spread
from alignprop_fast.rewards import get_reward
from alignprop_fast.sampling import Truncation, draw_truncation
from benchmarks import RESULTS
from benchmarks.rows import write_rows

RULES = (
    *("full", "uniform", "last:4", "last:1", "lv:2", "drtune", "refl", "discount:0.8", "discount:0.5", "leapalign"),
    *("flowbp-sparse:4", "flowbp-sparse:4:1", "flowbp-bridge:4", "flowbp-lagrange", "srpo"),
)
WARM_STEPS = 5  # of training, so that no adapter is zero


@dataclass(frozen=True)
class Setting:
    """A chain to compare rules on."""

    model: str
    scheduler: str
    steps: int
    guidance_scale: float

    @property
    def name(self) -> str:
        return f"{self.model} {self.scheduler} {self.steps}"


SETTINGS_OF = {
    "demo-12": Setting("demo", "ddim", 12, 3.0),
    "demo-50": Setting("demo", "ddim", 50, 3.0),
    "euler-12": Setting("demo", "euler", 12, 3.0),
}


class Chain:
    """Gradients of one chain's reward, always of the same pictures."""

    def __init__(self, setting: Setting, pictures: int, seed: int) -> None:
        pipe = load_pipeline(setting.model, scheduler=setting.scheduler)
        torch.manual_seed(seed)
        self.parameters = add_lora(pipe, SETTINGS.lora_rank, SETTINGS.lora_rank)
        self.sampler = DifferentiableSampler(pipe, setting.steps, setting.guidance_scale, eta=0.0)
        self.reward = get_reward(SETTINGS.reward)
        self.prompts = [str(prompt) for prompt in spread(load_prompts("demo"), pictures)]
        self.seed = seed
        self._warm_up()

    def _warm_up(self) -> None:
        optimizer = torch.optim.AdamW(self.parameters, lr=SETTINGS.learning_rate)
        for _ in range(WARM_STEPS):
            self._loss("full").backward()
            optimizer.step()
            optimizer.zero_grad()

    def _loss(self, rule: Truncation | str) -> Tensor:
        images = self.sampler(self.prompts, generator=self._generator(), truncation=rule)
        return -self.reward(images, self.prompts, [{}] * len(self.prompts))[0].mean()

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def gradient(self, cut: Truncation, draw: int) -> Tensor:
        """The mean gradient of the losses under this truncation, flat, fp64. draw: seeds the noise of renoisings."""
        for parameter in self.parameters:
            parameter.grad = None
        loss = self._loss(cut)
        if cut.gates:
            (loss / cut.terms).backward()
        clean, generator = self.sampler.latents, torch.Generator().manual_seed(1_000_003 * self.seed + draw)
        assert clean is not None
        for step in cut.renoise_steps:
            images = self.sampler.renoise(clean, self.prompts, None, generator, step=step)
            scores = self.reward(images, self.prompts, [{}] * len(self.prompts))[0]
            (-scores.mean() / cut.terms).backward()
        return torch.cat([p.grad.flatten().double() for p in self.parameters if p.grad is not None])

    def evaluations(self, cut: Truncation) -> tuple[int, int]:
        """Evaluations of the network, forward and backward, of one picture. Every open step is replayed."""
        forward = len(self.sampler.table) if cut.last_step is None else cut.last_step + 1
        opened = len(cut.gates) + len(cut.renoise_steps)
        return forward + opened, opened


def compare(gradients_DN: Tensor, exact_N: Tensor) -> dict[str, float]:
    """Cosine and norm ratio of the expected gradient to the exact one, with standard errors, and the relative noise.

    gradients_DN: one row for each draw. The squared length of the expected gradient is taken over pairs of draws,
    because that of their mean has the noise in it.
    """
    number = len(gradients_DN)
    products_DD, along_D = gradients_DN @ gradients_DN.T, gradients_DN @ exact_N
    length = exact_N.norm().item()

    def figures(keep: Sequence[int]) -> tuple[float, float]:
        products, count = products_DD[keep][:, keep], len(keep)
        squared = products.sum() - products.diagonal().sum() if count > 1 else products.sum()
        norm = max(squared.item() / (count * (count - 1) if count > 1 else 1), 1e-300) ** 0.5
        return along_D[keep].mean().item() / (norm * length), norm / length

    cosine, ratio = figures(range(number))
    found = {"cosine": cosine, "norm_ratio": ratio, "cosine_error": 0.0, "norm_ratio_error": 0.0, "noise": 0.0}
    if number > 2:
        left_out = torch.tensor([figures([i for i in range(number) if i != out]) for out in range(number)])
        errors = ((number - 1) ** 0.5 * left_out.std(0, correction=0)).tolist()
        spread_squared = (products_DD.diagonal().mean().item() / length**2 - ratio**2) * number / (number - 1)
        found |= {"cosine_error": errors[0], "norm_ratio_error": errors[1]}
        found["noise"] = max(spread_squared, 0.0) ** 0.5 / ratio
    return found


def rows_of(setting: Setting, rules: Sequence[str], draws: int, pictures: int, seed: int) -> list[dict[str, Any]]:
    chain, rows = Chain(setting, pictures, seed), []
    exact_N = chain.gradient(draw_truncation("full", chain.sampler.table), 0)
    for rule in rules:
        source = random.Random(seed)
        cuts = [draw_truncation(rule, chain.sampler.table, source) for _ in range(draws)]
        if len(set(cuts)) == 1 and not cuts[0].renoise_steps:
            cuts = cuts[:1]
        gradients_DN = torch.stack([chain.gradient(cut, draw) for draw, cut in enumerate(cuts)])
        evaluations = torch.tensor([chain.evaluations(cut) for cut in cuts], dtype=torch.float64).mean(0).tolist()
        figures = {name: round(value, 4) for name, value in compare(gradients_DN, exact_N).items()}
        queries = sum(1 + len(cut.renoise_steps) for cut in cuts) / len(cuts)
        row = {"chain": setting.name, "rule": rule, **figures, "forward": evaluations[0], "backward": evaluations[1]}
        rows.append(row | {"reward_queries": queries, "draws": len(cuts), "pictures": pictures, "seed": seed})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS_OF, default=tuple(SETTINGS_OF))
    parser.add_argument("--rules", nargs="+", default=RULES)
    parser.add_argument("--draws", type=int, default=24, help="of each random rule")
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, default=RESULTS / "cpu" / "estimators.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = [rows_of(SETTINGS_OF[name], args.rules, args.draws, args.pictures, args.seed) for name in args.settings]
    versions = f"torch={version('torch')} diffusers={version('diffusers')}"
    write_rows(args.csv, [row | {"versions": versions} for rows in found for row in rows])


if __name__ == "__main__":
    main()
