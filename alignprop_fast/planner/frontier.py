"""Frontiers of (bytes needed, seconds): the fastest way to run a part of the training step in a given memory.

A segment keeps its bytes while the following segments, called the rest, run. If the rest needs n bytes, both together
need max(kept + transient, kept + n): the segment's own worst moment, or the rest's worst moment beside the segment's
kept bytes. So a frontier is built from the last segment to the first, with two numbers per label, and serves every
budget. A label is kept only if no other label needs as little and is as fast (Pareto).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from alignprop_fast.planner.table import Segment


@dataclass(frozen=True)
class Frontier:
    """Labels in ascending need and descending cost, one row each.

    need: bytes at the worst moment, int64.
    seconds: float64.
    host: bytes in host memory, int64.
    picks: int16 matrix with a column for each decision, in order of time.
    thinned: some labels were dropped because there were too many; the others are correct but may not be the best.
    price: seconds that a byte in host memory is charged when labels are compared.
    """

    need: np.ndarray
    seconds: np.ndarray
    host: np.ndarray
    picks: np.ndarray
    thinned: bool = False
    price: float = 0.0

    def __len__(self) -> int:
        return len(self.need)

    @property
    def cost(self) -> np.ndarray:
        return self.seconds + self.price * self.host

    @classmethod
    def start(cls, need: int = 0, price: float = 0.0) -> "Frontier":
        """The frontier of no segments: one label without decisions."""
        zero = np.zeros(1, np.int64)
        return cls(zero + need, np.zeros(1), zero, np.zeros((1, 0), np.int16), price=price)

    def indexed(self) -> "Frontier":
        """The same labels, each with one decision: its own row."""
        return replace(self, picks=np.arange(len(self), dtype=np.int16)[:, None])

    def padded(self, columns: int) -> "Frontier":
        """The same labels with empty decisions in front, up to the given number of columns."""
        empty = np.full((len(self), columns - self.picks.shape[1]), -1, np.int16)
        return replace(self, picks=np.hstack((empty, self.picks)))

    def rows(self, rows: np.ndarray, thinned: bool = False) -> "Frontier":
        thinned = self.thinned or thinned
        return Frontier(self.need[rows], self.seconds[rows], self.host[rows], self.picks[rows], thinned, self.price)

    def at_least(self, need: int) -> "Frontier":
        """The frontier with a further moment that needs the given bytes by itself."""
        return replace(self, need=np.maximum(self.need, need)).pareto(len(self))

    def pareto(self, most: int) -> "Frontier":
        """At most the given number of labels that no other beats."""
        return self.rows(*best(self.need, self.cost, most))


def best(need: np.ndarray, cost: np.ndarray, most: int) -> tuple[np.ndarray, bool]:
    """Rows of the labels that no other beats, in ascending need, and whether some of them were dropped.

    If there are more than `most`, labels at even distances along the frontier are kept. The choice does not depend on a
    budget, so a larger budget never gives a slower plan. The leanest and the cheapest label are always kept.
    """
    order = np.argsort(need, kind="stable")  # which finds that the labels are a few ascending runs
    least = np.minimum.accumulate(cost[order])
    rows = order[np.concatenate(([True], least[1:] < least[:-1]))]
    rows = rows[np.concatenate((need[rows][1:] > need[rows][:-1], [True]))]  # among equal needs the cheapest is last
    if len(rows) <= most:
        return rows, False
    along = _fraction(need[rows]) + _fraction(-cost[rows])
    bucket = (along * (most // 2 - 1)).astype(np.int64)
    last = np.concatenate((bucket[1:] != bucket[:-1], [True]))
    last[0] = True
    return rows[last], True


def _fraction(values: np.ndarray) -> np.ndarray:
    """Ascending values as fractions of their range, 0 to 1."""
    return (values - values[0]) / (values[-1] - values[0])


def in_front(segment: Segment, rest: Frontier, most: int, above: int = 0) -> Frontier:
    """Frontier of a segment followed by the rest. above: further bytes alive during the segment's own worst moment."""
    options = segment.options
    kept = np.array([option.kept_bytes for option in options], np.int64)[:, None]
    transient = np.array([option.transient_bytes + above for option in options], np.int64)[:, None]
    need = (kept + np.maximum(transient, rest.need)).ravel()
    seconds = (np.array([option.seconds for option in options])[:, None] + rest.seconds).ravel()
    host = (np.array([option.host_bytes for option in options], np.int64)[:, None] + rest.host).ravel()
    rows, thinned = best(need, seconds + rest.price * host, most)
    chosen, after = np.divmod(rows, len(rest))
    picks = np.hstack((chosen.astype(np.int16)[:, None], rest.picks[after]))
    return Frontier(need[rows], seconds[rows], host[rows], picks, rest.thinned or thinned, rest.price)


def chain(segments: Sequence[Segment], rest: Frontier, most: int, above: int = 0) -> Frontier:
    """Frontier of segments, in order of time, followed by the rest."""
    for segment in reversed(segments):
        rest = in_front(segment, rest, most, above)
    return rest


def least_need(segments: Sequence[Segment], above: int = 0) -> int:
    """The least need on the frontier of segments alone, without the frontier."""
    least = 0
    for segment in reversed(segments):
        least = min(option.kept_bytes + max(option.transient_bytes + above, least) for option in segment.options)
    return least


def together(first: Frontier, second: Frontier, need: np.ndarray, most: int) -> Frontier:
    """Frontier of pairs of labels. `need`: rows for labels of the first frontier, columns for labels of the second."""
    need = need.ravel()
    seconds = (first.seconds[:, None] + second.seconds).ravel()
    host = (first.host[:, None] + second.host).ravel()
    rows, thinned = best(need, seconds + first.price * host, most)
    one, two = np.divmod(rows, len(second))
    picks = np.hstack((first.picks[one], second.picks[two]))
    thinned = first.thinned or second.thinned or thinned
    return Frontier(need[rows], seconds[rows], host[rows], picks, thinned, first.price)


def either(frontiers: Sequence[Frontier], most: int) -> Frontier:
    """Frontier of alternatives; the first decision is the alternative, its own decisions come last."""
    columns = max(frontier.picks.shape[1] for frontier in frontiers)
    wide = [frontier.padded(columns) for frontier in frontiers]
    which = np.repeat(np.arange(len(wide), dtype=np.int16), [len(frontier) for frontier in wide])
    return Frontier(
        np.concatenate([frontier.need for frontier in wide]),
        np.concatenate([frontier.seconds for frontier in wide]),
        np.concatenate([frontier.host for frontier in wide]),
        np.hstack((which[:, None], np.vstack([frontier.picks for frontier in wide]))),
        any(frontier.thinned for frontier in wide),
        wide[0].price,
    ).pareto(most)
