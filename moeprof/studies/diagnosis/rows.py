"""The numbers of a diagnosis as rows of one tidy table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    import pandas

    from ...measure.bootstrap import Intervals


COLUMNS = (
    "table",
    "routing",
    "layer",
    "quantity",
    "at",
    "estimate",
    "error",
    "low",
    "high",
    "band_low",
    "band_high",
)


class Diagnosed(Protocol):
    """What the parts of a diagnosis know of it: `Diagnosis` itself imports them."""

    facts: dict[str, Any]

    @property
    def tables(self) -> list[str]: ...

    def to_frame(self, table: str | None = None) -> pandas.DataFrame: ...


ALL = -1  # the layer of a row that is a mean over layers


def rows(
    table: str, routing: object, layer: object, quantity: object, at: object, intervals: Intervals
) -> Iterator[dict[str, Any]]:
    """One dict with COLUMNS for each statistic of `intervals`; the four labels broadcast to it."""
    labels = np.broadcast_arrays(
        *(np.asarray(x, object) for x in (routing, layer, quantity, at)),
        np.asarray(intervals.estimate, object),
    )[:4]
    for index in range(len(intervals.estimate)):
        row = {"table": table}
        row |= zip(COLUMNS[1:5], (label[index] for label in labels), strict=True)
        yield row | {name: float(getattr(intervals, name)[index]) for name in COLUMNS[5:]}


def rows_by_layer(
    table: str,
    routing: object,
    layers: int,
    names: Sequence[str],
    at: object,
    intervals: Intervals,
) -> Iterator[dict[str, Any]]:
    """The same for statistics (L + 1, M) in one row: the M quantities of each layer, then their
    means over the layers."""
    layer = np.repeat([*range(layers), ALL], len(names))
    yield from rows(table, routing, layer, np.tile(names, layers + 1), at, intervals)


# The quantities of the table "flatness".
CHANGE, ABOVE = "pi0 less pi0 at 0.5", "pi0 less 1"
# As the files have them, and as people read them. POOLED: the null that the diagnosis is of,
# beside those fitted on one domain.
STOCK, PATCHED, POOLED = "stock", "patched", "null given"
SHOWN = {STOCK: "own routing", PATCHED: "patched"}
