"""Noise schedules as coefficient tables, guidance, and truncation rules. Knows nothing of plans or of models."""

from alignprop_fast.ops.guided_step import guided_step, guided_step_adjoint
from alignprop_fast.sampling.ddim import StepTable, ddim_table
from alignprop_fast.sampling.gates import draw_gates, gate_count, trl_gates
from alignprop_fast.sampling.guidance import rescaled_guidance

__all__ = [
    "StepTable",
    "ddim_table",
    "draw_gates",
    "gate_count",
    "guided_step",
    "guided_step_adjoint",
    "rescaled_guidance",
    "trl_gates",
]
