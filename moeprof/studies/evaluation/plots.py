"""The figure: what each configuration costs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ...show.figures import line_styles, plain, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .statistics import Row


def figure(rows: Iterable[Row]) -> Figure:
    """Bits per byte above the model's own routing against experts per token, with intervals.

    rows: as `results` gives them. 1,000 px wide when saved. The user's matplotlib backend and its
    state are not touched.
    """
    from matplotlib.figure import Figure

    own, *rows = (row for row in rows if row["slice"] == "all")
    fig = Figure(figsize=(10, 6), dpi=100, layout="constrained")
    axis = fig.subplots()
    style(
        axis,
        "experts per token",
        "bits per byte above the model's own routing",
        "What each configuration costs (lower is better; bars: 95 %, over documents)",
    )
    axis.axhline(0, color="black", linewidth=1.2)
    label = f"{own['config']}: {own['bits_per_byte']:.4f} bits per byte"
    axis.plot(own["experts"], 0, "o", color="black", markersize=9, label=label)
    for row, look in zip(rows, line_styles(len(rows)), strict=True):
        x, y = row["experts"], row["bits_above_own"]
        if row["bits_above_own_low"] is not None:
            ends = [row["bits_above_own_low"], row["bits_above_own_high"]]
            axis.plot([x, x], ends, color=look["color"], linewidth=1.6)
            ends = [row["experts_low"], row["experts_high"]]
            axis.plot(ends, [y, y], color=look["color"], linewidth=1.6)
        axis.plot(
            x,
            y,
            linestyle="",
            markersize=9,
            markeredgecolor="white",
            label=plain(row["config"], 40),
            **look,
        )
    axis.set_xlim(left=0)
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=11)
    return fig
