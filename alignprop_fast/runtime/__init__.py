"""Runs a chain under a plan (keeps, replays, recomputes), and measures time and memory; no other folder does."""

from alignprop_fast.ops.autotune import device_name
from alignprop_fast.ops.errors import OutOfMemory, first_line, unless_out_of_memory
from alignprop_fast.ops.versions import version, versions
from alignprop_fast.runtime.block_costs import segments, transfer_bytes
from alignprop_fast.runtime.blocks import KEPT, Block, apply_options, blocks_of
from alignprop_fast.runtime.chain import Chain, GradientSink
from alignprop_fast.runtime.changed import raise_if_changed
from alignprop_fast.runtime.compiled import CompiledBlocks
from alignprop_fast.runtime.costs import DECODER_STAGES, DecoderCosts, reward_stages, step_costs
from alignprop_fast.runtime.device_memory import device_memory, driver_bytes, use_growing_segments
from alignprop_fast.runtime.estimate import counted_operator, rated_dtype
from alignprop_fast.runtime.gradients import step_gradients
from alignprop_fast.runtime.graphs import GraphedCalls
from alignprop_fast.runtime.host_pool import HostPool
from alignprop_fast.runtime.measure import LiveBytes, PeakMeter, Stopwatch, allocated_bytes, link_rate
from alignprop_fast.runtime.meta_results import remembered_results
from alignprop_fast.runtime.offload import Offloader
from alignprop_fast.runtime.run_chain import autocast_dtype, run_chain, run_penalised_chain
from alignprop_fast.runtime.stages import run_decoder_stage, score_in_chunks
from alignprop_fast.runtime.told import Told, nobody, within
from alignprop_fast.runtime.trace import trace
from alignprop_fast.runtime.work import Trace, Work

__all__ = [
    "DECODER_STAGES",
    "KEPT",
    "Block",
    "Chain",
    "CompiledBlocks",
    "DecoderCosts",
    "GradientSink",
    "GraphedCalls",
    "HostPool",
    "LiveBytes",
    "Offloader",
    "OutOfMemory",
    "PeakMeter",
    "Stopwatch",
    "Told",
    "Trace",
    "Work",
    "allocated_bytes",
    "apply_options",
    "autocast_dtype",
    "blocks_of",
    "counted_operator",
    "device_memory",
    "device_name",
    "driver_bytes",
    "first_line",
    "link_rate",
    "nobody",
    "raise_if_changed",
    "rated_dtype",
    "remembered_results",
    "reward_stages",
    "run_chain",
    "run_decoder_stage",
    "run_penalised_chain",
    "score_in_chunks",
    "segments",
    "step_costs",
    "step_gradients",
    "trace",
    "transfer_bytes",
    "unless_out_of_memory",
    "use_growing_segments",
    "version",
    "versions",
    "within",
]
