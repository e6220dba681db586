"""How fast a training step can be in a given memory, for each number of resident steps.

Resident steps, decoder and reward form one chain in time. So one frontier of (bytes, seconds) for each number of
resident steps answers every budget. Replays have their own frontier. Small tables are solved exactly, with the frontier
of all segments of all resident steps. In large tables the frontier of one step is repeated.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from alignprop_fast.planner.block_option import Options
from alignprop_fast.planner.cuda_graphs import GraphUse
from alignprop_fast.planner.frontier import Frontier, chain, in_front, least_need, together
from alignprop_fast.planner.plan import Plan
from alignprop_fast.planner.repeat import Repeated, hull
from alignprop_fast.planner.table import CostTable
from alignprop_fast.planner.tail import tail_choices, tail_frontier

EXACT_SEGMENTS = 256  # of all resident steps together; above this, or with too many labels, one step is repeated
EXACT_LABELS = 4096
STEP_LABELS = 384
REPLAY_LABELS = 1024
TAIL_LABELS = 64
ROUNDING = 1e-9  # relative, of seconds that are sums in another order


@dataclass(frozen=True)
class Candidate:
    """The fastest candidate for one number of resident steps and one use of CUDA graphs, as rows of the two frontiers.

    need: room that it takes, with what its graphs keep reserved.
    """

    seconds: float
    need: int
    resident: int
    row: int
    replay_row: int
    use: GraphUse = GraphUse.NONE


@dataclass(frozen=True)
class _Replays:
    """Rows of a replay's frontier. pools: bytes that graphs reserve. needs: bytes beside those. seconds: of one replay
    without a graph."""

    rows: np.ndarray
    pools: np.ndarray
    needs: np.ndarray
    seconds: np.ndarray

    @classmethod
    def none(cls, pool_bytes: int) -> "_Replays":
        """What stands for the replay where every gradient step is resident."""
        return cls(np.array([-1]), np.array([pool_bytes]), np.zeros(1, np.int64), np.zeros(1))


class Curves:
    """Frontiers of one table: one for each number of resident steps, and one of a replay.

    Attributes:
        recorded: has the frontier of replays that run as CUDA graphs, which may not offload.
        prices: of a byte in host memory, in seconds, under which bounds are looked for.

    Args:
        price: seconds that a byte in host memory is charged, so that rows with less of it are found too.
    """

    def __init__(self, table: CostTable, num_steps: int, most_grad_steps: int, price: float = 0.0):
        self.table, self.num_steps, self.most_grad_steps = table, num_steps, most_grad_steps
        self.price, self.recorded, self.prices = price, self, [0.0]
        # Alive beside a step's own worst moment: the images, the sums of the gradients, and offloaded tensors in
        # transfer.
        self.above = table.image_bytes + table.sums_of(most_grad_steps) + table.transfer_bytes
        self.tail = replace(tail_frontier(table), price=price)
        self._resident: dict[int, Frontier] = {}

    @cached_property
    def replay(self) -> Frontier:
        return chain(self.table.step, Frontier.start(0, self.price), REPLAY_LABELS, self.above)

    def resident(self, count: int) -> Frontier:
        """The frontier of this many resident steps with decoder and reward."""
        if count not in self._resident:
            self._resident[count] = self._repeated(count) if self._exact is None else self._exact[count]
        return self._resident[count]

    @cached_property
    def _tails(self) -> tuple[Frontier, Frontier]:
        """The tail beside a step without gradient, and the tail alone, for the case that every step is resident."""
        alone = self.tail.indexed()
        return alone.at_least(max(self.table.sampling_bytes, self.table.closed[0])), alone

    @cached_property
    def _exact(self) -> list[Frontier] | None:
        """For each number of resident steps, all segments in one chain; None if there are too many labels."""
        if self.most_grad_steps * len(self.table.step) > EXACT_SEGMENTS:
            return None
        with_sampling, alone = self._tails
        frontiers = self._in_one_chain(with_sampling, min(self.most_grad_steps, self.num_steps - 1))
        if self.most_grad_steps == self.num_steps:
            frontiers += self._in_one_chain(alone, self.num_steps)[self.num_steps :]
        return frontiers if len(frontiers) == self.most_grad_steps + 1 else None

    def _in_one_chain(self, tail: Frontier, most_resident: int) -> list[Frontier]:
        """Frontiers with 0, 1, ... resident steps in front of the tail; stops at too many labels."""
        frontiers = [tail][: most_resident + 1]
        for _ in range(most_resident):
            for segment in reversed(self.table.step):
                tail = in_front(segment, tail, EXACT_LABELS, self.above)
                if tail.thinned:
                    return frontiers
            frontiers.append(tail)
        return frontiers

    @cached_property
    def _steps(self) -> Repeated:
        """Copies of a resident step, if its frontier is repeated.

        If a step's own worst moment exceeds the need of what follows, the bytes it adds depend on that need. The most
        that it can add is assumed, which is what it adds to the leanest tail.
        """
        least = int(min(tail.need[0] for tail in self._tails))
        step = chain(self.table.step, Frontier.start(least, self.price), STEP_LABELS, self.above)
        return Repeated(replace(step, need=step.need - least))

    def _repeated(self, count: int) -> Frontier:
        """Decisions: lower and upper label of the hull, how often, free label, tail."""
        rest, alone = self._tails
        tail = (alone if count == self.num_steps else rest).pareto(TAIL_LABELS)
        if count == 0:
            return tail
        steps = self._steps.frontier(count)
        return together(steps, tail, steps.need[:, None] + tail.need, STEP_LABELS)

    def exceed_host_limit(self) -> bool:
        """Whether the host limit excludes some of the plans."""
        limit = self.table.host_limit_bytes
        step_bytes = sum(max(option.host_bytes for option in segment.options) for segment in self.table.step)
        if limit is None or max(self.most_grad_steps, 1) * step_bytes + self.tail.host.max() <= limit:
            return False
        counts = range(self.most_grad_steps, -1, -1)  # the most bytes first
        return any(self.resident(count).host.max() > limit for count in counts) or self.replay.host.max() > limit

    def _allowed(self, frontier: Frontier, room: float) -> np.ndarray:
        """Rows that fit the room and the host limit, each faster than those before."""
        limit = self.table.host_limit_bytes
        fits = frontier.need <= room
        rows = np.flatnonzero(fits if limit is None else fits & (frontier.host <= limit))
        fastest = np.minimum.accumulate(frontier.seconds[rows])
        return rows[np.flatnonzero(np.diff(fastest, prepend=np.inf))]

    @cached_property
    def _hulls(self) -> list[tuple[Frontier, np.ndarray]]:
        """The labels of a resident step under each price of `prices`, and the rows on their lower convex hull."""
        steps = [replace(self._steps.step, price=price) for price in self.prices]
        return [(step, hull(step)) for step in steps]

    def _least_seconds(self, room: int) -> np.ndarray:
        """For 0, 1, ... resident steps with decoder and reward: seconds that no allowed row within the room beats.

        No sum of a step's labels lies below their convex hull. That holds under each price of a byte in host memory, of
        which a row pays at most the host limit.
        """
        counts = np.arange(self.most_grad_steps + 1)
        if self._exact is not None:
            return np.zeros(len(counts))
        bounds = []
        for step, rows in self._hulls:
            cost = np.minimum.accumulate(step.cost[rows])
            least = []
            for tail in self._tails:
                each = (room - tail.need + counts[:, None]) / np.maximum(counts, 1)[:, None]  # a byte more for rounding
                taken = counts[:, None] * np.where(
                    counts[:, None] > 0, np.interp(each, step.need[rows], cost, np.inf), 0
                )
                least.append((taken + tail.seconds + step.price * tail.host).min(axis=1))
            bound = np.where(counts == self.num_steps, least[1], least[0])
            bounds.append(bound - step.price * (self.table.host_limit_bytes or 0))
        return np.max(bounds, axis=0)

    def candidates(self, grad_steps: int, room: int, use: GraphUse, best: Callable[[], float]) -> Iterator[Candidate]:
        """The fastest for each number of resident steps, the most promising number first.

        best: () -> the fewest seconds of a candidate so far; numbers of resident steps that cannot reach them are left
        out.
        """
        least = self._least_seconds(room - self.table.pool_bytes(use, 0))
        replays, ratio = self._replays(room, use), self.table.replay_ratio_of(use)
        quickest = float(replays.seconds.min()) if len(replays.rows) else np.inf
        bounds = {
            resident: least[resident]
            + self._sampling_seconds(grad_steps, resident, use)
            + (grad_steps - resident) * ratio * (quickest if resident < grad_steps else 0.0)
            for resident in range(grad_steps + (0 if use.replays else 1))
        }
        for resident in sorted(bounds, key=bounds.__getitem__):
            if bounds[resident] * (1 - ROUNDING) > best():
                return
            mine = replays if resident < grad_steps else _Replays.none(self.table.pool_bytes(use, 0))
            if (found := self._candidate(grad_steps, room, use, resident, mine)) is not None:
                yield found

    def _candidate(
        self, grad_steps: int, room: int, use: GraphUse, resident: int, replays: "_Replays"
    ) -> Candidate | None:
        """The best pair of rows: a faster replay in a graph reserves more memory, which resident steps, decoder and
        reward then lack.

        A step without gradient runs inside the reserved memory. Its own is counted beside the resident steps all the
        same, where the decoder needs more anyway.
        """
        frontier = self.resident(resident)
        rows = self._allowed(frontier, np.inf)
        fits = np.searchsorted(frontier.need[rows], room - replays.pools, side="right") - 1
        possible = np.flatnonzero(fits >= 0)
        if len(possible) == 0:
            return None
        ratio = self.table.replay_ratio_of(use)
        seconds = frontier.seconds[rows[fits[possible]]] + (grad_steps - resident) * ratio * replays.seconds[possible]
        best = int(np.argmin(seconds))
        which = possible[best]
        row = int(rows[fits[which]])
        return Candidate(
            float(seconds[best]) + self._sampling_seconds(grad_steps, resident, use),
            int(replays.pools[which]) + max(int(frontier.need[row]), int(replays.needs[which])),
            resident,
            row,
            int(replays.rows[which]),
            use,
        )

    def _replays(self, room: int, use: GraphUse) -> "_Replays":
        """The replays that may be the best: the fastest within the room, or as graphs all within it."""
        if not use.replays:
            pool_bytes = self.table.pool_bytes(use, 0)
            rows = self._allowed(self.replay, room - pool_bytes)[-1:]
            pools = np.full(len(rows), pool_bytes)
            return _Replays(rows, pools, self.replay.need[rows], self.replay.seconds[rows])
        replay, above = self.recorded.replay, self.recorded.above
        pools = np.array([self.table.pool_bytes(use, int(need) - above) for need in replay.need])
        rows = np.flatnonzero(pools + above <= room)
        return _Replays(rows, pools[rows], np.full(len(rows), above), replay.seconds[rows])

    def _sampling_seconds(self, grad_steps: int, resident: int, use: GraphUse) -> float:
        """Seconds of all evaluations without gradient: first runs of replayed steps, and closed steps."""
        first, closed = self.table.sampling_seconds_of(use), self.table.closed_seconds_of(use)
        return (grad_steps - resident) * first + (self.num_steps - grad_steps) * closed

    def leanest_bytes(self, grad_steps: int) -> int:
        """No candidate needs less room than this."""
        replay = least_need(self.table.step, self.above) if grad_steps else 0
        return max(replay, int(self.tail.need[0]))

    def fits(self, grad_steps: int, room: int) -> bool:
        """Whether there is a candidate within the room."""
        return self.leanest_bytes(grad_steps) <= room and any(need <= room for need in self.least_needs(grad_steps))

    def least_needs(self, grad_steps: int) -> Iterator[int]:
        """The least room that has a candidate with a replay, and one with resident steps alone if all carry gradient.

        A resident step needs no less than a replay. But if all steps are resident, none runs without gradient. A way
        that the host limit excludes is left out.
        """
        tail = self._tails[0]
        rows, replays = self._allowed(tail, np.inf), self._allowed(self.replay, np.inf)
        if len(rows) and (len(replays) or not grad_steps):
            yield int(max(tail.need[rows[0]], self.replay.need[replays[0]] if grad_steps else 0))
        if grad_steps == self.num_steps:
            resident = self.resident(grad_steps)
            yield from map(int, resident.need[self._allowed(resident, np.inf)[:1]])

    def plan(self, steps: tuple[int, ...], candidate: Candidate) -> Plan:
        replayed = len(steps) - candidate.resident
        replays = self.recorded if candidate.use.replays else self
        picks = self.resident(candidate.resident).picks[candidate.row]
        decoder, reward = tail_choices(self.table, self.tail.picks[picks[-1]])
        return Plan(
            self.num_steps,
            resident_steps=steps[replayed:],
            replayed_steps=steps[:replayed],
            resident_options=tuple(self._resident_options(candidate.resident, picks)),
            replay_options=replays._options(replays.replay.picks[candidate.replay_row]) if replayed else {},
            graphs=candidate.use,
            decoder=decoder,
            reward=reward,
            exact=not (self.resident(candidate.resident).thinned or self.replay.thinned or self._exact is None),
        )

    def _resident_options(self, resident: int, picks: np.ndarray) -> list[Options]:
        if self._exact is not None:
            width = len(self.table.step)
            return [self._options(picks[width * step : width * (step + 1)]) for step in range(resident)]
        if resident == 0:
            return []
        lower, upper, times, free = (int(pick) for pick in picks[:4])
        rows = [lower] * (resident - 1 - times) + [upper] * times + [free]
        return [self._options(self._steps.step.picks[row]) for row in rows]

    def _options(self, picks: np.ndarray) -> Options:
        return {s.name: s.options[pick].name for s, pick in zip(self.table.step, picks, strict=True)}
