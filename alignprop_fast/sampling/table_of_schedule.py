"""The coefficient table of a schedule, by its kind."""

from collections.abc import Callable, Mapping
from typing import Any

from alignprop_fast.sampling.ddim import ddim_table
from alignprop_fast.sampling.dpm_solver import dpm_solver_table
from alignprop_fast.sampling.euler import euler_table
from alignprop_fast.sampling.step_table import StepTable

_KINDS: dict[str, Callable[..., StepTable]] = {"euler": euler_table, "dpm-solver": dpm_solver_table}


def make_table(schedule: Mapping[str, Any], eta: float) -> StepTable:
    """The table of a schedule: its "kind" (ddim, euler or dpm-solver) and the arguments of that kind's function.

    eta is DDIM's amount of noise; the other kinds ignore it.
    """
    arguments = {name: value for name, value in schedule.items() if name != "kind"}
    if schedule["kind"] == "ddim":
        return ddim_table(**arguments, eta=eta)
    return _KINDS[schedule["kind"]](**arguments)
