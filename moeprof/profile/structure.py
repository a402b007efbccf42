"""How strongly experts go together, and an order in which that shows.

E experts; pairs[i, j]: tokens that select both; moves[i, j]: tokens from i to j.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..profiler.tally import Counts


def pair_structure(counts: Counts) -> float:
    """How far the pairs are from those of independent experts, 0 to 1; nan without pairs.

    Half the sum of |N_ij − c N_i N_j| over the sum of N_ij, i ≠ j, c such that the sums agree.
    """
    pairs = counts.pairs * (1.0 - np.eye(counts.num_experts))
    load = counts.load[0].astype(float)
    return _distance(pairs, np.outer(load, load) * (1 - np.eye(len(load))))


def move_structure(counts: Counts) -> float:
    """The same of the moves from the layer before: from independence of where tokens come from."""
    moves = counts.moves.astype(float)
    return _distance(moves, np.outer(moves.sum(1), moves.sum(0)))


def _distance(table: NDArray[np.float64], independent: NDArray[np.float64]) -> float:
    if not table.sum() or not independent.sum():
        return float("nan")
    return float(np.abs(table / table.sum() - independent / independent.sum()).sum() / 2)


def strongest(counts: Sequence[Counts], structure: Callable[[Counts], float]) -> int | None:
    """The layer with the most structure; None if no layer has pairs."""
    values = np.array([structure(c) if c.has_pairs else np.nan for c in counts])
    return None if np.isnan(values).all() else int(np.nanargmax(values))


def clustered(table: NDArray[np.float64]) -> NDArray[np.int64]:
    """An order of the rows (E, ·) that puts rows alike side by side."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import pdist

    rows = np.nan_to_num(np.asarray(table, dtype=float))
    if len(rows) < 3:
        return np.arange(len(rows))
    size = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = rows / np.where(size > 0, size, 1)  # by direction: cosine, defined for zeros too
    # The distances, as linkage takes some square tables for a matrix of these and warns.
    return leaves_list(linkage(pdist(rows), "average", optimal_ordering=len(rows) <= 128))
