"""The Pareto front: what nothing else is better than in one way without being worse in another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def front(points: Sequence[Sequence[float | None]]) -> list[int]:
    """Places of the points that no other one dominates, in their order.

    points : (N, M), of each coordinate less is better. A point dominates another that it exceeds
        in no coordinate, if it is less in one: of equal ones all stay. Points with a coordinate
        of None or NaN are left out: they neither dominate nor belong to the front.
    """
    whole = [i for i, point in enumerate(points) if all(x is not None and x == x for x in point)]
    if not whole:
        return []
    values = np.array([points[i] for i in whole], float)  # (n, M)
    no_more = np.all(values[:, None] <= values, axis=2)
    less = np.any(values[:, None] < values, axis=2)
    dominated = np.any(no_more & less, axis=0).tolist()
    return [i for i, out in zip(whole, dominated, strict=True) if not out]
