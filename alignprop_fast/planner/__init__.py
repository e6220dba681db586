"""From a cost table and a memory budget to a plan. Standard library only: plans anywhere, for any machine."""

from alignprop_fast.planner.budget import BudgetInfeasible, format_bytes, parse_bytes
from alignprop_fast.planner.plan import Plan
from alignprop_fast.planner.solve import leanest, solve
from alignprop_fast.planner.table import CostTable, Option, Segment

__all__ = [
    "BudgetInfeasible",
    "CostTable",
    "Option",
    "Plan",
    "Segment",
    "format_bytes",
    "leanest",
    "parse_bytes",
    "solve",
]
