"""The figure of the experiment: what each configuration used, and what that cost."""

import numpy as np

from ..figures import COLOURS, MARKERS
from .store import results_frame

BASELINE = {"color": "black", "linestyle": "--", "linewidth": 1.2}


def figure(results):
    """A matplotlib Figure of result dicts (or their frame), 1,600 px wide when saved.

    Experts and perplexity by alpha and max_k, the trade-off between them, experts by layer.
    Whatever is missing of the 21 configurations is left blank. The user's matplotlib backend and
    its state are not touched.
    """
    from matplotlib.figure import Figure

    frame = results_frame(results) if isinstance(results, list) else results
    bh = frame[frame["routing_type"] == "bh"]
    own = frame[frame["routing_type"] == "topk"]
    baseline = own.iloc[0] if len(own) else None
    fig = Figure(figsize=(16, 12.4), dpi=100, layout="constrained")
    fig.get_layout_engine().set(w_pad=0.15, h_pad=0.15)
    axes = fig.subplots(2, 2)
    panels = (_experts_map, _perplexity_map, _trade_off, _by_layer)
    for axis, panel in zip(axes.flat, panels, strict=True):
        axis.tick_params(labelsize=12)
        if len(bh):
            panel(axis, bh, baseline)
        else:
            axis.set_axis_off()
            axis.text(0.5, 0.5, "no BH configuration has finished", ha="center", size=14)
    return fig


def _title(axis, headline, detail):
    axis.set_title(headline, loc="left", size=15, weight="bold", pad=26)
    axis.text(0, 1.02, detail, transform=axis.transAxes, size=12, color="#444444")


def _label(axis, x, y):
    axis.set_xlabel(x, size=13)
    axis.set_ylabel(y, size=13)


def _span(values, form):
    """"1.2 to 5.6", or one number when both ends read the same."""
    ends = [format(values.min(), form), format(values.max(), form)]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def _heat_map(axis, bh, value, colour, text):
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
            *place, text(row), ha="center", va="center", size=13,
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
    _label(axis, "alpha", "max_k (most experts a token may have)")


def _experts_map(axis, bh, baseline):
    top = bh["avg_experts"].max()
    if baseline is not None:
        top = max(top, baseline["avg_experts"])
    _heat_map(axis, bh, "avg_experts", (0, top, "Blues"), lambda r: f"{r['avg_experts']:.2f}")
    used = f"BH gives a token {_span(bh['avg_experts'], '.2f')} experts"
    detail = "mean over layers, prompt and generated tokens"
    if baseline is not None:
        detail += f"; the model's own top-{baseline['max_k']:g}: {baseline['avg_experts']:.2f}"
    _title(axis, used, detail)


def _perplexity_map(axis, bh, baseline):
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

        def text(row):
            return f"{row['perplexity']:.2f}\n{100 * (row['perplexity'] / own - 1):+.1f} %"

    _heat_map(axis, bh, "perplexity", (low, max(high, low * 1.001), "Oranges"), text)
    _title(axis, headline, detail)


def _trade_off(axis, bh, baseline):
    alphas = sorted(bh["alpha"].unique())
    lines = _distinct_lines(bh)
    for order, (max_ks, line) in enumerate(lines):
        below = len(lines) - 1 - order  # wider, to be seen where another line covers it
        colour = COLOURS[order]
        axis.plot(line["avg_experts_heldout"], line["perplexity"], color=colour,
                  linewidth=2 + 2 * below, label=f"max_k {', '.join(f'{k:g}' for k in max_ks)}")
        for alpha, x, y in line[["alpha", "avg_experts_heldout", "perplexity"]].to_numpy():
            axis.plot(x, y, MARKERS[alphas.index(alpha)], color=colour, markersize=9 + 2 * below)
    for marker, alpha in zip(MARKERS, alphas, strict=False):
        axis.plot([], [], marker, color="#777777", markersize=9, label=f"alpha {alpha:g}")
    detail = "down is better, to the left is cheaper; equal results share a line"
    if baseline is not None:
        x, y = baseline["avg_experts_heldout"], baseline["perplexity"]
        axis.axhline(y, **BASELINE)
        axis.axvline(x, **BASELINE)
        axis.plot(x, y, "*", color="black", markersize=18, label=f"top-{baseline['max_k']:g}")
    axis.legend(fontsize=12, frameon=False)
    axis.grid(color="#dddddd")
    axis.set_axisbelow(True)
    _label(axis, "experts per token on the held-out text", "perplexity on the held-out text")
    _title(axis, _trade_off_headline(bh, baseline), detail)


def _distinct_lines(bh):
    """[(max_ks, rows by alpha)]: values of max_k that gave the same results share a line."""
    lines = []
    for max_k, rows in bh.sort_values(["max_k", "alpha"]).groupby("max_k"):
        points = rows[["alpha", "avg_experts_heldout", "perplexity"]].to_numpy()
        for max_ks, other in lines:
            known = other[["alpha", "avg_experts_heldout", "perplexity"]].to_numpy()
            if np.array_equal(points, known):
                max_ks.append(max_k)
                break
        else:
            lines.append(([max_k], rows))
    return lines


def _trade_off_headline(bh, baseline):
    if baseline is None:
        return "Experts against perplexity"
    fewer = bh[bh["avg_experts_heldout"] < baseline["avg_experts_heldout"]]
    better = fewer[fewer["perplexity"] <= baseline["perplexity"]]
    if len(better):
        return f"{len(better)} of {len(bh)} need fewer experts at no higher perplexity"
    return "No configuration saves experts at no cost in perplexity"


def _by_layer(axis, bh, baseline):
    most = bh["max_k"].max()
    rows = bh[bh["max_k"] == most].sort_values("alpha")
    alphas = sorted(bh["alpha"].unique())
    shades = _shades(len(alphas))
    for _, row in rows.iterrows():
        place = alphas.index(row["alpha"])
        layers = range(len(row["experts_by_layer"]))
        axis.plot(layers, row["experts_by_layer"], marker=MARKERS[place], markersize=8,
                  linewidth=2, color=shades[place], label=f"alpha {row['alpha']:g}")
    if baseline is not None:
        axis.axhline(baseline["avg_experts"], **BASELINE, label=f"top-{baseline['max_k']:g}")
    axis.set_ylim(0, 1.3 * axis.get_ylim()[1])  # room for the legend
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(fontsize=12, frameon=False, loc="upper center", ncols=3)
    axis.grid(color="#dddddd")
    axis.set_axisbelow(True)
    _label(axis, "layer (0 is the first)", "experts per token")
    mean = np.mean(rows["experts_by_layer"].tolist(), axis=0)
    most_in, fewest_in = mean.argmax(), mean.argmin()
    headline = f"BH gives layer {most_in} the most experts, layer {fewest_in} the fewest"
    _title(axis, headline, f"mean over prompt and generated tokens, max_k {most:g}")


def _shades(count):
    from matplotlib import colormaps

    return [colormaps["viridis"](x) for x in np.linspace(0, 0.85, count)]
