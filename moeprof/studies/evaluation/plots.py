"""The figure: what each configuration costs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...show.figures import Name, line_styles, plain, put_names, runs, style
from ...show.tables import fine

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .statistics import Row


NAMED = 12  # points with their names beside them; more have a legend
LINE = 0.04  # of the panel's height: from one name to the next


def figure(rows: Iterable[Row], static_top_k: Collection[str]) -> Figure:
    """Bits per byte above the model's own routing against experts per token, with intervals.

    rows: as `results` gives them; static_top_k: the configurations that are it. 1,000 px wide
    when saved. The user's matplotlib backend and its state are not touched.
    """
    from matplotlib.figure import Figure

    own, *rows = (row for row in rows if row["slice"] == "all")
    fig = Figure(figsize=(10, 6), dpi=100, layout="constrained")
    axis = fig.subplots()
    several = any(row["bits_above_own_low"] is not None for row in rows)
    detail = "lower is better; "
    detail += "bars: 95 % intervals over documents" if several else "no intervals: one document"
    fig.suptitle(_headline(rows), x=0.01, ha="left", size=14, weight="bold")
    axis.axhline(0, color="black", linewidth=1.2)
    static = [own, *(row for row in rows if row["config"] in static_top_k)]
    static.sort(key=lambda row: row["experts"])
    ks, bits = (np.array([row[n] for row in static]) for n in ("experts", "bits_above_own"))
    name = "static top-k"
    for run in runs(ks):
        if len(run) > 1:
            axis.plot(ks[run], bits[run], color="black", linewidth=1.6, label=name)
            name = ""  # once in the legend
    if len(static) > 1:
        detail += "; black: static top-k, a line between neighbouring k"
    style(axis, "experts per token", "bits per byte above the model's own routing", detail)
    known, others = {"color": "black", "marker": "o"}, iter(line_styles(len(rows)))
    looks = [known if row in static else next(others) for row in [own, *rows]]
    for row, look in zip([own, *rows], looks, strict=True):
        _point(axis, row, look)
    axis.margins(y=0.1)
    axis.set_xlim(0, 1.04 * max(row["experts"] for row in [own, *rows]))
    if len(rows) < NAMED:
        names = []
        for row, look in zip([own, *rows], looks, strict=True):
            x, y = row["experts"], row["bits_above_own"]
            side = -1 if y <= np.interp(x, ks, bits) else 1
            names.append(Name(x, y, plain(row["config"], 40), look["color"], side))
        put_names(axis, names, LINE)
    else:
        axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=11)
    return fig


def _headline(rows: Sequence[Row]) -> str:
    if not rows:
        return "No router was evaluated"
    bits = [row["bits_above_own"] for row in rows]
    lost, experts = _range(bits, fine(*bits)), _range([row["experts"] for row in rows], ".2f")
    name = plain(rows[0]["config"], 30) if len(rows) == 1 else f"{len(rows)} configurations"
    return f"{name}: {lost} bits per byte at {experts} experts"


def _range(values: Sequence[float], form: str) -> str:
    """ "0.1 to 0.3", or one number where both ends read the same."""
    ends = [f"{end(values):{form}}" for end in (min, max)]
    return " to ".join(dict.fromkeys(ends))


def _point(axis: Axes, row: Row, look: dict[str, Any]) -> None:
    x, y = row["experts"], row["bits_above_own"]
    if row["bits_above_own_low"] is not None:
        ends = [row["bits_above_own_low"], row["bits_above_own_high"]]
        axis.plot([x, x], ends, color=look["color"], linewidth=1.6)
        ends = [row["experts_low"], row["experts_high"]]
        axis.plot(ends, [y, y], color=look["color"], linewidth=1.6)
    label = plain(row["config"], 40)
    axis.plot(x, y, linestyle="", markersize=9, markeredgecolor="white", label=label, **look)
