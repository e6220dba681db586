"""Runs a chain under a plan: what is kept, replayed, recomputed; the only place that measures time and memory."""

from alignprop_fast.runtime.chain import Chain, run_chain, run_penalised_chain
from alignprop_fast.runtime.measure import PeakMeter, measure_chain, measure_option, measure_segment
from alignprop_fast.runtime.segments import STEP_OPTIONS, apply_by_image, checkpointed, step_kept_as

__all__ = [
    "STEP_OPTIONS",
    "Chain",
    "PeakMeter",
    "apply_by_image",
    "checkpointed",
    "measure_chain",
    "measure_option",
    "measure_segment",
    "run_chain",
    "run_penalised_chain",
    "step_kept_as",
]
