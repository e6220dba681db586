"""The counts of an estimate: those of a model and of a reward, kept by an earlier question or counted now."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from alignprop_fast.cli.kept_counts import OF_DECODER, Part, batches
from alignprop_fast.cli.parts import open_rewards, open_sampler
from alignprop_fast.cli.plan_options import PlanOptions
from alignprop_fast.cli.screen import Waiting
from alignprop_fast.cli.support import quiet_libraries
from alignprop_fast.planner import CountedReward, CountedTable, Gpu
from alignprop_fast.prompts.rows import load_rows

if TYPE_CHECKING:
    from alignprop_fast.cli.parts import Rewards
    from alignprop_fast.generate.sampler import DifferentiableSampler
    from alignprop_fast.training.config import AlignPropConfig


class Counting:
    """Counts operators on tensors without data, where no earlier question has.

    Args:
        options: with all defaults resolved.
        config: what the trainer makes of them.
        gpu: decides which products are rounded under `--sampling-precision`.
    """

    def __init__(self, console: Console, options: PlanOptions, config: AlignPropConfig, gpu: Gpu):
        self.console, self.options, self.config, self.gpu = console, _without_own_size(options), config, gpu

    def tables(self) -> dict[int, CountedTable]:
        """The counts of a training step at two batch sizes.

        Raises:
            ValueError, OSError: bad input, one line each.
        """
        sizes = batches(self.options.batch_size)
        parts = [Part.model(self.options, batch) for batch in sizes]
        models = dict(zip(sizes, self._found(parts, self.count_model, self._model_is_known), strict=True))
        height, width = (int(models[sizes[0]].costs.origin[side]) for side in ("height", "width"))
        parts = [Part.reward(self.options, batch, (height, width)) for batch in sizes]
        rewards = self._found(parts, self.count_reward, self._reward_is_known)
        return {batch: models[batch].scored_by(reward) for batch, reward in zip(sizes, rewards, strict=True)}

    def _found(self, parts: list[Part], count: Callable[..., Any], is_known: Callable[[], bool]) -> list[Any]:
        """The counts of each part. count: (part, a function that is told the share done) -> its counts."""
        found = [part.read() for part in parts]
        missing = [index for index, counted in enumerate(found) if counted is None]
        if not missing:
            return found
        with _estimating():
            quiet_libraries(self.console)
            with Waiting(self.console, "counting operators", len(missing)) as waiting:
                for index in missing:
                    found[index] = count(parts[index], waiting.next_part())
                    if is_known():
                        parts[index].keep(found[index])
        return found

    def count_model(self, part: Part, told: Callable[[float], None] = lambda done: None) -> CountedTable:
        """The denoising steps and the decoder of these options, at the part's batch size."""
        if Part.reward(self.options, part.batch, self._sampler.size).read() is None:
            _ = self._rewards  # if they are wrong, say so before the long work
        return self._sampler.counted_table(part.batch, self.gpu, self.options.negative_prompt, told)

    def count_reward(self, part: Part, told: Callable[[float], None] = lambda done: None) -> CountedReward:
        """Scoring pictures of the part's size with the reward of these options."""
        import torch

        from alignprop_fast.generate.cost_table import counted_scoring
        from alignprop_fast.rewards.reward import as_reward

        row, reward = load_rows(self.options.prompts)[0], as_reward(self._rewards.trained)
        images = torch.zeros(part.batch, 3, *part.options["size"], device="meta")
        stages = counted_scoring(reward, images, [row.prompt] * part.batch, [dict(row.metadata)] * part.batch)
        return CountedReward(stages, reward.weight_bytes() + self._rewards.watched_bytes)

    @cached_property
    def _sampler(self) -> DifferentiableSampler:
        sampler = open_sampler(self.options, self.config, "meta", None)
        plain = Part.model(_plain(self.options), 1)
        if Part.model(self.options, 1) != plain and (known := plain.read()) is not None:
            sampler.one_image = known.costs.decoders
        return sampler

    @cached_property
    def _rewards(self) -> Rewards:
        return open_rewards(self.options, "meta")

    def _model_is_known(self) -> bool:
        """Whether this package and local files determine its counts: no model of the Hub."""
        from alignprop_fast.models.architectures import NAMES

        model = self.options.model
        return model in (*NAMES, "demo") or Path(model).expanduser().exists()

    def _reward_is_known(self) -> bool:
        """Whether this package and local files determine its counts: no function of the user."""
        from alignprop_fast.rewards.registry import parsed_spec
        from alignprop_fast.rewards.user_function import is_function_name

        specs = [spec for spec in (self.options.reward, self.options.watch_reward) if spec]
        names = [name for spec in specs for name, _ in parsed_spec(spec, [])[0]]
        models = (*self.options.reward_model, *self.options.watch_reward_model)
        return not any(map(is_function_name, (*names, *models, *(model.partition("=")[2] for model in models))))


def _plain(options: PlanOptions) -> PlanOptions:
    """These options where they decide what decoding costs; the others have their defaults."""
    plain = PlanOptions(**{name: getattr(options, name) for name in OF_DECODER})
    return replace(plain, lora_alpha=float(plain.lora_rank))


def _without_own_size(options: PlanOptions) -> PlanOptions:
    """The options without a picture size that is the model's own, so that its counts are found."""
    own = replace(options, height=None, width=None)
    known = None if options == own else Part.model(_plain(own), 1).read()
    if known is None:
        return options
    sizes = ((getattr(options, side), int(known.costs.origin[side])) for side in ("height", "width"))
    return own if all(given in (None, usual) for given, usual in sizes) else options


@contextmanager
def _estimating() -> Iterator[None]:
    """Inside, an estimate does without what serves others and costs it seconds.

    - The compiler: libraries (bitsandbytes) load it to compile functions when they are imported. It takes longer to
      load than everything else, and an estimate compiles nothing.
    - Threads: counting has no data to share among them, and on a busy machine they would wait for each other.
    - The garbage collector: it would look through all objects of the libraries and the model ten times. What an
      estimate drops is freed without it.
    """
    name = "TORCHDYNAMO_DISABLE"
    added, collects = name not in os.environ, gc.isenabled()
    os.environ.setdefault(name, "1")
    gc.disable()
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if collects:
            gc.enable()
        if added:
            del os.environ[name]
