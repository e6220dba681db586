"""Noise schedules as coefficient tables, guidance, and truncation rules. Knows nothing of plans or of models."""

from alignprop_fast.ops.guided_step import guided_step, guided_step_adjoint
from alignprop_fast.sampling.ddim import StepTable, ddim_table
from alignprop_fast.sampling.gates import Truncation, draw_gates, draw_truncation, trl_gates
from alignprop_fast.sampling.guidance import rescaled_guidance

__all__ = [
    "StepTable",
    "Truncation",
    "ddim_table",
    "draw_gates",
    "draw_truncation",
    "guided_step",
    "guided_step_adjoint",
    "rescaled_guidance",
    "trl_gates",
]
