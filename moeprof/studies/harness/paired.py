"""The difference between two runs of the same documents, with what chance makes of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...measure.bootstrap import DRAWS, bootstrap

if TYPE_CHECKING:
    from numpy.typing import NDArray

Aggregate = Callable[[Sequence[Any]], float]

FEW_DRAWS = 200  # where each draw is a call of the harness, as of BLEU

# Metrics that are a function of one ratio of sums over documents, by the names of lm_eval's
# functions (lm_eval/api/metrics.py). A document's value is the numerator, or (it, denominator).
_OF_A_RATIO: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "mean": lambda ratio: ratio,
    "perplexity": lambda ratio: np.exp(-ratio),
    "weighted_perplexity": lambda ratio: np.exp(-ratio),
    "bits_per_byte": lambda ratio: -ratio / math.log(2),
}


class Difference(NamedTuple):
    """Of a metric: with a router, less without.

    difference; low, high : its 95 % bootstrap interval over documents, both drawn together
    p : exact two-sided McNemar test, where each document is right or wrong; else None
    better, worse : documents that only one of the two got right; None as p
    """

    difference: float
    low: float
    high: float
    p: float | None
    better: int | None
    worse: int | None


def paired(
    values: Sequence[Any], reference: Sequence[Any], aggregate: Aggregate, *, seed: int = 0
) -> Difference:
    """The difference of `aggregate` between the values of D documents and those of the same
    documents in another run; ValueError where these aren't as many."""
    if len(values) != len(reference) or not values:
        raise ValueError(
            f"expected values of the same documents, got {len(values)} and {len(reference)}"
        )
    one, other = _by_weights(values, aggregate), _by_weights(reference, aggregate)
    draws = DRAWS if _name(aggregate) in _OF_A_RATIO else FEW_DRAWS
    found = bootstrap(
        lambda weights: (one(weights) - other(weights))[:, None],
        len(values),
        draws=draws,
        seed=seed,
    )
    counts = _discordant(values, reference) if _name(aggregate) == "mean" else None
    p, better, worse = (None, None, None) if counts is None else (_mcnemar(*counts), *counts)
    at = float(found.estimate[0])
    return Difference(at, float(found.low[0]), float(found.high[0]), p, better, worse)


def _name(aggregate: Aggregate) -> str:
    return getattr(aggregate, "__name__", "")  # a partial has none


def _by_weights(
    values: Sequence[Any], aggregate: Aggregate
) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    """A function of weights (B, D), as `bootstrap` draws them: the metric (B,) of each row."""
    transform = _OF_A_RATIO.get(_name(aggregate))
    if transform is None:

        def drawn(weights: NDArray[np.float64]) -> NDArray[np.float64]:
            rows = [np.repeat(np.arange(len(values)), _times_drawn(row)) for row in weights]
            made = [aggregate([values[int(i)] for i in row]) for row in rows]
            return np.array(made, np.float64)

        return drawn
    parts = np.array([v if isinstance(v, list | tuple) else (v, 1) for v in values], float)
    return lambda weights: transform((weights @ parts[:, 0]) / (weights @ parts[:, 1]))


def _times_drawn(weights: NDArray[np.float64]) -> NDArray[np.int64]:
    """Of D - 1 draws; the weights of the estimate are 1, and no other row is without a 0."""
    each = weights if weights.all() else weights * (1 - 1 / len(weights))
    return np.rint(each).astype(np.int64)


def _discordant(values: Sequence[Any], reference: Sequence[Any]) -> tuple[int, int] | None:
    """(documents right only here, only there); None unless each is right or wrong."""
    if not {*map(_plain, values), *map(_plain, reference)} <= {0.0, 1.0}:
        return None
    pairs = [(_plain(a), _plain(b)) for a, b in zip(values, reference, strict=True)]
    return sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)


def _plain(value: Any) -> float:
    return float(value) if isinstance(value, bool | int | float) else math.nan


def _mcnemar(better: int, worse: int) -> float:
    """Exact: under the null a document that differs is as likely better as worse."""
    from scipy.stats import binomtest

    differ = better + worse
    return float(binomtest(better, differ).pvalue) if differ else 1.0
