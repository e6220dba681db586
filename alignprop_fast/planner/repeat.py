"""The best labels for R equal steps, each with the same frontier.

The best sums of R labels lie near sums of vertices of the frontier's lower convex hull: all steps at one vertex, or
some at the next one. So R - 1 steps take two neighbouring vertices. One free step takes any label near them, to use the
remaining bytes. The sums that are tried depend only on the frontier, not on a budget.
"""

from collections.abc import Iterator

import numpy as np

from alignprop_fast.planner.frontier import Frontier

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


def repeated(step: Frontier, most_steps: int) -> Iterator[Frontier]:
    """Frontiers of 1, 2, ... most_steps copies of a step; their needs add up.

    Decisions are rows of `step`: lower vertex, upper vertex, how many copies take the upper one, free label.
    """
    vertices = hull(step)
    lower_list, upper_list, free_list = [], [], []
    for index in range(max(len(vertices) - 1, 1)):
        window = vertices[max(index - 1, 0)], vertices[min(index + 2, len(vertices) - 1)]
        free = np.arange(window[0], window[1] + 1)
        free_list.append(free)
        lower_list.append(np.full(len(free), vertices[index]))
        upper_list.append(np.full(len(free), vertices[min(index + 1, len(vertices) - 1)]))
    lower, upper, free = (np.concatenate(rows) for rows in (lower_list, upper_list, free_list))
    for copies in range(1, most_steps + 1):
        times = np.arange(copies)[:, None]
        need, seconds, host = (
            ((copies - 1 - times) * values[lower] + times * values[upper] + values[free]).ravel()
            for values in (step.need, step.seconds, step.host)
        )
        picks = [np.broadcast_to(rows, (copies, len(free))).ravel() for rows in (lower, upper, times, free)]
        labels = Frontier(need, seconds, host, np.stack(picks, axis=1).astype(np.int16), step.thinned, step.price)
        yield labels.pareto(MOST_LABELS)
