"""From a cost table and a memory budget to a plan. Standard library and numpy: plans anywhere, for any machine."""

from alignprop_fast.planner.budget import BudgetInfeasible, format_bytes, parse_bytes
from alignprop_fast.planner.plan import Plan, StageChoice, leanest, option_of
from alignprop_fast.planner.simulate import Moment, price, simulate
from alignprop_fast.planner.solve import Solver, solve
from alignprop_fast.planner.table import CostTable, Option, Segment, Stage

__all__ = [
    "BudgetInfeasible",
    "CostTable",
    "Moment",
    "Option",
    "Plan",
    "Segment",
    "Solver",
    "Stage",
    "StageChoice",
    "format_bytes",
    "leanest",
    "option_of",
    "parse_bytes",
    "price",
    "simulate",
    "solve",
]
