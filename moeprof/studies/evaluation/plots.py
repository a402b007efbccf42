"""The figure: what each configuration costs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...show.figures import apart, line_styles, plain, style
from ...show.tables import fine

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from .statistics import Row


NAMED = 12  # points with their names beside them; more have a legend
LINE = 0.04  # of the panel's height: from one name to the next
LETTER = 0.01  # of its width: a letter of a name


def figure(rows: Iterable[Row], static_top_k: Collection[str]) -> Figure:
    """Bits per byte above the model's own routing against experts per token, with intervals.

    rows: as `results` gives them; static_top_k: the configurations that are it. 1,000 px wide
    when saved. The user's matplotlib backend and its state are not touched.
    """
    from matplotlib.figure import Figure

    own, *rows = (row for row in rows if row["slice"] == "all")
    fig = Figure(figsize=(10, 6), dpi=100, layout="constrained")
    axis = fig.subplots()
    detail = "lower is better; bars: 95 % intervals over documents"
    fig.suptitle(_headline(rows), x=0.01, ha="left", size=14, weight="bold")
    axis.axhline(0, color="black", linewidth=1.2)
    static = [own, *(row for row in rows if row["config"] in static_top_k)]
    static.sort(key=lambda row: row["experts"])
    if len(static) > 1:
        line = [[row[name] for row in static] for name in ("experts", "bits_above_own")]
        axis.plot(*line, color="black", linewidth=1.6, label="static top-k")
        detail += "; black line: static top-k"
    style(axis, "experts per token", "bits per byte above the model's own routing", detail)
    known, others = {"color": "black", "marker": "o"}, iter(line_styles(len(rows)))
    looks = [known if row in static else next(others) for row in [own, *rows]]
    for row, look in zip([own, *rows], looks, strict=True):
        _point(axis, row, look)
    axis.margins(y=0.1)
    axis.set_xlim(0, 1.04 * max(row["experts"] for row in [own, *rows]))
    if len(rows) < NAMED:
        ks, bits = ([row[name] for row in static] for name in ("experts", "bits_above_own"))
        below = [
            row["bits_above_own"] <= np.interp(row["experts"], ks, bits) for row in [own, *rows]
        ]
        _names(axis, [own, *rows], looks, np.where(below, -1, 1))
    else:
        axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=11)
    return fig


def _headline(rows: Sequence[Row]) -> str:
    if not rows:
        return "No router was evaluated"
    best = min(rows, key=lambda row: row["bits_above_own"])
    name = plain(best["config"], 30)
    above = best["bits_above_own"]
    lost = f"{above:{fine(above)}} bits per byte at {best['experts']:.2f} experts"
    return f"Least is lost with {name}: {lost}"


def _point(axis: Axes, row: Row, look: dict[str, Any]) -> None:
    x, y = row["experts"], row["bits_above_own"]
    if row["bits_above_own_low"] is not None:
        ends = [row["bits_above_own_low"], row["bits_above_own_high"]]
        axis.plot([x, x], ends, color=look["color"], linewidth=1.6)
        ends = [row["experts_low"], row["experts_high"]]
        axis.plot(ends, [y, y], color=look["color"], linewidth=1.6)
    label = plain(row["config"], 40)
    axis.plot(x, y, linestyle="", markersize=9, markeredgecolor="white", label=label, **look)


def _names(
    axis: Axes, rows: Sequence[Row], looks: Sequence[dict[str, Any]], sides: NDArray[np.int64]
) -> None:
    """To the right and above of each point (a side of 1) or to the left and below (-1), moved up
    or down where names would overlap."""
    axis.get_xlim()  # so that the limits are those of what is drawn
    to_axes = axis.transScale + axis.transLimits
    spots = to_axes.transform([[row["experts"], row["bits_above_own"]] for row in rows])
    order = np.argsort(spots[:, 1], kind="stable")
    heights = apart(spots[order, 1] + LINE * sides[order], LINE)
    for i, height in zip(order.tolist(), heights.tolist(), strict=True):
        (x, y), name = spots[i].tolist(), plain(rows[i]["config"], 40)
        side = -1 if x + LETTER * len(name) > 0.97 else sides[i]
        text = axis.annotate(
            name,
            (x, y),
            (x + 0.02 * side, height),
            "axes fraction",
            "axes fraction",
            size=11,
            ha="left" if side > 0 else "right",
            va="center",
            arrowprops={"arrowstyle": "-", "lw": 0.6, "color": "#777777", "shrinkA": 0},
        )
        text.set_color(looks[i]["color"])
