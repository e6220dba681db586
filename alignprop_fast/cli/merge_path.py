"""The command `merge`: pictures along the path between two adapters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from alignprop_fast.prompts.rows import PromptRow, spread

PATH_ROWS = 8


class AdapterPath:
    """Pictures of the same prompts and seeds at places t between two adapters: (1 - t) A + t B.

    names: of the two adapters in the sampler's pipeline. If there are more than 8 prompts, 8 are taken evenly.
    """

    def __init__(
        self, sampler: Any, names: Sequence[str], reward: Any, rows: Sequence[PromptRow], seed: int, steps: int
    ):
        self.sampler, self.names, self.reward, self.rows = sampler, names, reward, spread(rows, PATH_ROWS)
        self.seeds = range(seed, seed + len(self.rows))
        self.places = [i / (steps - 1) for i in range(steps)]
        self.images: dict[float, list[Any]] = {t: [] for t in self.places}
        self.rewards: dict[float, list[float]] = {t: [] for t in self.places}

    def batches(self, batch_size: int, negative_prompt: str | None) -> Iterator[int]:
        """Yields the number of finished pictures after each batch."""
        from alignprop_fast.evaluation.evaluate import draw, score
        from alignprop_fast.models.lora.mix import set_lora_weights
        from alignprop_fast.report.pictures import to_images

        prompts = [row.prompt for row in self.rows]
        for t in self.places:
            weights = dict(zip(self.names, (1 - t, t), strict=True))
            set_lora_weights(self.sampler.model.pipe, {name: weight for name, weight in weights.items() if weight})
            for images_BCHW in draw(self.sampler, prompts, self.seeds, batch_size, negative_prompt):
                done = len(self.images[t])
                self.images[t] += to_images(images_BCHW)
                if self.reward is not None:
                    rows = self.rows[done : done + len(images_BCHW)]
                    self.rewards[t] += score(self.reward, images_BCHW, rows)[0].tolist()
                yield len(images_BCHW)

    def write(self, folder: Path, ends: Sequence[str], reward: str) -> None:
        """Write path.png and, if there is a reward, path.csv."""
        from alignprop_fast.report.evaluation import PathRow, save_comparison, save_table

        rows = []
        for i, row in enumerate(self.rows):
            notes = [f"{self.rewards[t][i]:.3f}" if reward else f"seed {self.seeds[i]}" for t in self.places]
            rows.append((row.prompt, [self.images[t][i] for t in self.places], notes))
        title, columns = f"From {ends[0]} (t = 0) to {ends[1]} (t = 1)", [f"t = {t:.2f}" for t in self.places]
        if reward:
            columns = [
                f"{c}   mean {math.fsum(self.rewards[t]) / len(rows):.3f}"
                for c, t in zip(columns, self.places, strict=True)
            ]
            title += f", {reward}"
            triples = [(t, i) for t in self.places for i in range(len(rows))]
            records = [PathRow(t, self.rows[i].prompt, self.seeds[i], self.rewards[t][i]) for t, i in triples]
            save_table(folder / "path.csv", records)
        save_comparison(folder / "path.png", title, columns, rows)
