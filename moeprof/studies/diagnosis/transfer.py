"""A null fitted on domain A, checked on the held-out text of domain B."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ...measure.bootstrap import intervals, without_ends
from ...measure.fitting import fit_null
from ...measure.passes import quick
from .rows import POOLED, rows_by_layer
from .seen import select
from .statistics import cdf_statistic, count_p, mean_statistic

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from ...checks import Tokenizer
    from ...null.model import Null
    from ...routers.base import Router
    from ...texts.documents import Text
    from .seen import Seen, Selected
    from .statistics import Statistic


# A percentile interval of a mean over n documents lies between their smallest and largest value,
# and these have the median of all documents between them in 1 - 2 / 2^n: in 94 % of 5, 97 % of 6.
LEAST = 6


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
    domain differ by. It has no interval: a largest distance is above 0 by chance alone, and in
    a draw of documents more so. Other intervals are over the documents of B, NaN for fewer than
    LEAST; the fitted null, and the text it was fitted on, stay as they are. NaN, too, where the
    calibration text has none of the null's domain.
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
            size = len(documents)
            statistic = _of_domain(documents, seen, selected)
            found = intervals(statistic, size, least=LEAST, draws=draws)
            names = ("P(R >= 1)", "experts")
            yield from rows_by_layer("transfer", name, layers, names, domain, found)
            everything = np.ones((1, size))
            of_domain = [cdf_statistic(one[documents])(everything) for one in counts]
            distance = np.abs(np.stack(of_domain) - np.stack(shares)).max(axis=(1, 2))
            found = without_ends(np.append(distance, distance.mean()))
            yield from rows_by_layer("transfer", name, layers, ("KS distance",), domain, found)


def _of_domain(documents: NDArray[np.int64], seen: Seen, selected: Selected) -> Statistic:
    """P(R >= 1) and experts of one domain's documents: (B, (L + 1) * 2), the last two are means."""
    place = np.full(seen.size, -1)
    place[documents] = np.arange(len(documents))
    rows_of = np.flatnonzero(place[seen.documents] >= 0)
    by_document = place[seen.documents[rows_of]]
    values = np.stack([selected.rejections >= 1, selected.counts], axis=2)[:, rows_of]
    values = np.concatenate([values, values.mean(axis=0, keepdims=True)]).swapaxes(0, 1)
    return mean_statistic(values.reshape(len(rows_of), -1), by_document, len(documents))
