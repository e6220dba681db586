"""What the options against over-optimisation set up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from alignprop_fast.prompts.rows import PROMPT_SETS, load_rows

if TYPE_CHECKING:
    from alignprop_fast.evaluation.early_stopping import EarlyStopping
    from alignprop_fast.evaluation.watch import Watch
    from alignprop_fast.training.options import TrainOptions

_WATCH_SEED = 1_000_000  # beyond the seeds of the sample pictures


def make_watch(options: TrainOptions, trained: Any, device: str) -> Watch | None:
    """What is watched under these options; `trained`: the reward of the training.

    Raises:
        ValueError, OSError: options that watch nothing or do not fit together, unreadable prompts or weights.
    """
    if options.watch_reward is None and options.watch_prompts is None:
        names = ("patience", "watch_reward_model", "diversity_model")
        for name in names:
            if getattr(options, name):
                raise ValueError(f"--{name.replace('_', '-')} needs something to watch: add --watch-reward clip")
        return None
    import torch

    from alignprop_fast.evaluation.watch import IMAGES_PER_PROMPT, Watch
    from alignprop_fast.rewards import get_reward
    from alignprop_fast.rewards.diversity import ImageEmbedder
    from alignprop_fast.rewards.weights import Loading

    heldout = f"{options.prompts}-heldout"
    rows = load_rows(options.watch_prompts or (heldout if heldout in PROMPT_SETS else options.prompts))
    count = min(len(rows), options.watch_pictures // IMAGES_PER_PROMPT)
    reward = trained
    if options.watch_reward is not None:
        reward = get_reward(
            options.watch_reward,
            device=device,
            dtype=torch.bfloat16 if options.mixed_precision == "bf16" else torch.float32,
            model=options.watch_reward_model,
            allow_pickle=options.allow_pickle,
        )
    return Watch(
        reward,
        [rows[i * len(rows) // count] for i in range(count)],
        ImageEmbedder(options.diversity_model, Loading(options.allow_pickle)).to(device),
        seed=_WATCH_SEED,
        batch_size=options.batch_size,
        negative_prompt=options.negative_prompt,
    )


def make_stopping(options: TrainOptions) -> EarlyStopping | None:
    """None without --patience. Raises ValueError for values that cannot work."""
    from alignprop_fast.evaluation.early_stopping import EarlyStopping

    return None if options.patience is None else EarlyStopping(options.patience, options.max_drop)
