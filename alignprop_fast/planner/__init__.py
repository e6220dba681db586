"""From a cost table and a memory budget to a plan. It needs only numpy, so any machine can plan for any other."""

from alignprop_fast.planner.block_option import GRADES, BlockOption, Options, option_of
from alignprop_fast.planner.budget import (
    AUTO,
    BudgetInfeasible,
    budget_from_free,
    budget_on,
    format_bytes,
    parse_budget,
    parse_bytes,
)
from alignprop_fast.planner.counted import CountedGraphs, CountedReward, CountedTable, seconds_on
from alignprop_fast.planner.cuda_graphs import GraphCosts, GraphUse
from alignprop_fast.planner.describe import by_group, ranges, summary
from alignprop_fast.planner.gpus import GPUS, Gpu, find_gpu, roofline_seconds
from alignprop_fast.planner.host_memory import lockable_bytes
from alignprop_fast.planner.operators import Operator, Operators, Time
from alignprop_fast.planner.plan import Plan, StageChoice, leanest
from alignprop_fast.planner.scale import MOST_BATCH, largest_batch, scaled
from alignprop_fast.planner.simulate import Moment, price, scoring_seconds, simulate
from alignprop_fast.planner.solve import Solver, solve
from alignprop_fast.planner.table import CostTable, Option, Segment, Stage
from alignprop_fast.planner.tablefile import as_text, from_text, load_table, packed, save_table, unpacked

__all__ = [
    "AUTO",
    "GPUS",
    "GRADES",
    "MOST_BATCH",
    "BlockOption",
    "BudgetInfeasible",
    "CostTable",
    "CountedGraphs",
    "CountedReward",
    "CountedTable",
    "Gpu",
    "GraphCosts",
    "GraphUse",
    "Moment",
    "Operator",
    "Operators",
    "Option",
    "Options",
    "Plan",
    "Segment",
    "Solver",
    "Stage",
    "StageChoice",
    "Time",
    "as_text",
    "budget_from_free",
    "budget_on",
    "by_group",
    "find_gpu",
    "format_bytes",
    "from_text",
    "largest_batch",
    "leanest",
    "load_table",
    "lockable_bytes",
    "option_of",
    "packed",
    "parse_budget",
    "parse_bytes",
    "price",
    "ranges",
    "roofline_seconds",
    "save_table",
    "scaled",
    "scoring_seconds",
    "seconds_on",
    "simulate",
    "solve",
    "summary",
    "unpacked",
]
