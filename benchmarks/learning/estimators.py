"""How far the gradient of each truncation rule is from the exact one of the whole chain, and what it costs.

    python -m benchmarks.learning.estimators          measures what the CSV lacks, draws the plot
    python -m benchmarks.learning.estimators --plot   draws the plot again from the CSV

For every rule the adapters' gradient of the reward is drawn many times, on the same prompts and the same noise. The CSV
has a row for each chain, rule and seed (of prompts' noise, adapters and draws):

cosine, norm_ratio    of the expected gradient to that of `full`, with standard errors (jackknife over the draws)
one_draw_cosine       mean cosine of a single draw, which is what one training step sees
noise                 deviation of one draw, relative to the length of the expected gradient
forward, backward     mean number of steps that run per picture, and of those that run backward too; each takes two
                      evaluations of the network if the chain is guided
reward_queries        per picture

A rule without randomness is drawn once, and has no noise. The adapters are those after a few training steps, because
at their start half of them are zero and have no gradient. What a rule costs on a GPU: `benchmarks.learning.rule_costs`.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from math import nan
from pathlib import Path
from statistics import fmean

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from alignprop_fast.cli.demo import SETTINGS as DEMO
from alignprop_fast.generate.sampler import DifferentiableSampler
from alignprop_fast.models.load.pipeline import load_pipeline
from alignprop_fast.models.lora.adapters import add_lora
from alignprop_fast.prompts.rows import load_prompts, spread
from alignprop_fast.report.style import BLUE, GREY, INK, ORANGE, RULE, save_figure
from alignprop_fast.rewards import get_reward
from alignprop_fast.sampling import Truncation, draw_truncation
from benchmarks import RESULTS, ROOT
from benchmarks.learning.chains import RULES, SETTINGS, Setting
from benchmarks.learning.rectified_flow import embeddings_of, rectified
from benchmarks.rows import KeptRows

CHAINS = ("demo-12", "demo-50", "flow-12", "twin-4")
WARM_STEPS = 3  # of training, so that no adapter is zero


class Chain:
    """Gradients of one chain's reward, always of the same pictures."""

    def __init__(self, setting: Setting, reward: str, pictures: int, seed: int) -> None:
        pipe = load_pipeline(setting.model)
        torch.manual_seed(seed)
        self.parameters = add_lora(pipe, DEMO.lora_rank, DEMO.lora_rank)
        self.prompts = [str(prompt) for prompt in spread(load_prompts("demo"), pictures)]
        self.embeddings = embeddings_of(pipe, self.prompts) if setting.flow else None
        pipe = rectified(pipe) if setting.flow else pipe
        self.sampler = DifferentiableSampler(pipe, setting.steps, setting.guidance_scale, eta=0.0)
        self.reward, self.seed = get_reward(reward), seed
        self._warm_up()
        self.full = draw_truncation("full", self.sampler.table)
        self.exact_N = self.gradient(self.full, 0)

    def _warm_up(self) -> None:
        optimizer = torch.optim.AdamW(self.parameters, lr=DEMO.learning_rate)
        for _ in range(WARM_STEPS):
            self._loss("full").backward()
            optimizer.step()
            optimizer.zero_grad()

    def _loss(self, rule: Truncation | str) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        images = self.sampler(self.prompts, generator=generator, truncation=rule, embeddings=self.embeddings)
        return -self._score(images)

    def _score(self, images: Tensor) -> Tensor:
        return self.reward(images, self.prompts, [{}] * len(self.prompts))[0].mean()

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
            images = self.sampler.renoise(
                clean, self.prompts, generator=generator, embeddings=self.embeddings, step=step
            )
            (-self._score(images) / cut.terms).backward()
        return torch.cat([p.grad.flatten().double() for p in self.parameters if p.grad is not None])

    def steps_of(self, cut: Truncation) -> tuple[int, int]:
        """Steps that run forward, and backward, for one picture. Every open step is replayed."""
        forward = len(self.sampler.table) if cut.last_step is None else cut.last_step + 1
        opened = len(cut.gates) + len(cut.renoise_steps)
        return forward + opened, opened

    def row(self, rule: str, draws: int) -> dict[str, float]:
        """The figures of a rule, from so many draws."""
        source = random.Random(self.seed)
        cuts = [draw_truncation(rule, self.sampler.table, source) for _ in range(draws)]
        if len(set(cuts)) == 1 and not cuts[0].renoise_steps:
            cuts = cuts[:1]
        known = {self.full: self.exact_N}
        gradients = [known[cut] if cut in known else self.gradient(cut, draw) for draw, cut in enumerate(cuts)]
        figures = compare(torch.stack(gradients), self.exact_N)
        forward, backward = zip(*map(self.steps_of, cuts), strict=True)
        figures |= {"forward": fmean(forward), "backward": fmean(backward)}
        figures["reward_queries"] = fmean(1 + len(cut.renoise_steps) for cut in cuts)
        return {name: round(value, 4) for name, value in figures.items()} | {"draws": len(cuts)}


