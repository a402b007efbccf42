"""The figure of the experiment: what each configuration used, and what that cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ...show.figures import MARKERS, pads, whole_ticks
from .drawing import blank, label, shades, title
from .files import results_frame
from .quality import quality

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


BASELINE: dict[str, Any] = {"color": "black", "linestyle": "--", "linewidth": 1.2}


def figure(
    results: list[dict[str, Any]] | pandas.DataFrame, run: dict[str, Any] | None = None
) -> Figure:
    """A matplotlib Figure of result dicts (or their frame), 1,600 px wide when saved.

    What to use: quality by experts per token, and the distance from static top-k at the same
    experts; experts and perplexity by alpha and max_k; experts by layer. Results of static top-k
    are the line that the others are set against. run: what `sweep` returns, for static top-k too,
    the routers set by budget and the intervals. Whatever is missing is left blank. The user's
    matplotlib backend and its state are not touched.
    """
    from matplotlib.figure import Figure

    frame = results_frame(results) if isinstance(results, list) else results
    bh = frame[frame["routing_type"] == "bh"]
    top_k = frame[frame["routing_type"] == "topk"]
    own = top_k[top_k["reduction_pct"] == 0]  # others are static top-k
    baseline = own.iloc[0] if len(own) else None
    fig = Figure(figsize=(16, 18), dpi=100, layout="constrained")
    pads(fig, 0.15, 0.15)
    places: Any = [["use", "beside"], ["experts", "perplexity"], ["layers", "layers"]]
    axes = fig.subplot_mosaic(places, height_ratios=[1.3, 1, 0.8])
    for axis in axes.values():
        axis.tick_params(labelsize=12)
    quality(axes["use"], axes["beside"], bh, top_k, baseline, run or {})
    panels = {"experts": _experts_map, "perplexity": _perplexity_map, "layers": _by_layer}
    for name, panel in panels.items():
        if len(bh):
            panel(axes[name], bh, baseline)
        else:
            blank(axes[name], "no BH configuration has finished")
    return fig


def _span(values: Any, form: str) -> str:
    """ "1.2 to 5.6", or one number when both ends read the same."""
    ends = [format(values.min(), form), format(values.max(), form)]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def _heat_map(
    axis: Axes,
    bh: pandas.DataFrame,
    value: str,
    colour: tuple[float, float, str],
    text: Callable[[Any], str],
) -> None:
    """Annotated cells, max_k down and alpha across; `colour` and `text` are given a row of bh."""
    rows, columns = sorted(bh["max_k"].unique()), sorted(bh["alpha"].unique())
    shown = np.full((len(rows), len(columns)), np.nan)
    for _, row in bh.iterrows():
        shown[rows.index(row["max_k"]), columns.index(row["alpha"])] = row[value]
    low, high, palette = colour
    axis.imshow(np.ma.masked_invalid(shown), cmap=palette, vmin=low, vmax=high, aspect="auto")
    for _, row in bh.iterrows():
        place = columns.index(row["alpha"]), rows.index(row["max_k"])
        dark = (row[value] - low) / (high - low) > 0.6
        axis.text(
            *place,
            text(row),
            ha="center",
            va="center",
            size=13,
            color="white" if dark else "black",
        )
    axis.set_xticks(range(len(columns)), [f"{alpha:g}" for alpha in columns])
    axis.set_yticks(range(len(rows)), [f"{max_k:g}" for max_k in rows])
    axis.set_xticks(np.arange(1, len(columns)) - 0.5, minor=True)
    axis.set_yticks(np.arange(1, len(rows)) - 0.5, minor=True)
    axis.grid(which="minor", color="white", linewidth=2)
    axis.tick_params(which="both", length=0)
    for side in axis.spines.values():
        side.set_visible(False)
    label(axis, "alpha", "max_k (most experts a token may have)")


def _experts_map(axis: Axes, bh: pandas.DataFrame, baseline: Any) -> None:
    top = bh["avg_experts"].max()
    if baseline is not None:
        top = max(top, baseline["avg_experts"])
    _heat_map(axis, bh, "avg_experts", (0, top, "Blues"), lambda r: f"{r['avg_experts']:.2f}")
    used = f"BH gives a token {_span(bh['avg_experts'], '.2f')} experts"
    detail = "mean over layers, prompt and generated tokens"
    if baseline is not None:
        detail += f"; the model's own top-{baseline['max_k']:g}: {baseline['avg_experts']:.2f}"
    title(axis, used, detail)


def _perplexity_map(axis: Axes, bh: pandas.DataFrame, baseline: Any) -> None:
    values = bh["perplexity"]
    if baseline is None:
        low, high = values.min(), values.max()
        headline = f"Held-out perplexity is {_span(values, '.2f')}"
        detail, text = "lower is better", lambda r: f"{r['perplexity']:.2f}"
    else:
        own = baseline["perplexity"]
        low, high = min(own, values.min()), max(own, values.max())
        change = 100 * (values / own - 1)
        headline = f"Held-out perplexity changes by {_span(change, '+.1f')} %"
        detail = f"lower is better; the model's own top-{baseline['max_k']:g}: {own:.2f}"

        def text(row: Any) -> str:
            return f"{row['perplexity']:.2f}\n{100 * (row['perplexity'] / own - 1):+.1f} %"

    _heat_map(axis, bh, "perplexity", (low, max(high, low * 1.001), "Oranges"), text)
    title(axis, headline, detail)


def _by_layer(axis: Axes, bh: pandas.DataFrame, baseline: Any) -> None:
    most = bh["max_k"].max()
    rows = bh[bh["max_k"] == most].sort_values("alpha")
    alphas = sorted(bh["alpha"].unique())
    colours = shades(len(alphas))
    for _, row in rows.iterrows():
        place = alphas.index(row["alpha"])
        layers = range(len(row["experts_by_layer"]))
        axis.plot(
            layers,
            row["experts_by_layer"],
            marker=MARKERS[place % len(MARKERS)],
            markersize=8,
            linewidth=2,
            color=colours[place],
            label=f"alpha {row['alpha']:g}",
        )
    if baseline is not None:
        axis.axhline(baseline["avg_experts"], **BASELINE, label=f"top-{baseline['max_k']:g}")
    axis.set_ylim(0, 1.3 * axis.get_ylim()[1])  # room for the legend
    whole_ticks(axis)
    axis.legend(fontsize=12, frameon=False, loc="upper center", ncols=3)
    axis.grid(color="#dddddd")
    axis.set_axisbelow(True)
    label(axis, "layer (0 is the first)", "experts per token")
    mean = np.mean(rows["experts_by_layer"].tolist(), axis=0)
    most_in, fewest_in = mean.argmax(), mean.argmin()
    headline = f"BH gives layer {most_in} the most experts, layer {fewest_in} the fewest"
    title(axis, headline, f"mean over prompt and generated tokens, max_k {most:g}")
