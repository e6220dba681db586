"""Options of the command line against over-optimisation, and what they set up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from alignprop_fast.prompts.rows import PROMPT_SETS, load_rows

if TYPE_CHECKING:
    from alignprop_fast.cli.options import TrainOptions
    from alignprop_fast.evaluation.early_stopping import EarlyStopping
    from alignprop_fast.evaluation.watch import Watch

_WATCH_SEED = 1_000_000  # beyond the seeds of the sample pictures


def _option(text: str, **limits: Any) -> Any:
    return typer.Option(help=text, rich_help_panel="Control of over-optimisation", **limits)


KlWeight = Annotated[
    float,
    _option(
        "Weight of a regulariser: the mean squared difference of the model's output to the base model's. Higher keeps "
        "pictures closer to it; costs up to twice the time of a gradient step. A cheaper remedy after training: scale "
        "the adapters down by alignprop-fast merge RUN:0.7.",
        min=0,
    ),
]
WatchReward = Annotated[
    str | None,
    _option(
        "A reward that is not trained for, as in --reward: scored at every sampling, logged and plotted.",
        show_default="none",
    ),
]
WatchRewardModel = Annotated[list[str], _option("Weights of --watch-reward, as in --reward-model.", show_default="")]
WatchPrompts = Annotated[
    str | None,
    _option(
        "Prompts that are watched, as in --prompts. Without --watch-reward the trained reward is watched on them.",
        show_default="the held-out set of --prompts if there is one, else --prompts",
    ),
]
WatchPictures = Annotated[
    int, _option("Pictures that are watched: two of each prompt, always with the same seeds.", min=2)
]
DiversityModel = Annotated[
    str | None,
    _option("CLIP model (folder or Hub id) of the diversity that is watched.", show_default="the bundled one"),
]
Patience = Annotated[
    int | None,
    _option(
        "Stop after so many samplings in a row whose watched score lies below the best so far by more than --max-drop; "
        "the LoRA that is written is then that of the last sampling before them.",
        show_default="never stop",
        min=1,
    ),
]
MaxDrop = Annotated[float, _option("What the watched score may lose, in its own units.", min=0)]


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
