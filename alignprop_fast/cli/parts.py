"""Makes the parts of a run from its options. `train` runs them; `plan` counts them, on the meta device without data."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from alignprop_fast.prompts.rows import PROMPT_SETS, PromptRow, load_rows, spread
from alignprop_fast.training.declaration import flag
from alignprop_fast.training.options import TrainOptions

if TYPE_CHECKING:
    from alignprop_fast.evaluation.early_stopping import EarlyStopping
    from alignprop_fast.evaluation.watch import Watch
    from alignprop_fast.generate.sampler import DifferentiableSampler
    from alignprop_fast.models.ddpo_pipeline import DefaultDDPOStableDiffusionPipeline
    from alignprop_fast.rewards.mixture import WeightedSum
    from alignprop_fast.rewards.normalise import NormalisedSum
    from alignprop_fast.training.config import AlignPropConfig

logger = logging.getLogger(__name__)

T = TypeVar("T", bound=TrainOptions)
_WATCH_SEED = 1_000_000  # larger than the seeds of the sample pictures


@dataclass(frozen=True)
class Rewards:
    """The rewards that score the pictures of a run.

    reward: the one to train on. normalised: the same with its parts normalised, if asked for. watch: the watched one.
    """

    reward: WeightedSum
    normalised: NormalisedSum | None
    watch: Watch | None

    @property
    def trained(self) -> WeightedSum:
        """The reward that gives the gradient."""
        return self.normalised or self.reward

    @property
    def watched_bytes(self) -> int:
        """Bytes of the watched reward's weights, beside those of the trained one."""
        return 0 if self.watch is None else self.watch.weight_bytes(self.reward)


def resolved(options: T, precision: str) -> T:
    """The options with `auto` and None replaced by what they stand for, as far as the trainer's config needs it."""
    alpha = float(options.lora_rank if options.lora_alpha is None else options.lora_alpha)
    return replace(options, mixed_precision=precision, lora_alpha=alpha, **sampling_of(options)._asdict())


class Sampling(NamedTuple):
    """Options of that name, as a run uses them."""

    num_inference_steps: int
    guidance_scale: float
    true_cfg_scale: float


def sampling_of(options: TrainOptions) -> Sampling:
    """The number of denoising steps and the scales of guidance: those given, or those that the model was made for.

    Raises:
        OSError: a Hub model cannot be reached.
    """
    from alignprop_fast.models.load.made_for import made_for

    own = made_for(options.model, options.model_config)
    scale = own.guidance_scale if options.guidance_scale is None else options.guidance_scale
    true_scale = own.true_cfg_scale if options.true_cfg_scale is None else options.true_cfg_scale
    if own.is_distilled and scale > own.guidance_scale:
        logger.warning("%s is distilled to draw without guidance: leave --guidance-scale out", options.model)
    if own.true_cfg_scale > 1 and scale != own.guidance_scale:
        logger.warning(
            "%s is guided by --true-cfg-scale and --negative-prompt: leave --guidance-scale out", options.model
        )
    if true_scale > 1 and options.negative_prompt is None:
        logger.warning(
            "%s draws without guidance: add --negative-prompt ' ' to guide it, or --true-cfg-scale 1 if you want none",
            options.model,
        )
    return Sampling(options.num_inference_steps or own.steps, scale, true_scale)


def open_rewards(options: TrainOptions, device: str) -> Rewards:
    """The rewards on the device. On the meta device no published weights are needed.

    Raises:
        ValueError, OSError: the reward is unknown, weights cannot be loaded, or there is nothing to watch.
    """
    from alignprop_fast.rewards.normalise import NormalisedSum
    from alignprop_fast.rewards.relative import relative_to

    reward = _reward(options.reward, options.reward_model, options, device)
    if options.reward_words is not None:
        reward = relative_to(reward, options.reward_words)
    normalised = NormalisedSum(reward.parts) if options.normalise_rewards else None
    return Rewards(reward, normalised, _watch(options, reward, device))


def open_model(options: TrainOptions, device: str) -> DefaultDDPOStableDiffusionPipeline:
    """The pipeline with its weights on the CPU, or without data on the meta device.

    Raises:
        ValueError, OSError: the model cannot be loaded.
    """
    import torch

    from alignprop_fast.models.ddpo_pipeline import DefaultDDPOStableDiffusionPipeline

    return DefaultDDPOStableDiffusionPipeline(
        options.model,
        scheduler=options.scheduler,
        model_config=options.model_config,
        allow_pickle=options.allow_pickle,
        # With fp16 a VAE may have to stay in fp32, so it must be loaded in fp32.
        dtype=torch.bfloat16 if options.mixed_precision == "bf16" else torch.float32,
        outline=device == "meta",
    )


