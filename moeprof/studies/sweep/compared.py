"""Each result against the model's own top-k and against static top-k, with intervals."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ...show.tables import fine

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...measure.bootstrap import Intervals

ENDS = ("low", "high")
BAND = ("band_low", "band_high")


def compared(run: dict[str, Any]) -> dict[str, Any]:
    """The run with fields added to every result, static and budget row of it.

    bits_above_own and bits_above_static: bits per byte above the model's own top-k, and above
    the line through static top-k at the row's own experts per token (None where the whole k on
    both sides were not run);
    each with _low and _high, a 95 % interval by a bootstrap over held-out documents, each
    compared with itself (None for a single document). bits_above_static also with _band_low and
    _band_high, the ends of a 95 % band: those of all rows hold together.
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

    average = experts.sum(axis=1) / tokens.sum()
    inside = [index for index, at in enumerate(average) if not missing_ks(at, ks)]

    def above_own(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return weights @ (bits - _bits([own])).T / (weights @ sizes)[:, None]

    def above_static(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        total = (weights @ sizes)[:, None]
        static = weights @ line_bits.T / total
        average = weights @ experts[inside].T / (weights @ tokens)[:, None]
        return weights @ bits[inside].T / total - on_line(ks, static, average)

    # Each by itself, on the same draws: a band is over what is compared with static top-k.
    of_own, of_static = (
        bootstrap(statistic, len(documents), seed=seed) for statistic in (above_own, above_static)
    )
    several = len(documents) > 1
    for index in range(len(rows)):
        place = inside.index(index) if index in inside else None
        yield {
            **_ends("bits_above_own", of_own, ENDS, index, several),
            **_ends("bits_above_static", of_static, ENDS + BAND, place, several),
        }


def _ends(
    name: str, found: Intervals, ends: Collection[str], at: int | None, several: bool
) -> dict[str, float | None]:
    """The statistic at a place and its ends, None for what isn't known: the ends of one document,
    and all where there is no place."""
    known = {end: None if at is None else float(getattr(found, end)[at]) for end in ends}
    estimate = None if at is None else float(found.estimate[at])
    return {name: estimate} | {f"{name}_{e}": v if several else None for e, v in known.items()}


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


def with_band(row: Mapping[str, Any], word: str = "band ") -> str:
    """ "-0.0123 (band -0.0160 to -0.0086)", the distance from static top-k; with its interval in a
    run of a version that had no bands."""
    low, high = (row.get(f"bits_above_static_{end}") for end in BAND)
    if low is None or high is None:
        return interval(row, "bits_above_static")
    value = row["bits_above_static"]
    form = fine(value, low, high)
    return f"{value:{form}} ({word}{low:{form}} to {high:{form}})"
