"""What the cells of a grid come to: a row for each configuration, as a table of pandas."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ...measure.bootstrap import bootstrap
from ...models.blocks import own_top_k
from ...routers import TopK
from ..comparison.speed import SPEED, summary
from ..sweep.compared import distances
from .planned import written

if TYPE_CHECKING:
    import pandas
    from numpy.typing import NDArray

    from .planned import Configuration
    from .work import GridWork


MEASURED = ("avg_experts_heldout", "avg_experts", "bytes_per_token", "bits_per_byte")
BITS = ("bits_above_own", "bits_above_static")
PERPLEXITY = "perplexity_above_own"
ENDS = ("", "_low", "_high")
SETTING = ("model", "bits", "text", "seed")
COLUMNS = (
    *SETTING,
    "null",
    "configuration",
    "router",
    "parameters",
    "budget",
    *MEASURED,
    *(name + end for name in BITS for end in ENDS),
    "perplexity",
    *(name + end for name in (PERPLEXITY, SPEED) for end in ENDS),
    "error",
)


def rows_of(
    work: GridWork,
    found: Mapping[str, dict[str, Any]],
    speeds: Mapping[str, list[float]],
    setting: dict[str, Any],
) -> list[dict[str, Any]]:
    """A dict of COLUMNS for each configuration.

    found: {configuration: result}; speeds: {configuration: tokens/s of each round}; setting: what
    SETTING names. Differences are to the model's own top-k on the same text, and to static top-k
    at as many experts where that was run; _low and _high are 95 % intervals over documents, None
    for one document. Of tokens/s it is the median, and the quartiles over the rounds. Besides
    COLUMNS: bits_above_static_band_low and _band_high, as `distances` gives them, and documents,
    how many the text has.
    """
    rows = []
    for one in work.configurations:
        result = found[one.name]
        rows.append(
            dict.fromkeys(COLUMNS)
            | setting
            | {
                "null": one.null,
                "configuration": one.name,
                "router": "topk" if one.router is None else one.router.name,
                "parameters": _parameters(one, result),
                "budget": one.budget,
                "perplexity": result.get("perplexity"),
                "error": result.get("error"),
            }
            | {name: result.get(name) for name in MEASURED}
            | (summary(speeds[one.name]) if speeds.get(one.name) else {})
        )
    measured = [(row, found[row["configuration"]]) for row in rows if not row["error"]]
    results = [result for _, result in measured]
    documents, seed = work.experiment.heldout.documents, setting["seed"]
    bits = distances(results, results[0], _line(work, found), documents, seed)
    above = _perplexity(work, results, seed)
    for (row, _), of_bits, of_perplexity in zip(measured, bits, above, strict=True):
        row.update(of_bits | of_perplexity | {"documents": len(documents)})
    return rows


def grid_frame(rows: list[dict[str, Any]]) -> pandas.DataFrame:
    """Rows of `run_grid` as a pandas table; parameters as text, "alpha=0.05, max_k=8"."""
    import pandas

    texts = [row | {"parameters": written(row["parameters"])} for row in rows]
    return pandas.DataFrame(texts, columns=list(COLUMNS))


def by_setting(rows: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(what SETTING names, in words; its rows) of each model, weights, text and seed."""
    settings: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        settings.setdefault(tuple(row[name] for name in SETTING), []).append(row)
    for values, of in settings.items():
        yield ", ".join(f"{name} {v}" for name, v in zip(SETTING, values, strict=True)), of


def _parameters(one: Configuration, result: Mapping[str, Any]) -> dict[str, Any]:
    """As the grid gives them, and what the budget set."""
    if one.budget is None or result.get("value") is None:
        return dict(one.parameters)
    return {result["parameter"]: result["value"], **one.parameters}


def _line(work: GridWork, found: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Static top-k of those that were run, k ascending."""
    ks = {}
    for one in work.configurations:
        if one.router is None:
            ks[own_top_k(work.experiment.model)] = one.name
        elif isinstance(one.router, TopK) and one.budget is None:
            ks[one.router.k] = one.name
        elif isinstance(one.router, TopK) and not found[one.name]["error"]:
            ks[found[one.name]["value"]] = one.name
    return [{**found[ks[k]], "k": k} for k in sorted(ks)]


def _perplexity(work: GridWork, results: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Perplexity above that of the first, by a bootstrap over documents, each with itself."""
    heldout = work.experiment.heldout
    predicted = np.zeros(len(heldout.documents))
    for window in heldout.windows:
        predicted[window.document] += window.ids.shape[1] - 1
    nats = np.array([result["nats_by_document"] for result in results])  # (M, D)

    def statistic(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        values = np.exp(weights @ nats.T / (weights @ predicted)[:, None])
        return values - values[:, :1]

    drawn = bootstrap(statistic, len(predicted), seed=seed)
    several = len(predicted) > 1
    ends = zip(drawn.estimate.tolist(), drawn.low.tolist(), drawn.high.tolist(), strict=True)
    return [
        {
            PERPLEXITY: at if math.isfinite(at) else None,
            f"{PERPLEXITY}_low": low if several else None,
            f"{PERPLEXITY}_high": high if several else None,
        }
        for at, low, high in ends
    ]
