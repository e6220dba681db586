"""Schedulers of diffusers, by name, and what `sampling`'s tables need to know of each: the one place that chooses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_CLASSES = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "dpm++2m": "DPMSolverMultistepScheduler",
    "flow-euler": "FlowMatchEulerDiscreteScheduler",
}
DIFFUSION = ("ddim", "euler", "euler-ancestral", "dpm++2m")
FLOW = ("flow-euler",)


def make_scheduler(name: str, config: Any) -> Any:
    """The scheduler called `name` with the settings of another one's config that it knows.

    DDIM never clips: clipping is for pixels, and configurations of other schedulers say nothing about it.
    """
    import diffusers

    fixed = {"clip_sample": False, "thresholding": False} if name == "ddim" else {}
    return getattr(diffusers, _CLASSES[name]).from_config(config, **fixed)


def check_family(scheduler: Any, supported: Sequence[str]) -> None:
    """Refuse the noise that a model was trained with where none of the supported schedulers has it.

    `make_scheduler` would take from another family's settings what it knows, and leave the rest.

    Raises:
        ValueError: flow matching where diffusion is supported, or the other way round.
    """
    config, name = scheduler.config, type(scheduler).__name__
    is_flow = "FlowMatch" in name or config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    if bool(is_flow) != (tuple(supported) == FLOW):
        own, wanted = ("flow matching", "diffusion") if is_flow else ("diffusion", "flow matching")
        raise ValueError(
            f"the model's own scheduler, {name}, is for {own}, and its class is supported with {wanted} alone: use "
            "another model, or put the scheduler that it was trained with into its folder scheduler/"
        )


def check_scheduler(scheduler: Any, supported: Sequence[str]) -> str:
    """The name of a scheduler that the chain can reproduce.

    Raises:
        ValueError: another class, or an option that makes its update not affine or stochastic in an unknown way.
    """
    known = {_CLASSES[name]: name for name in supported}
    name, config = known.get(type(scheduler).__name__), scheduler.config
    if name is None:
        first = next(iter(known))
        raise ValueError(
            f"{type(scheduler).__name__} is not supported here: use {', '.join(known)}, for example pipe.scheduler = "
            f"{first}.from_config(pipe.scheduler.config)"
        )
    # A config may carry options of another class that this one does not know.
    if config.get("sigma_data") is not None:
        raise ValueError(
            "the model was trained with EDM noise (sigma_data in its scheduler's settings), as Playground v2.5 is, "
            "which is not supported: use SDXL or another model with the noise of Stable Diffusion"
        )
    clips = {"ddim": ("clip_sample", "thresholding"), "dpm++2m": ("thresholding",)}
    if any(config.get(option) for option in clips.get(name, ())):
        raise ValueError(
            "the scheduler clips its estimate of the image, which latent models must not do: set "
            "clip_sample=False and thresholding=False, e.g. DDIMScheduler.from_config(config, clip_sample=False)"
        )
    if name == "dpm++2m" and (config.algorithm_type != "dpmsolver++" or config.solver_order > 2):
        raise ValueError(
            f"DPM-Solver with algorithm_type={config.algorithm_type!r} and solver_order={config.solver_order} is not "
            "supported: set algorithm_type='dpmsolver++' and solver_order=2"
        )
    if name == "dpm++2m" and (config.get("use_flow_sigmas") or config.prediction_type == "flow_prediction"):
        raise ValueError("DPM-Solver for flow matching is not supported: use FlowMatchEulerDiscreteScheduler")
    if name == "flow-euler" and (config.get("stochastic_sampling") or config.get("invert_sigmas")):
        raise ValueError(
            "set stochastic_sampling=False and invert_sigmas=False in the scheduler: nothing else is known"
        )
    return name


def dynamic_shift(config: Any, tokens: int) -> dict[str, float]:
    """The argument `mu` of `set_timesteps` where the schedule depends on the number of image tokens, else nothing."""
    if not config.get("use_dynamic_shifting"):
        return {}
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return {"mu": config.base_shift + slope * (tokens - config.base_image_seq_len)}


def schedule(name: str, scheduler: Any) -> dict[str, Any]:
    """Keyword arguments of `sampling.make_table` from a scheduler of that name after its `set_timesteps`."""
    config, timesteps = scheduler.config, scheduler.timesteps.tolist()
    if name == "ddim":
        return {
            "kind": "ddim",
            "alphas_cumprod": scheduler.alphas_cumprod.tolist(),
            "final_alpha_cumprod": float(scheduler.final_alpha_cumprod),
            "timesteps": timesteps,
            "stride": config.num_train_timesteps // len(timesteps),
            "prediction_type": config.prediction_type,
        }
    common = {"timesteps": timesteps, "sigmas": scheduler.sigmas.tolist()}
    if name == "dpm++2m":
        return {
            **common,
            "kind": "dpm-solver",
            "prediction_type": config.prediction_type,
            "solver_type": config.solver_type,
            "second_order_steps": _second_order_steps(config, len(timesteps)),
        }
    return {
        **common,
        "kind": "euler",
        "prediction_type": "flow" if name == "flow-euler" else config.prediction_type,
        "ancestral": name == "euler-ancestral",
        "init_scale": 1.0 if name == "flow-euler" else float(scheduler.init_noise_sigma),
    }


def _second_order_steps(config: Any, num_steps: int) -> tuple[int, ...]:
    """All but the first step, and where the image has no noise left (or few steps ask for it) all but the last."""
    first_order_last = (
        config.get("euler_at_final")
        or (config.lower_order_final and num_steps < 15)
        or config.get("final_sigmas_type") == "zero"
    )
    return tuple(range(1, num_steps - bool(first_order_last))) if config.solver_order == 2 else ()
