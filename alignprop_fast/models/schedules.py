"""diffusers' schedulers by name, and their settings in the form that `sampling`'s tables take."""

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
FLOW_SOLVER = ("dpm++2m", "flow-euler")  # SANA's


def make_scheduler(name: str, config: Any) -> Any:
    """The scheduler called `name`, with those settings of another scheduler's config that it knows.

    DDIM never clips: clipping is for pixels, and configurations of other schedulers do not mention it.
    """
    import diffusers

    fixed: dict[str, Any] = {"clip_sample": False, "thresholding": False} if name == "ddim" else {}
    # The two schedulers of SANA give one setting two names.
    if name == "flow-euler" and "flow_shift" in config and "shift" not in config:
        fixed = {"shift": config["flow_shift"]}
    if name == "dpm++2m" and "shift" in config and "flow_shift" not in config:
        fixed = {"flow_shift": config["shift"], "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    return getattr(diffusers, _CLASSES[name]).from_config(config, **fixed)


def check_family(scheduler: Any, supported: Sequence[str]) -> None:
    """Refuse a model whose kind of noise none of the supported schedulers has.

    `make_scheduler` does not notice this: it takes the settings that it knows and ignores the others.

    Raises:
        ValueError: the model uses flow matching but only diffusion is supported, or the opposite.
    """
    config, name = scheduler.config, type(scheduler).__name__
    is_flow = "FlowMatch" in name or config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    if bool(is_flow) != ("flow-euler" in supported):
        own, wanted = ("flow matching", "diffusion") if is_flow else ("diffusion", "flow matching")
        raise ValueError(
            f"the model's own scheduler, {name}, is for {own}, but its class is supported only with {wanted}: use "
            "another model, or put the scheduler that it was trained with into its folder scheduler/"
        )


def check_scheduler(scheduler: Any, supported: Sequence[str]) -> str:
    """The name of a scheduler that the chain can reproduce.

    Raises:
        ValueError: the class is not supported, or an option makes its update not affine or random in an unknown way.
    """
    known = {_CLASSES[name]: name for name in supported}
    name, config = known.get(type(scheduler).__name__), scheduler.config
    if name is None:
        first = next(iter(known))
        raise ValueError(
            f"{type(scheduler).__name__} is not supported here: use {', '.join(known)}, for example pipe.scheduler = "
            f"{first}.from_config(pipe.scheduler.config)"
        )
    # A config can contain options of other classes.
    if config.get("sigma_data") is not None:
        raise ValueError(
            "the model was trained with EDM noise (sigma_data in its scheduler's settings), like Playground v2.5, "
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
    if name == "dpm++2m":
        flows = {bool(config.get("use_flow_sigmas")), config.prediction_type == "flow_prediction"}
        if "flow-euler" in supported and flows != {True}:
            raise ValueError(
                "this model uses flow matching: set use_flow_sigmas=True, prediction_type='flow_prediction'"
            )
        if "flow-euler" not in supported and flows != {False}:
            raise ValueError("DPM-Solver for flow matching is not supported: use FlowMatchEulerDiscreteScheduler")
    if name == "flow-euler" and (config.get("stochastic_sampling") or config.get("invert_sigmas")):
        raise ValueError(
            "set stochastic_sampling=False and invert_sigmas=False in the scheduler: other values are not supported"
        )
    return name


def dynamic_shift(config: Any, tokens: int) -> dict[str, float]:
    """The argument `mu` of `set_timesteps` if the schedule depends on the number of image tokens; else empty."""
    if not config.get("use_dynamic_shifting"):
        return {}
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return {"mu": config.base_shift + slope * (tokens - config.base_image_seq_len)}


def schedule(name: str, scheduler: Any) -> dict[str, Any]:
    """Keyword arguments for `sampling.make_table` from a scheduler of that name after its `set_timesteps`."""
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
            "prediction_type": config.prediction_type.replace("flow_prediction", "flow"),
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
    """All steps but the first. The last is also first order if it leaves no noise, or if there are few steps."""
    first_order_last = (
        config.get("euler_at_final")
        or (config.lower_order_final and num_steps < 15)
        or config.get("final_sigmas_type") == "zero"
    )
    return tuple(range(1, num_steps - bool(first_order_last))) if config.solver_order == 2 else ()
