"""The best labels for R equal steps, each with the same frontier.

The best sums of R labels lie near sums of vertices of the frontier's lower convex hull: all steps at one vertex, or
some at the next one. So R - 1 steps take two neighbouring vertices. One free step takes any label near them, to use the
remaining bytes. The sums that are tried depend only on the frontier, not on a budget.
"""

import numpy as np

from alignprop_fast.planner.frontier import Frontier, best

MOST_LABELS = 512


def hull(frontier: Frontier) -> np.ndarray:
    """Rows of the labels on the lower convex hull, in ascending need."""
    rows: list[int] = []
    need, cost = frontier.need.astype(float), frontier.cost
    for row in range(len(frontier)):
        while len(rows) >= 2:
            first, last = rows[-2], rows[-1]
            rise = (cost[last] - cost[first]) * (need[row] - need[first])
            if rise < (cost[row] - cost[first]) * (need[last] - need[first]):
                break
            rows.pop()
        rows.append(row)
    return np.array(rows)


class Repeated:
    """Frontiers of copies of a step, whose needs add up.

    Attributes:
        vertices: rows of the step on its lower convex hull.
    """

    def __init__(self, step: Frontier):
        self.step = step
        vertices = self.vertices = hull(step)
        lower, upper, free = [], [], []
        for index in range(max(len(vertices) - 1, 1)):
            window = vertices[max(index - 1, 0)], vertices[min(index + 2, len(vertices) - 1)]
            free.append(np.arange(window[0], window[1] + 1))
            lower.append(np.full(len(free[-1]), vertices[index]))
            upper.append(np.full(len(free[-1]), vertices[min(index + 1, len(vertices) - 1)]))
        self._lower, self._upper, self._free = (np.concatenate(rows) for rows in (lower, upper, free))

    def frontier(self, copies: int) -> Frontier:
        """The frontier of this many copies, at least one.

        Decisions are rows of the step: lower vertex, upper vertex, how many copies take the upper one, free label.
        """
        lower, upper, free, times = self._lower, self._upper, self._free, np.arange(copies)[:, None]
        need, seconds, host = (
            ((copies - 1 - times) * values[lower] + times * values[upper] + values[free]).ravel()
            for values in (self.step.need, self.step.seconds, self.step.host)
        )
        rows, thinned = best(need, seconds + self.step.price * host, MOST_LABELS)
        chosen, which = np.divmod(rows, len(free))
        picks = np.stack((lower[which], upper[which], chosen, free[which]), axis=1).astype(np.int16)
        return Frontier(need[rows], seconds[rows], host[rows], picks, self.step.thinned or thinned, self.step.price)
