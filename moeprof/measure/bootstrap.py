"""Intervals by resampling documents: tokens of one document are not independent of each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


DRAWS = 2000
FEW_DOCUMENTS = 10  # intervals over fewer are too narrow
MORE_DOCUMENTS = (
    "Give more documents: several files, or a .jsonl, which has one in each line (a plain text "
    "file is one), and enough tokens to reach them."
)
ROUNDING = 1e-9  # a statistic that varies by less is constant


class Intervals(NamedTuple):
    """95 % intervals of M statistics; arrays (M,).

    pointwise: each covers its own value with 95 %; bands (max-|t|): all of them together do.
    """

    estimate: NDArray[np.float64]
    error: NDArray[np.float64]  # bootstrap standard error
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    band_low: NDArray[np.float64]
    band_high: NDArray[np.float64]


def bootstrap(
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    documents: int,
    *,
    draws: int = DRAWS,
    seed: int = 0,
    groups: ArrayLike | None = None,
) -> Intervals:
    """Intervals of `statistic` over documents that are drawn with replacement.

    Parameters
    ----------
    statistic : function of weights (B, D) -> (B, M)
        Row b weighs each document by how often it was drawn. All M statistics are of the same
        draw, so differences between them are paired. Called in pieces of at most 256 draws.
    documents : int
        D.
    groups : (D,) integers, optional
        Domains: documents are drawn within their own. Those that have a single document, which
        would seem not to vary, are one together; if there is one such, with the smallest other.

    Returns
    -------
    Intervals
        The estimate is at weights of 1. Pointwise: percentiles. Bands: estimate -+ q * error, q
        the 95 % quantile over draws of max_m |draw_m - estimate_m| / error_m; statistics that do
        not vary have no say in q.
    """
    rng = np.random.default_rng(seed)
    groups = np.zeros(documents, int) if groups is None else _of_several(np.asarray(groups))
    weights = np.zeros((draws, documents))
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        size = len(members)
        weights[:, members] = rng.multinomial(size, [1 / size] * size, draws)
    estimate = statistic(np.ones((1, documents)))[0]
    drawn = np.concatenate([statistic(weights[i : i + 256]) for i in range(0, draws, 256)])
    error = drawn.std(axis=0, ddof=1)
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    varies = error > ROUNDING
    t = np.abs(drawn - estimate)[:, varies] / error[varies]
    q = np.quantile(t.max(axis=1), 0.95) if varies.any() else 0.0
    return Intervals(estimate, error, low, high, estimate - q * error, estimate + q * error)


def intervals(
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]], documents: int, **options: Any
) -> Intervals:
    """`bootstrap`; of a single document, which can't vary, the estimate alone, the rest NaN."""
    found = bootstrap(statistic, documents, **options)
    if documents > 1:
        return found
    return Intervals(found.estimate, *[np.full_like(found.estimate, np.nan)] * 5)


def _of_several(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """The groups, those of one member made one together, and that of several."""
    members, sizes = np.unique(groups, return_inverse=True, return_counts=True)[1:]
    alone = sizes[members] == 1
    if alone.sum() == 1 and len(sizes) > 1:
        alone |= members == np.argmin(np.where(sizes > 1, sizes, len(groups)))
    return np.where(alone, -1, members)
