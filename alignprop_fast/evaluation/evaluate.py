"""Compares adapters with the base model on fixed prompts and seeds: draws pictures, scores them, sums up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from alignprop_fast.generate.sampler import DifferentiableSampler
from alignprop_fast.prompts.rows import PromptRow
from alignprop_fast.rewards.diversity import mean_pairwise_distance

REWARD, DIVERSITY = "reward", "diversity"  # names of parts, beside those of the reward's own parts


@dataclass(frozen=True)
class Task:
    """A picture to draw: number `number` of its prompt. metadata: the other fields of the prompt's row."""

    prompt_set: str
    prompt: str
    number: int
    seed: int
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Variant:
    """An adapter at a scale: W + scale * (alpha / rank) B A."""

    adapter: str
    scale: float

    def __str__(self) -> str:
        return self.adapter if self == BASE else f"{self.adapter} \u00d7 {self.scale:g}"


BASE = Variant("base", 0.0)


@dataclass(frozen=True)
class Score:
    """One value of one picture: a row of evaluation.csv. part: "reward", or a part of it (unweighted)."""

    prompt_set: str
    prompt: str
    number: int
    seed: int
    adapter: str
    scale: float
    part: str
    value: float


@dataclass(frozen=True)
class Summary:
    """A row of summary.csv: statistics of one part under one variant, over one set of prompts.

    count: number of pictures; for the diversity, of prompts.
    standard_error: of the mean, standard deviation / sqrt(count); NaN for a single value.
    change, change_standard_error: of the differences to the base model with the same prompt and seed.
    gained_share: share of the values that are above the base model's.
    """

    prompt_set: str
    adapter: str
    scale: float
    part: str
    count: int
    mean: float
    standard_error: float
    change: float
    change_standard_error: float
    gained_share: float


def tasks_of(prompt_set: str, rows: Sequence[PromptRow], images_per_prompt: int, seed: int) -> list[Task]:
    """Every prompt images_per_prompt times. Picture i has seed + i, as in `sample`."""
    numbered = [(row, number) for row in rows for number in range(images_per_prompt)]
    return [Task(prompt_set, row.prompt, n, seed + i, row.metadata) for i, (row, n) in enumerate(numbered)]


def draw(
    sampler: DifferentiableSampler,
    prompts: Sequence[str],
    seeds: Sequence[int],
    batch_size: int,
    negative_prompt: str | None = None,
) -> Iterator[Tensor]:
    """Batches of pictures [B, 3, H, W] in [0, 1], without gradient.

    Each picture has its own generator, so that it does not depend on the batch size (except for rounding).
    """
    for start in range(0, len(prompts), batch_size):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch_size]]
        with torch.no_grad():  # a yield in here would switch gradients off for the caller
            images = sampler(list(prompts[start : start + batch_size]), negative_prompt, generators, grad_steps=())
        yield images


def score(
    reward: Callable[..., tuple[Tensor, Mapping[str, Any]]], images_BCHW: Tensor, rows: Sequence[PromptRow | Task]
) -> tuple[Tensor, Mapping[str, Any]]:
    """The reward of the rows' pictures, without gradient: scores [B] and info."""
    with torch.no_grad():
        return reward(images_BCHW, [row.prompt for row in rows], [dict(row.metadata) for row in rows])


class Evaluation:
    """Scores pictures batch by batch, and keeps numbers and embeddings for the summaries, but no pictures.

    Args:
        reward: (images, prompts, metadata) -> (scores [B], {part: scores [B]}).
        parts: the entries of that dictionary to report; empty if the reward has only one part.
        embed: images -> normalised embeddings [B, E], for the diversity; None: no diversity.
    """

    def __init__(
        self,
        reward: Callable[..., tuple[Tensor, Mapping[str, Any]]],
        parts: Sequence[str] = (),
        embed: Callable[[Tensor], Tensor] | None = None,
    ):
        self.reward, self.parts, self.embed = reward, tuple(parts), embed
        self.scores: list[Score] = []
        self._embeddings: dict[tuple[Variant, str, str], list[Tensor]] = {}

    def add(self, variant: Variant, tasks: Sequence[Task], images_BCHW: Tensor) -> list[float]:
        """Score a batch; returns the rewards."""
        scores_B, info = score(self.reward, images_BCHW, tasks)
        with torch.no_grad():
            embeddings_BE = None if self.embed is None else self.embed(images_BCHW).cpu()
        values = {REWARD: scores_B.tolist(), **{part: info[part].tolist() for part in self.parts}}
        for i, task in enumerate(tasks):
            where = (task.prompt_set, task.prompt, task.number, task.seed, variant.adapter, variant.scale)
            self.scores += [Score(*where, part, column[i]) for part, column in values.items()]
            if embeddings_BE is not None:
                self._embeddings.setdefault((variant, task.prompt_set, task.prompt), []).append(embeddings_BE[i])
        return values[REWARD]

    def summaries(self) -> list[Summary]:
        """One row for each prompt set, part (and the diversity) and variant; variants to compare are neighbours."""
        groups: dict[tuple[str, Variant, str], dict[Any, float]] = {}
        for score in self.scores:
            key = (score.prompt_set, Variant(score.adapter, score.scale), score.part)
            groups.setdefault(key, {})[score.seed] = score.value  # seeds are unique in a set, even if prompts repeat
        for (variant, prompt_set, prompt), embeddings in self._embeddings.items():
            distance = mean_pairwise_distance(torch.stack(embeddings))
            groups.setdefault((prompt_set, variant, DIVERSITY), {})[prompt] = distance
        sets, parts = ({name: i for i, name in enumerate(dict.fromkeys(key[j] for key in groups))} for j in (0, 2))
        ordered = sorted(groups, key=lambda key: (sets[key[0]], parts[key[2]]))  # stable: variants keep their order
        return [_summary(key, groups[key], groups[key[0], BASE, key[2]]) for key in ordered]


def _summary(key: tuple[str, Variant, str], values: Mapping[Any, float], base: Mapping[Any, float]) -> Summary:
    prompt_set, variant, part = key
    changes = [value - base[name] for name, value in values.items()]
    return Summary(
        prompt_set,
        variant.adapter,
        variant.scale,
        part,
        len(values),
        fmean(values.values()),
        _standard_error(list(values.values())),
        fmean(changes),
        _standard_error(changes),
        sum(change > 0 for change in changes) / len(changes),
    )


def _standard_error(values: Sequence[float]) -> float:
    # statistics.stdev fails on values that are not finite.
    whole = len(values) > 1 and all(map(math.isfinite, values))
    return stdev(values) / math.sqrt(len(values)) if whole else math.nan
