"""The numbers of a diagnosis as rows of one tidy table."""

import numpy as np

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
ALL = -1  # the layer of a row that is a mean over layers


def rows(table, routing, layer, quantity, at, intervals):
    """One dict with COLUMNS for each statistic of `intervals`; the four labels broadcast to it."""
    labels = np.broadcast_arrays(
        *(np.asarray(x, object) for x in (routing, layer, quantity, at)),
        np.asarray(intervals.estimate, object),
    )[:4]
    for index in range(len(intervals.estimate)):
        row = {"table": table}
        row |= zip(COLUMNS[1:5], (label[index] for label in labels), strict=True)
        yield row | {name: float(getattr(intervals, name)[index]) for name in COLUMNS[5:]}


STOCK, PATCHED = "stock", "patched"
