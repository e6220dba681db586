"""Options of the command line against over-optimisation."""

from __future__ import annotations

from typing import Annotated, Any

import typer


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
