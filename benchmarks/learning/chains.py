"""The chains on which truncation rules are compared, and the rules."""

from __future__ import annotations

from dataclasses import dataclass

RULES = (
    *("full", "uniform", "last:4", "last:1", "lv:2", "drtune", "refl", "discount:0.8", "discount:0.5", "leapalign"),
    *("flowbp-sparse:4", "flowbp-sparse:4:1", "flowbp-bridge:4", "flowbp-lagrange", "srpo"),
)


@dataclass(frozen=True)
class Setting:
    """A chain without noise. flow: as a rectified flow (`rectified_flow`), with flow-Euler instead of DDIM."""

    model: str
    steps: int
    guidance_scale: float
    flow: bool = False


SETTINGS = {
    "demo-12": Setting("demo", 12, 3.0),
    "unguided-12": Setting("demo", 12, 1.0),  # draws worse, so that a reward about content has something to teach
    "demo-50": Setting("demo", 50, 3.0),
    "twin-4": Setting("demo-twin", 4, 1.0),
    "flow-12": Setting("demo", 12, 3.0, flow=True),
}
