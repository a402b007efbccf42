"""p-values and selections of a pass, layer by layer, with intervals over documents."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ...measure.bootstrap import intervals
from .rows import ABOVE, CHANGE, rows, rows_by_layer
from .seen import entropy
from .statistics import (
    BINS,
    EDGES,
    LAMBDAS,
    LARGE,
    PROBABILITIES,
    cdf_statistic,
    count_p,
    flatness,
    histogram,
    joined,
    mean_statistic,
    pi0,
    quantiles,
    spearman_statistic,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...null.layers import TokenNull
    from ...null.model import Null
    from .seen import Seen, Selected
    from .statistics import Statistic


QQ = np.flatnonzero(EDGES <= 1)[::4]  # the points of the QQ curve


def p_value_rows(
    seen: Seen, null: Null | TokenNull, routing: str, groups: NDArray[np.int64], draws: int
) -> Iterator[dict[str, Any]]:
    """Rows of the histogram, the QQ curve, the quantiles, pi0 and whether it is flat (with a
    band over that alone), of each layer of a pass.

    null: the Null whose p-values are meant; groups (D,): each document's domain, within which
    documents are drawn.
    """
    for layer, logits in enumerate(seen.logits):
        counts = count_p(null.layer(layer).p_values(logits), seen.documents, seen.size)
        cdf = cdf_statistic(counts)

        def statistic(weights: NDArray[np.float64], cdf: Statistic = cdf) -> NDArray[np.float64]:
            below = cdf(weights)
            parts = histogram(below), pi0(below), quantiles(below), below[:, QQ]
            return np.concatenate(parts, axis=1)

        found = intervals(statistic, seen.size, groups=groups, draws=draws)
        pieces = (
            ("histogram", "density", np.arange(BINS) / BINS),
            ("pi0", "pi0", LAMBDAS),
            ("quantiles", "quantile", PROBABILITIES),
            ("cdf", "share at most", EDGES[QQ]),
        )
        start = 0
        for table, quantity, at in pieces:
            part = type(found)(*(field[start : start + len(at)] for field in found))
            yield from rows(table, routing, layer, quantity, np.asarray(at), part)
            start += len(at)

        def flat(weights: NDArray[np.float64], cdf: Statistic = cdf) -> NDArray[np.float64]:
            return flatness(cdf(weights))

        found = intervals(flat, seen.size, groups=groups, draws=draws)
        lambdas = (*LAMBDAS[LARGE + 1 :], LAMBDAS[LARGE])
        names = [CHANGE] * (len(lambdas) - 1) + [ABOVE]
        yield from rows("flatness", routing, layer, names, lambdas, found)


SELECTION = ("experts", "rejections", "P(R >= 1)", "P(R < min_k)", "P(R > max_k)")
CORRELATIONS = ("Spearman(R, entropy)", "Spearman(R, loss)")


def selection_rows(
    seen: Seen,
    selected: Selected,
    limits: tuple[int, int],
    routing: str,
    groups: NDArray[np.int64],
    draws: int,
) -> Iterator[dict[str, Any]]:
    """Rows of R of each layer and of all: means, floor and ceiling shares, Spearman correlations.

    limits: (min_k, max_k). R is the count before these clamp it.
    """
    statistics = []
    known = np.isfinite(seen.loss)
    for layer, logits in enumerate(seen.logits):
        r = selected.rejections[layer]
        values = np.stack([selected.counts[layer], r, r >= 1, r < limits[0], r > limits[1]], 1)
        # Both correlations over the tokens that have a next one.
        ys = np.stack([entropy(logits)[known], seen.loss[known]])
        statistics.append(
            joined(
                mean_statistic(values.astype(float), seen.documents, seen.size),
                spearman_statistic(r[known], ys, seen.documents[known], seen.size),
            )
        )
    names = (*SELECTION, *CORRELATIONS)

    def statistic(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        each = np.stack([one(weights) for one in statistics], axis=1)  # (B, L, M)
        return np.concatenate([each, each.mean(axis=1, keepdims=True)], axis=1).reshape(
            len(weights), -1
        )

    found = intervals(statistic, seen.size, groups=groups, draws=draws)
    yield from rows_by_layer("selection", routing, len(statistics), names, None, found)
