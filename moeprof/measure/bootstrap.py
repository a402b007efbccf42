"""Intervals by resampling documents: tokens of one document are not independent of each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


DRAWS = 2000
FEW_DOCUMENTS = 10  # intervals over fewer are too narrow (of one domain; see `are_few`)
MORE_DOCUMENTS = (
    "Give more documents: several files, or a .jsonl, which has one in each line (a plain text "
    "file is one), and enough tokens to reach them."
)
NORMAL = 1.959963984540054  # the 97.5 % quantile of the normal distribution
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
        Row b weighs each document: of n in its group n - 1 are drawn, and one that was drawn c
        times has weight c n / (n - 1), so that small groups vary as much as their documents do.
        All M statistics are of the same draw, so differences between them are paired. Called in
        pieces of at most 256 draws.
    documents : int
        D.
    groups : (D,) integers, optional
        Domains: documents are drawn within their own. Those that have a single document, which
        would seem not to vary, are one together; if there is one such, with the smallest other.

    Returns
    -------
    Intervals
        The estimate is at weights of 1. Pointwise: percentiles, at the levels that a normal
        variable has at -+ t, the 97.5 % quantile of Student's t. Bands: estimate -+ q * error, q
        the 95 % quantile over draws of max_m |draw_m - estimate_m| / error_m, made wider in the
        same way; statistics that do not vary have no say in q. t has as many degrees of freedom
        as there are documents less groups.

    Source: Rao and Wu (1988), Resampling inference with complex survey data, for the draws;
    Hesterberg (2015), What teachers should know about the bootstrap, for the percentiles.
    """
    from scipy.special import ndtr

    rng, groups = np.random.default_rng(seed), _groups(documents, groups)
    freedom = _freedom(documents, groups)
    t = _student(freedom, NORMAL)
    weights = np.ones((draws, documents))
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        if (size := len(members)) > 1:
            counts = rng.multinomial(size - 1, [1 / size] * size, draws)
            weights[:, members] = counts * size / (size - 1)
    estimate = statistic(np.ones((1, documents)))[0]
    drawn = np.concatenate([statistic(weights[i : i + 256]) for i in range(0, draws, 256)])
    error = drawn.std(axis=0, ddof=1)
    varies = error > ROUNDING
    error[~varies], drawn[:, ~varies] = 0, estimate[~varies]
    low, high = np.quantile(drawn, [ndtr(-t), ndtr(t)], axis=0)
    farthest = np.abs(drawn - estimate)[:, varies] / error[varies]
    q = _student(freedom, np.quantile(farthest.max(axis=1), 0.95)) if varies.any() else 0.0
    return Intervals(estimate, error, low, high, estimate - q * error, estimate + q * error)


def are_few(documents: int, groups: ArrayLike | None = None) -> bool:
    """Whether 95 % intervals over several documents hold their value in less than 95 %.

    groups : as `bootstrap` takes them: what counts is documents less groups.
    """
    return 1 < documents and _freedom(documents, _groups(documents, groups)) < FEW_DOCUMENTS - 1


def said_of_few(text: str, domains: Sequence[str]) -> Iterator[str]:
    """A sentence where the documents of a text, drawn within their domains, are too few.

    text : its name, which begins the sentence; domains : each document's
    """
    if are_few(len(domains), domains):
        count = len(set(domains))
        yield (
            f"{text} has {len(domains)} documents only, in {count} domain{'s' * (count != 1)}: "
            f"intervals over so few are too narrow. {MORE_DOCUMENTS}"
        )


def _groups(documents: int, groups: ArrayLike | None) -> NDArray[np.int64]:
    return np.zeros(documents, int) if groups is None else _of_several(np.asarray(groups))


def _freedom(documents: int, groups: NDArray[np.int64]) -> int:
    return documents - len(np.unique(groups))


def _student(freedom: int, z: float) -> float:
    """Where Student's t has the level that a normal variable has at z; z with no freedom."""
    from scipy.special import ndtr, stdtrit

    return -float(stdtrit(freedom, ndtr(-z))) if freedom else z


def intervals(
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    documents: int,
    *,
    least: int = 2,
    **options: Any,
) -> Intervals:
    """`bootstrap`; of fewer documents than `least` the estimate alone: a single one can't vary."""
    if documents < least:
        return without_ends(statistic(np.ones((1, documents)))[0])
    return bootstrap(statistic, documents, **options)


def without_ends(estimate: NDArray[np.float64]) -> Intervals:
    """(M,) estimates that have no intervals: all else is NaN."""
    return Intervals(estimate, *[np.full_like(estimate, np.nan)] * 5)


def _of_several(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """The groups, those of one member made one together, and that of several."""
    members, sizes = np.unique(groups, return_inverse=True, return_counts=True)[1:]
    alone = sizes[members] == 1
    if alone.sum() == 1 and len(sizes) > 1:
        alone |= members == np.argmin(np.where(sizes > 1, sizes, len(groups)))
    return np.where(alone, -1, members)
