"""p-value tables: from counts to the arrays that the C kernels read, and their NumPy references.

Form "table", float64 (3 + 8193,): x_max, p_max, beta, sf at the 8193 edges. p is 1 at or below
-32; linear between the edges up to x_max, for a counted null the largest score seen; beyond it
the exponential tail p_max * exp(-(s - x_max) / beta), never 0.

Form "conformal", float64 (1 + 8193 + 1024,): n; the number of scores >= each edge; the largest
scores, descending, padded with -inf. p = (1 + #{scores >= s}) / (n + 1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..backends.spec import BINS, BINS_PER_UNIT, HIGH, LARGEST, LOW
from .scores import EDGES, TINY, bins_of, keep_largest

if TYPE_CHECKING:
    from numpy.typing import NDArray


__all__ = ["conformal_p", "conformal_table", "counted_table", "pooled", "table_p"]


def pooled(
    counts: NDArray[np.uint64], largest: NDArray[np.float32]
) -> tuple[NDArray[np.uint64], NDArray[np.float64]]:
    """((8192,), (<= 1024,) float64 descending): some experts' histograms as one.

    counts: (E,8192) uint64; largest: (E,K) float32, padded with -inf.
    """
    kept = keep_largest(largest[np.isfinite(largest)][None])[0]
    return counts.sum(axis=0, dtype=np.uint64), kept.astype(np.float64)


def at_least(per_bin: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """(8192,) the number of scores at or above each bin's left edge."""
    return np.cumsum(per_bin[::-1])[::-1]


def _mean_excess(per_bin: NDArray[np.uint64], largest: NDArray[np.float64]) -> float:
    """Mean excess of the top 1 % (m = ceil(n/100) scores) over the score ranked m + 1.

    For an exponential tail that is an unbiased estimate of its mean. Scores beyond the stored
    largest count as the middle of their bin (2^-8 off at most). At least one bin width, so that
    tied scores leave a tail that still falls.
    """
    n = int(per_bin.sum())
    m = min(-(-n // 100), n - 1)
    if m == 0:
        return 1 / BINS_PER_UNIT
    stored = largest[: m + 1]
    rest = per_bin - np.bincount(bins_of(stored), minlength=BINS).astype(np.uint64)
    seen = np.minimum(np.cumsum(rest[::-1]), m + 1 - stored.size).astype(np.int64)
    take = np.diff(seen, prepend=0)
    middle = HIGH - (np.arange(BINS) + 0.5) / BINS_PER_UNIT  # descending, as `take`
    threshold = middle[take > 0][-1] if m + 1 > stored.size else stored[-1]
    total = stored.sum() + take @ middle - threshold  # the threshold is not part of the top
    return max(total / m - threshold, 1 / BINS_PER_UNIT)


def counted_table(per_bin: NDArray[np.uint64], largest: NDArray[np.float64]) -> NDArray[np.float64]:
    """The "table" form of counted scores: per_bin (8192,) uint64, largest (<= 1024,) descending.

    sf(edge) is the share of scores >= edge; those at or below -32 count as -32, so sf(-32) = 1.
    """
    above = at_least(per_bin)
    n, x_max = float(above[0]), largest[0]
    ties: Any = np.count_nonzero(largest == x_max)
    if ties == LARGEST:  # more may have been dropped: take the whole of their bin
        ties = above[bins_of(x_max)]
    top = np.count_nonzero(largest >= HIGH)  # never read: above 32 the last bin ends at x_max
    sf = np.append(above, np.uint64(top)) / n
    return np.concatenate([[x_max, ties / n, _mean_excess(per_bin, largest)], sf])


def table_p(scores: NDArray[np.float64], table: NDArray[np.float64]) -> NDArray[np.float64]:
    """p-values of float64 scores (...) by a "table"; the rule is in the module's docstring.

    Written so that rounding can break neither the order nor p > 0: exact at the right end of a
    bin and never above its left end.
    """
    (x_max, p_max, beta), sf = table[:3], table[3:]
    i = bins_of(scores)
    left, right = EDGES[i], EDGES[i + 1]
    last = (i == BINS - 1) | (right >= x_max)  # the bin of the largest score ends there
    right, p_right = np.where(last, x_max, right), np.where(last, p_max, sf[i + 1])
    share = np.zeros_like(scores)
    inside = (scores > LOW) & (scores < right)
    np.divide(right - scores, right - left, out=share, where=inside)
    p = np.minimum(sf[i], p_right + (sf[i] - p_right) * share)
    beyond = scores > x_max
    excess = np.where(beyond, scores - x_max, 0)
    tail = np.maximum(p_max * np.exp(-excess / beta), TINY)
    return np.where(scores <= LOW, 1.0, np.where(beyond, tail, p))


def conformal_table(
    per_bin: NDArray[np.uint64], largest: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The "conformal" form of counted scores; arguments as `counted_table`."""
    above = at_least(per_bin)
    top = np.count_nonzero(largest >= HIGH)
    padded = np.full(LARGEST, -np.inf)
    padded[: largest.size] = largest
    return np.concatenate([[above[0]], above, [top], padded]).astype(np.float64)


def conformal_p(scores: NDArray[np.float64], table: NDArray[np.float64]) -> NDArray[np.float64]:
    """p-values (1 + c) / (n + 1) of float64 scores (...) by a "conformal" table.

    c = #{scores >= s}, exact where n <= 1024 or s lies above the last stored one; elsewhere the
    whole bin of s counts, which makes p larger, never smaller.
    """
    n, above, largest = table[0], table[1 : 2 + BINS], table[2 + BINS :]
    exact = LARGEST - np.searchsorted(largest[::-1], scores, side="left")
    known = (scores > largest[-1]) | (n <= LARGEST)
    # With n <= 1024 the padding is -inf: a score of -inf would count it.
    count = np.where(known, np.minimum(exact, n), above[bins_of(scores)])
    return (1.0 + count) / (n + 1.0)
