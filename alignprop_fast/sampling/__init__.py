"""Noise schedules as coefficient tables, guidance, and truncation rules, independent of plans and models."""

from alignprop_fast.ops.guided_step import guided_step, guided_step_adjoint
from alignprop_fast.sampling.ddim import ddim_table
from alignprop_fast.sampling.dpm_solver import dpm_solver_table
from alignprop_fast.sampling.draw import draw_gates, draw_truncation, gate_count
from alignprop_fast.sampling.euler import euler_table
from alignprop_fast.sampling.gates import Draws, Gate, Truncation, checked, trl_gates
from alignprop_fast.sampling.guidance import rescaled_guidance
from alignprop_fast.sampling.leaps import Leaps
from alignprop_fast.sampling.make_table import make_table
from alignprop_fast.sampling.step_table import StepTable
from alignprop_fast.sampling.update import Update

__all__ = [
    "Draws",
    "Gate",
    "Leaps",
    "StepTable",
    "Truncation",
    "Update",
    "checked",
    "ddim_table",
    "dpm_solver_table",
    "draw_gates",
    "draw_truncation",
    "euler_table",
    "gate_count",
    "guided_step",
    "guided_step_adjoint",
    "make_table",
    "rescaled_guidance",
    "trl_gates",
]
