"""The files that a run writes as it goes: a line per step, the sample pictures with watched scores, the curves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from alignprop_fast.report.curves import plot_rewards
from alignprop_fast.report.json_lines import JsonLines
from alignprop_fast.report.pictures import Pictures, save_grid, save_image
from alignprop_fast.report.tracking import log_picture

if TYPE_CHECKING:
    from alignprop_fast.evaluation.watch import Watched
    from alignprop_fast.training.metrics import StepMetrics


class Records:
    """metrics.jsonl, samples/ and reward.png in the folder of a run; nothing is written before `begin`.

    title: the reward of the run, for the titles of the picture grids.
    """

    def __init__(self, folder: Path, title: str):
        self.folder, self.title = folder, title
        self.metrics, self.samples = (
            JsonLines(folder / "metrics.jsonl"),
            JsonLines(folder / "samples" / "samples.jsonl"),
        )

    def begin(self, step: int) -> None:
        """Drop entries after `step`, because a resumed run writes them again."""
        (self.folder / "samples").mkdir(exist_ok=True)
        self.metrics.keep_until(step)
        self.samples.keep_until(step if step else -1)

    def add_step(self, metrics: StepMetrics) -> None:
        self.metrics.append(metrics.to_dict())

    def add_samples(self, step: int, pictures: Pictures, watched: Watched | None, accelerator: Any) -> None:
        """Write the pictures singly and as a grid, their line in samples.jsonl and the curves; also to the trackers."""
        folder = self.folder / "samples" / f"step_{step:04d}"
        folder.mkdir(exist_ok=True)
        for i, image in enumerate(pictures.images):
            save_image(image, folder / f"{i:02d}.png")
        grid = folder.with_suffix(".png")
        save_grid(grid, pictures, f"Step {step}   mean reward {pictures.mean_reward:.3f}   ({self.title})")
        columns = {"prompts": pictures.prompts, "seeds": pictures.seeds, "rewards": pictures.rewards}
        means = {"reward_mean": pictures.mean_reward, "reward_parts": pictures.mean_parts}
        watch = {} if watched is None else {"watch": watched.to_dict()}
        self.samples.append({"step": step, **means, **watch, **columns})
        self.plot()
        accelerator.log({"samples/reward": pictures.mean_reward, **(watched.to_log() if watched else {})}, step=step)
        with Image.open(grid) as picture:
            log_picture(accelerator.trackers, "samples", picture.convert("RGB"), step)

    def first_pictures(self) -> Pictures:
        """The pictures of step 0 of the resumed run.

        Raises:
            ValueError: they are missing.
        """
        try:
            record = next(record for record in self.samples.read() if record["step"] == 0)
            files = [self.folder / "samples" / "step_0000" / f"{i:02d}.png" for i in range(len(record["prompts"]))]
            images = tuple(Image.open(file).convert("RGB") for file in files)
            rewards = tuple(float("nan") if reward is None else reward for reward in record["rewards"])
            texts, seeds = tuple(record["prompts"]), tuple(record["seeds"])
            return Pictures(images, texts, seeds, rewards, record["reward_parts"])
        except (StopIteration, KeyError, OSError) as error:
            raise ValueError(
                f"{self.folder / 'samples'} lacks the pictures of step 0: copy the folder again, or start a new run"
            ) from error

    def plot(self) -> None:
        plot_rewards(self.folder / "reward.png", self.metrics.read(), self.samples.read())
