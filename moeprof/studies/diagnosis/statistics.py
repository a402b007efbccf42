"""Statistics of documents under weights: what `bootstrap` draws (moeprof/measure/bootstrap.py).

Each `..._statistic` returns a function of weights (B, D), those of D documents, to (B, M); at
weights of 1 it is the plain statistic of all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import rankdata

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


Statistic = Callable[["NDArray[np.float64]"], "NDArray[np.float64]"]  # (B, D) -> (B, M)
BINS = 20
LAMBDAS = tuple(i / 10 for i in range(1, 10))
LARGE = 4  # from this of LAMBDAS on, 0.5, p-values are taken to be of experts not needed
PROBABILITIES = (1e-4, 1e-3, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
# p-values are counted between these: the histogram's edges, the lambdas and, for quantiles of
# small ones, 20 a decade from 1e-12. So all of a text is D x 300 integers a layer.
EDGES = np.unique(
    np.round(
        np.concatenate(
            [
                np.arange(1, BINS + 1) / BINS,
                LAMBDAS,
                np.arange(1, 100) / 100,
                10.0 ** np.arange(-12, 0, 0.05),
            ]
        ),
        14,
    )
)


def count_p(p: NDArray[np.float64], documents: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """(D, len(EDGES) + 1) int64: how many of p (T, E) lie in (EDGES[i-1], EDGES[i]].

    documents (T,): each row's; size: D. The last column is for p > 1, hence 0.
    """
    at = np.searchsorted(EDGES, p, side="left")
    flat = documents[:, None] * (len(EDGES) + 1) + at
    return np.bincount(flat.ravel(), minlength=size * (len(EDGES) + 1)).reshape(size, -1)


def cdf_statistic(counts: NDArray[np.int64]) -> Statistic:
    """The share of p-values <= each of EDGES: (B, len(EDGES)). counts as `count_p` has them.

    NaN where there is no p-value: no document, or none drawn that has tokens.
    """
    below = counts.cumsum(axis=1).astype(float)

    def statistic(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        drawn = weights @ below
        return divide(drawn[:, :-1], drawn[:, -1:])

    return statistic


def at_edges(values: ArrayLike) -> NDArray[np.int64]:
    """The columns of `values` in EDGES; ValueError if one is not there."""
    at = np.searchsorted(EDGES, np.asarray(values) - 1e-13)
    if not np.allclose(EDGES[at], values, rtol=1e-9, atol=0):
        raise ValueError(f"{values!s}: not all are edges")
    return at


def histogram(cdf: NDArray[np.float64]) -> NDArray[np.float64]:
    """(B, BINS) density in bins of equal width, 1 where p-values are uniform."""
    inner = cdf[:, at_edges(np.arange(1, BINS + 1) / BINS)]
    return np.diff(inner, axis=1, prepend=0) * BINS


def pi0(cdf: NDArray[np.float64]) -> NDArray[np.float64]:
    """(B, 9) Storey's share of true nulls, #{p > lambda} / ((1 - lambda) n), not capped at 1.

    Source: Storey 2002, J. R. Statist. Soc. B 64, eq. (3); lambda 0.1 to 0.9.
    """
    return (1 - cdf[:, at_edges(LAMBDAS)]) / (1 - np.array(LAMBDAS))


def flatness(cdf: NDArray[np.float64]) -> NDArray[np.float64]:
    """(B, 5): pi0 at each lambda above 0.5 less pi0 at 0.5, then pi0 at 0.5 less 1.

    p-values that are uniform above 0.5 have 0 in the first four, and in the last at most 0.
    """
    large = pi0(cdf)[:, LARGE:]
    return np.concatenate([large[:, 1:] - large[:, :1], large[:, :1] - 1], axis=1)


def quantiles(
    cdf: NDArray[np.float64], probabilities: Sequence[float] = PROBABILITIES
) -> NDArray[np.float64]:
    """(B, M) quantiles, between edges on a line in log p; never below the first edge.

    A cell of EDGES is at most 12 % wide, so is the error.
    """
    logs = np.log10(EDGES)
    return np.stack([10 ** np.interp(probabilities, row, logs) for row in cdf])


def mean_statistic(
    values: NDArray[np.float64], documents: NDArray[np.int64], size: int
) -> Statistic:
    """Means over tokens of values (T, M): (B, M). A NaN is left out of its column's mean."""
    known = np.isfinite(values)
    total = _sums(np.where(known, values, 0), documents, size)
    number = _sums(known.astype(float), documents, size)
    return lambda weights: divide(weights @ total, weights @ number)


def spearman_statistic(
    x: NDArray[Any], ys: NDArray[np.float64], documents: NDArray[np.int64], size: int
) -> Statistic:
    """Spearman's correlation of x (T,) with each of ys (M, T): (B, M), NaN where one is constant.

    Average ranks of the whole text, which stay as they are in every draw: re-ranking each draw
    would cost a sort of all tokens and moves the intervals by less than their own error.
    """
    x = _standard(rankdata(x))
    parts = []
    for y in (_standard(rankdata(y)) for y in ys):
        columns = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)
        parts.append(_sums(columns, documents, size))
    sums = np.stack(parts)  # (M, D, 6)

    def statistic(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        n, sx, sy, sxx, syy, sxy = np.moveaxis(weights @ sums, 2, 0)
        spread = (n * sxx - sx**2).clip(0) * (n * syy - sy**2).clip(0)
        return divide(n * sxy - sx * sy, np.sqrt(spread)).T

    return statistic


def joined(*statistics: Statistic) -> Statistic:
    """Several statistics side by side, of the same draws."""
    return lambda weights: np.concatenate([one(weights) for one in statistics], axis=1)


def _standard(ranks: NDArray[np.float64]) -> NDArray[np.float64]:
    """Centred and scaled, so that sums of products keep their digits; constants become 0."""
    ranks = ranks - ranks.mean()
    return ranks / max(np.abs(ranks).max(), 1)


def _sums(
    values: NDArray[np.float64], documents: NDArray[np.int64], size: int
) -> NDArray[np.float64]:
    """(D, M) sums of values (T, M) by document."""
    return np.stack([np.bincount(documents, column, size) for column in values.T], axis=1)


def divide(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """a / b, NaN where b is 0."""
    return np.divide(a, b, out=np.full(np.broadcast(a, b).shape, np.nan), where=b > 0)
