"""Noise schedules as coefficient tables, guidance, and truncation rules, independent of plans and models."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignprop_fast.ops.guided_step import guided_step, guided_step_adjoint
    from alignprop_fast.sampling.ddim import ddim_table
    from alignprop_fast.sampling.dpm_solver import dpm_solver_table
    from alignprop_fast.sampling.draw import draw_gates, draw_truncation, gate_count
    from alignprop_fast.sampling.euler import euler_table
    from alignprop_fast.sampling.gates import Draws, Gate, Truncation, checked, trl_gates
    from alignprop_fast.sampling.guidance import limited_guidance, normed_guidance, rescaled_guidance
    from alignprop_fast.sampling.leaps import Leaps
    from alignprop_fast.sampling.step_table import StepTable
    from alignprop_fast.sampling.table_of_schedule import make_table
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
    "limited_guidance",
    "make_table",
    "normed_guidance",
    "rescaled_guidance",
    "trl_gates",
]

_HOME = {
    "Draws": "sampling.gates",
    "Gate": "sampling.gates",
    "Leaps": "sampling.leaps",
    "StepTable": "sampling.step_table",
    "Truncation": "sampling.gates",
    "Update": "sampling.update",
    "checked": "sampling.gates",
    "ddim_table": "sampling.ddim",
    "dpm_solver_table": "sampling.dpm_solver",
    "draw_gates": "sampling.draw",
    "draw_truncation": "sampling.draw",
    "euler_table": "sampling.euler",
    "gate_count": "sampling.draw",
    "guided_step": "ops.guided_step",
    "guided_step_adjoint": "ops.guided_step",
    "limited_guidance": "sampling.guidance",
    "make_table": "sampling.table_of_schedule",
    "normed_guidance": "sampling.guidance",
    "rescaled_guidance": "sampling.guidance",
    "trl_gates": "sampling.gates",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the command `plan` counts gates without torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'alignprop_fast.sampling' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"alignprop_fast.{_HOME[name]}"), name)