def open_sampler(
    options: TrainOptions, config: AlignPropConfig, device: str, rewards: Rewards | None
) -> DifferentiableSampler:
    """The sampler that training makes from these options, to measure it or to count what it runs. rewards: None: it
    scores nothing.

    Raises:
        ValueError, OSError: the model cannot be loaded, or is an architecture without weights on a real device.
    """
    import torch

    from alignprop_fast.models.architectures import NAMES
    from alignprop_fast.training.prepare import make_sampler, prepare_model

    if options.model in NAMES and device != "meta":
        raise ValueError(f"{options.model} is an architecture without weights: give --measure a folder or a Hub id")
    if not device.startswith("cuda"):  # the budget is not this computer's free memory
        config = replace(config, memory_budget=None)
    pipeline = open_model(options, device)
    prepare_model(pipeline, torch.device(device), config)
    sampler = make_sampler(pipeline, config, None if rewards is None else rewards.trained)
    if rewards is not None:
        tell_sampler(sampler, rewards, load_rows(options.prompts)[0])
    return sampler


def make_stopping(options: TrainOptions) -> EarlyStopping | None:
    """Early stopping, or None without --patience. Raises ValueError if its values cannot work."""
    from alignprop_fast.evaluation.early_stopping import EarlyStopping

    return None if options.patience is None else EarlyStopping(options.patience, options.max_drop)


def tell_sampler(sampler: DifferentiableSampler, rewards: Rewards, first: PromptRow) -> None:
    """Make the sampler's plans count the watched reward's weights. first: the prompts' first row, to measure the reward
    with."""
    sampler.reward_bytes += rewards.watched_bytes
    sampler.example = (first.prompt, dict(first.metadata))


def _watch(options: TrainOptions, trained: WeightedSum, device: str) -> Watch | None:
    """The watched reward under these options. trained: the reward of the training."""
    if options.watch_reward is None and options.watch_prompts is None:
        for name in ("patience", "watch_reward_model", "diversity_model"):
            if getattr(options, name):
                raise ValueError(f"{flag(name)} needs something to watch: add --watch-reward clip")
        return None
    from alignprop_fast.evaluation.watch import IMAGES_PER_PROMPT, Watch
    from alignprop_fast.rewards.diversity import ImageEmbedder
    from alignprop_fast.rewards.weights import RewardLoading

    heldout = f"{options.prompts}-heldout"
    rows = load_rows(options.watch_prompts or (heldout if heldout in PROMPT_SETS else options.prompts))
    reward = trained
    if options.watch_reward is not None:
        reward = _reward(options.watch_reward, options.watch_reward_model, options, device)
    return Watch(
        reward,
        spread(rows, options.watch_pictures // IMAGES_PER_PROMPT),
        ImageEmbedder(options.diversity_model, RewardLoading(options.allow_pickle)).to(device),
        seed=_WATCH_SEED,
        batch_size=options.batch_size,
        negative_prompt=options.negative_prompt,
    )


def _reward(spec: str, models: Sequence[str], options: TrainOptions, device: str) -> WeightedSum:
    import torch

    from alignprop_fast.rewards import get_reward

    # fp16 has too small a range for the gradient of an unscaled score.
    dtype = torch.bfloat16 if options.mixed_precision == "bf16" else torch.float32
    build = _outline if device == "meta" else get_reward
    return build(spec, device=device, dtype=dtype, model=list(models), allow_pickle=options.allow_pickle)


def _outline(spec: str, *, model: list[str], **how: Any) -> WeightedSum:
    """`get_reward` on the meta device. Published rewards need no weights; `clip` is the bundled one if no other is
    given."""
    from alignprop_fast.demo import clip_path
    from alignprop_fast.rewards.architectures import architecture_reward
    from alignprop_fast.rewards.registry import parsed_spec

    parsed, given = parsed_spec(spec, model)
    if "clip" in dict(parsed) and "clip" not in given:
        model = [*model, f"clip={clip_path()}"]
    return architecture_reward(spec, model=model, **how)
