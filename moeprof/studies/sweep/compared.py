"""Each result against the model's own top-k and against static top-k, with intervals."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ...show.tables import fine

if TYPE_CHECKING:
    from numpy.typing import NDArray


STATIC = "static top-k at the same experts"


def compared(run: dict[str, Any]) -> dict[str, Any]:
    """The run with fields added to every result, static and budget row of it.

    bits_above_own and bits_above_static: bits per byte above the model's own top-k, and above
    the line through static top-k at the row's own experts per token (None where the whole k on
    both sides were not run);
    each with _low and _high, a 95 % interval by a bootstrap over held-out documents, each
    compared with itself (None for a single document).
    """
    results = run["results"]
    if not results:
        return run
    own, top_k = results[0], run["model_config"]["num_experts_per_tok"]
    by_k = {row["k"]: row for row in run.get("static", ())}
    by_k[top_k] = {**own, "k": top_k}
    line = [by_k[k] for k in sorted(by_k)]
    kinds = {name: run.get(name, []) for name in ("results", "static", "budgets")}
    rows = [row for group in kinds.values() for row in group if "nats_by_document" in row]
    fields = iter(distances(rows, own, line, run["heldout_documents"], run["seed"]))
    return run | {
        name: [row | next(fields) if "nats_by_document" in row else row for row in group]
        for name, group in kinds.items()
        if name in run
    }


def distances(
    rows: list[dict[str, Any]],
    own: dict[str, Any],
    line: list[dict[str, Any]],
    documents: list[dict[str, Any]],
    seed: int,
) -> Iterator[dict[str, Any]]:
    """The fields that `compared` adds, a dict for each row.

    own: the row of the model's own top-k; line: of static top-k, "k" ascending.
    """
    from ...measure.bootstrap import bootstrap

    sizes = np.array([document["bytes"] for document in documents], float)
    tokens = np.array([document["tokens"] for document in documents], float)
    bits = _bits(rows)  # (M, D)
    experts = np.array([row["experts_by_document"] for row in rows], float)
    line_bits = _bits(line)  # (K, D)
    ks = np.array([row["k"] for row in line], float)

    def statistic(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        total = weights @ sizes
        quality = weights @ bits.T / total[:, None]
        static = weights @ line_bits.T / total[:, None]
        average = weights @ experts.T / (weights @ tokens)[:, None]
        above_own = weights @ (bits - _bits([own])).T / total[:, None]
        return np.concatenate([above_own, quality - on_line(ks, static, average)], axis=1)

    found = bootstrap(statistic, len(documents), seed=seed)
    average = experts.sum(axis=1) / tokens.sum()
    several = len(documents) > 1
    inside = [not missing_ks(at, ks) for at in average]
    for index in range(len(rows)):
        fields = {}
        for name, at, known in (
            ("bits_above_own", index, True),
            ("bits_above_static", index + len(rows), inside[index]),
        ):
            fields[name] = float(found.estimate[at]) if known else None
            fields[f"{name}_low"] = float(found.low[at]) if known and several else None
            fields[f"{name}_high"] = float(found.high[at]) if known and several else None
        yield fields


def _bits(rows: list[dict[str, Any]]) -> NDArray[np.float64]:
    return np.array([row["nats_by_document"] for row in rows], float) / math.log(2)


def missing_ks(average: float, ks: Collection[float]) -> list[int]:
    """Those of the whole k on both sides of `average` that are not among `ks`, which static top-k
    was run for: a line over a gap lies above static."""
    return sorted({math.floor(average + 1e-9), math.ceil(average - 1e-9)} - {int(k) for k in ks})


def on_line(
    ks: NDArray[np.float64], static: NDArray[np.float64], average: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The line through static top-k at `average` experts, straight between whole k.

    ks (K,) ascending; static (B, K) bits per byte; average (B, M). Returns (B, M); beyond an
    end, and where there is one k only, the value at that end.
    """
    if len(ks) == 1:
        return np.broadcast_to(static, average.shape)
    at = np.clip(np.searchsorted(ks, average, side="right") - 1, 0, len(ks) - 2)
    part = np.clip((average - ks[at]) / (ks[at + 1] - ks[at]), 0, 1)
    row = np.arange(len(static))[:, None]
    return static[row, at] * (1 - part) + static[row, at + 1] * part


def interval(row: Mapping[str, Any], name: str, form: str = "+.4f") -> str:
    """ "+0.0213 (+0.0190 to +0.0230)", of small numbers more places; "" for what isn't known."""
    value, low, high = (row.get(name + end) for end in ("", "_low", "_high"))
    if value is None or math.isnan(value):
        return ""
    if low is None or high is None or math.isnan(low):
        return format(value, fine(value, form=form))
    form = fine(value, low, high, form=form)
    return f"{value:{form}} ({low:{form}} to {high:{form}})"
