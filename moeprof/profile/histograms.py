"""What a histogram still tells of the values that it counted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


UNIT_EDGES = np.linspace(0, 1, 101)  # of what lies in [0, 1]


def percentile(histogram: NDArray[np.int64], edges: NDArray[np.float64], q: float) -> float:
    """`numpy.percentile(values, q)` of the values counted in `histogram`; nan if there are none.

    histogram (bins,), edges (bins + 1,). Each value is taken as the middle of its bin, so the
    error is at most half a bin's width.
    """
    total = int(histogram.sum())
    if not total:
        return float("nan")
    place = q / 100 * (total - 1)
    below = int(place)
    # The bin of the value of rank r (from 0) is the first whose running total exceeds r.
    ranks = (below, min(below + 1, total - 1))
    bins = np.searchsorted(np.cumsum(histogram), ranks, side="right")
    low, high = ((edges[bins] + edges[bins + 1]) / 2).tolist()
    return low + (place - below) * (high - low)