def compare(gradients_DN: Tensor, exact_N: Tensor) -> dict[str, float]:
    """Cosine and norm ratio of the expected gradient to the exact one, with standard errors, and the relative noise.

    gradients_DN: one row for each draw, of one or at least three. The squared length of the expected gradient is taken
    over pairs of draws, because that of their mean has the noise in it; NaN if the noise hides it.
    """
    number = len(gradients_DN)
    products_DD, along_D = gradients_DN @ gradients_DN.T, gradients_DN @ exact_N
    length, squared_D = exact_N.norm().item(), products_DD.diagonal()

    def figures(keep: Sequence[int]) -> tuple[float, float]:
        products, count = products_DD[keep][:, keep], len(keep)
        squared = products.sum() - products.diagonal().sum() if count > 1 else products.sum()
        if squared <= 0:  # lost in the noise
            return nan, nan
        norm = (squared.item() / (count * (count - 1) if count > 1 else 1)) ** 0.5
        return along_D[keep].mean().item() / (norm * length), norm / length

    cosine, ratio = figures(range(number))
    one = (along_D / squared_D.sqrt()).mean().item() / length
    found = {"cosine": cosine, "cosine_error": 0.0, "norm_ratio": ratio, "norm_ratio_error": 0.0}
    found |= {"one_draw_cosine": one, "noise": 0.0}
    if number > 1:
        left_out = torch.tensor([figures([i for i in range(number) if i != out]) for out in range(number)])
        errors = ((number - 1) ** 0.5 * left_out.std(0, correction=0)).tolist()
        found |= {"cosine_error": errors[0], "norm_ratio_error": errors[1]}
        found["noise"] = max(squared_D.mean().item() / length**2 - ratio**2, 0.0) ** 0.5 / ratio
    return found


def measure(name: str, rules: Sequence[str], seed: int, args: argparse.Namespace, kept: KeptRows) -> None:
    """Add the rows of one chain and seed that are not there yet."""
    missing = [rule for rule in rules if not kept.has(name, rule, seed)]
    if not missing:
        return
    chain = Chain(SETTINGS[name], args.reward, args.pictures, seed)
    versions = f"torch={version('torch')} diffusers={version('diffusers')}"
    for rule in missing:
        row = {"chain": name, "rule": rule, "seed": seed, **chain.row(rule, args.draws)}
        kept.add([row | {"pictures": args.pictures, "reward": args.reward, "versions": versions}])
        print(row, flush=True)


def plot(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    """For each chain the cosines of every rule: of the expected gradient, and of one draw."""
    chains = list(dict.fromkeys(row["chain"] for row in rows))
    figure = Figure(figsize=(2.2 + 2.4 * len(chains), 4.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(chains), sharey=True, squeeze=False)[0]
    for panel, chain in zip(panels, chains, strict=True):
        _plot_chain(panel, chain, [row for row in rows if row["chain"] == chain])
    panels[0].legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper left")
    figure.supxlabel("cosine to the exact gradient of the whole chain", color=INK, fontsize=9)
    save_figure(figure, path)


def _plot_chain(panel: Axes, chain: str, rows: Sequence[Mapping[str, str]]) -> None:
    names = [rule for rule in RULES if any(row["rule"] == rule for row in rows)]
    for place, rule in enumerate(names):
        mine = [row for row in rows if row["rule"] == rule]
        expected, error, one = (
            fmean(float(row[n]) for row in mine) for n in ("cosine", "cosine_error", "one_draw_cosine")
        )
        labels = ("expected gradient", "one draw") if place == 0 else (None, None)
        panel.errorbar(expected, place, xerr=error, fmt="o", color=BLUE, ms=5, lw=1, label=labels[0])
        panel.plot(one, place, "o", color=ORANGE, mfc="none", ms=5, label=labels[1])
    panel.set_yticks(range(len(names)), names)
    panel.set_ylim(len(names) - 0.5, -0.5)
    panel.set_xlim(min(-0.05, panel.get_xlim()[0]), 1.2)  # beyond 1 lies only noise
    panel.axvline(1, color=RULE, lw=0.8)
    panel.axvline(0, color=RULE, lw=0.8)
    panel.set_title(chain, loc="left", color=INK, fontsize=10)
    panel.grid(axis="y", color=RULE, lw=0.8)
    panel.tick_params(colors=GREY, labelcolor=INK, length=0, labelsize=8)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chains", nargs="+", choices=SETTINGS, default=CHAINS)
    parser.add_argument("--rules", nargs="+", default=RULES)
    parser.add_argument("--draws", type=int, default=16, help="of each random rule, 3 or more")
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--reward", default="clip")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--csv", type=Path, default=RESULTS / "cpu" / "estimators.csv")
    parser.add_argument("--png", type=Path, default=ROOT / "docs" / "pictures" / "estimators.png")
    parser.add_argument("--plot", action="store_true", help="only draw the plot from the CSV")
    args = parser.parse_args()
    torch.set_num_threads(1)
    kept = KeptRows(args.csv, ("chain", "rule", "seed"))
    if not args.plot:
        kept.check(reward=args.reward)
    for seed in () if args.plot else args.seeds:
        for name in args.chains:
            measure(name, args.rules, seed, args, kept)
    plot(kept.read(), args.png)


if __name__ == "__main__":
    main()
