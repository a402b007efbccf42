"""A null fitted on domain A, checked on the held-out text of domain B."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ...measure.bootstrap import intervals
from ...measure.fitting import fit_null
from ...measure.passes import quick
from .rows import POOLED, rows_by_layer
from .seen import select
from .statistics import cdf_statistic, count_p, joined, mean_statistic

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from ...checks import Tokenizer
    from ...null.model import Null
    from ...routers.base import Router
    from ...texts.documents import Text
    from .seen import Seen, Selected
    from .statistics import Statistic


def domain_nulls(
    model: nn.Module,
    tokenizer: Tokenizer,
    null: Null,
    documents: Iterable[Text],
    step: Callable[[], object] = lambda: None,
) -> dict[str, Null]:
    """{domain: a null of the kind and score of `null`, fitted to the domain's documents}."""
    texts: dict[str, list[str]] = {}
    for document in documents:
        texts.setdefault(document.domain, []).append(document.text)
    options: dict[str, Any] = {"kind": null.kind, "score": null.score, "progress": False}
    if null.kind == "trimmed":
        options |= {"r_high": null.r_high, "r_low": null.r_low}
    fitted = {}
    with quick(model):
        for domain, of_domain in texts.items():
            fitted[domain] = fit_null(model, tokenizer, of_domain, **options)
            step()
    return fitted


def transfer_rows(
    nulls: Mapping[str, Null],
    fitted_on: tuple[Seen, NDArray[Any]],
    seen: Seen,
    domains: NDArray[Any],
    router: Router,
    draws: int,
) -> Iterator[dict[str, Any]]:
    """Rows, for each null and domain B: P(R >= 1), experts, KS distance; by layer and of all.

    Parameters
    ----------
    nulls : {name: Null}, the domain that each was fitted on, or `POOLED`
    fitted_on : (Seen, domains (D',)) of the calibration documents through the stock model
    seen, domains : the held-out text through the stock model; (D,) each document's domain
    router : Router; only P(R >= 1) and the experts of one on p-values depend on the null

    The KS distance is between the p-values of domain B's held-out text and of the text that the
    null was fitted on, both under that null: on the diagonal it shows what two texts of one
    domain differ by. Intervals are over the documents of B, NaN for a single one; the fitted
    null, and the text it was fitted on, stay as they are. NaN, too, where the calibration text
    has none of the null's domain.
    """
    calibration, calibration_domains = fitted_on
    layers = len(seen.logits)
    for name, null in nulls.items():
        selected = select(router, seen, null)
        source = np.flatnonzero((calibration_domains == name) | (name == POOLED))
        counts, shares = [], []
        for layer in range(layers):
            p = null.layer(layer).p_values(seen.logits[layer])
            counts.append(count_p(p, seen.documents, seen.size))
            p = null.layer(layer).p_values(calibration.logits[layer])
            own = count_p(p, calibration.documents, calibration.size)
            shares.append(cdf_statistic(own[source])(np.ones((1, len(source)))))
        for domain in dict.fromkeys(domains):
            documents = np.flatnonzero(domains == domain)
            statistic = _of_domain(documents, seen, selected, counts, shares)
            found = intervals(statistic, len(documents), draws=draws)
            names = ("P(R >= 1)", "experts", "KS distance")
            yield from rows_by_layer("transfer", name, layers, names, domain, found)


def _of_domain(
    documents: NDArray[np.int64],
    seen: Seen,
    selected: Selected,
    counts: list[NDArray[np.int64]],
    shares: list[NDArray[np.float64]],
) -> Statistic:
    """The statistic of one domain's documents: (B, (L + 1) * 3), the last three are means."""
    place = np.full(seen.size, -1)
    place[documents] = np.arange(len(documents))
    rows_of = np.flatnonzero(place[seen.documents] >= 0)
    by_document = place[seen.documents[rows_of]]
    parts = []
    for layer, share in enumerate(shares):
        r, k = (x[layer][rows_of] for x in (selected.rejections, selected.counts))
        values = np.stack([r >= 1, k], axis=1).astype(float)
        cdf = cdf_statistic(counts[layer][documents])

        def distance(
            weights: NDArray[np.float64], cdf: Statistic = cdf, share: NDArray[np.float64] = share
        ) -> NDArray[np.float64]:
            return np.abs(cdf(weights) - share).max(axis=1, keepdims=True)

        parts.append(joined(mean_statistic(values, by_document, len(documents)), distance))

    def statistic(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        each = np.stack([part(weights) for part in parts], axis=1)
        return np.concatenate([each, each.mean(axis=1, keepdims=True)], axis=1).reshape(
            len(weights), -1
        )

    return statistic
