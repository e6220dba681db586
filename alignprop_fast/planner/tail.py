"""The part of a training step after the last denoising step: decoder and reward, forward and backward."""

from dataclasses import replace

import numpy as np

from alignprop_fast.planner.frontier import Frontier, chain, either, together
from alignprop_fast.planner.plan import StageChoice
from alignprop_fast.planner.table import CostTable, Stage

PART_LABELS = 256  # for each stage; decoder and reward take a small share of a training step's seconds


def _replayed(stage: Stage) -> Frontier:
    """A stage that keeps nothing: its forward pass without graph, and its runs one by one in the backward pass."""
    run = chain(stage.segments, Frontier.start(), PART_LABELS)
    seconds = stage.forward_seconds + stage.runs * run.seconds
    return replace(run, seconds=seconds).at_least(stage.forward_bytes)


def _reward(table: CostTable) -> Frontier:
    if not table.rewards:
        return Frontier.start(table.reserve_bytes)
    stages = [
        _replayed(stage) if stage.replayed else chain(stage.segments, Frontier.start(), PART_LABELS)
        for stage in table.rewards
    ]
    return either(stages, PART_LABELS)


def _decoder(stage: Stage, reward: Frontier) -> Frontier:
    """A decoder stage followed by the reward. A kept decoder's bytes stay alive during the reward."""
    if not stage.replayed:
        return chain(stage.segments, reward, PART_LABELS)
    decoder = _replayed(stage)
    return together(decoder, reward, np.maximum(decoder.need[:, None], reward.need), PART_LABELS)


def tail_frontier(table: CostTable) -> Frontier:
    """Decoder and reward with the images: seconds, and bytes beside those that the denoising steps keep."""
    reward = _reward(table)
    tail = either([_decoder(stage, reward) for stage in table.decoders], PART_LABELS)
    return replace(tail, need=tail.need + table.image_bytes)


def tail_choices(table: CostTable, picks: np.ndarray) -> tuple[StageChoice, StageChoice | None]:
    """The stages and options of a row of the tail's decisions."""
    width = max((len(stage.segments) for stage in table.rewards), default=-1) + 1
    end = len(picks) - width
    decoder = _stage_choice(table.decoders[picks[0]], picks[:end])
    return decoder, _stage_choice(table.rewards[picks[end]], picks[end:]) if width else None


def _stage_choice(stage: Stage, picks: np.ndarray) -> StageChoice:
    own = picks[len(picks) - len(stage.segments) :]
    return StageChoice(stage.name, {s.name: s.options[pick].name for s, pick in zip(stage.segments, own, strict=True)})
