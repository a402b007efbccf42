"""The figures of the benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..measure.machine import in_one_line
from ..show.figures import colours, line_styles, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


INTERVAL = "median of the rounds; bars: their quartiles"


def against_tokens(result: dict[str, Any], labels: Mapping[str, str], what: str) -> Figure:
    """A matplotlib Figure, log-log: the times of `labels` {contender: label} against T.

    Where the rows have a roof it is drawn, with the two limits that it is the larger of.
    """
    rows = result["rows"]
    tokens = [row["tokens"] for row in rows]
    fig, axis = _figure(result, what, INTERVAL)
    if all("roof" in row for row in rows):
        limits = {key: [row["roof"][key] for row in rows] for key in rows[0]["roof"]}
        axis.plot(tokens, limits["roof_ms"], color="black", linewidth=2, label="roof")
        grey: dict[str, Any] = {"color": "#777777", "linewidth": 1.3, "zorder": 1}
        axis.plot(tokens, limits["read_ms"], "--", label="limit: reading the weights", **grey)
        axis.plot(tokens, limits["gemm_ms"], "-.", label="limit: dense GEMM rate", **grey)
    for style, (name, label) in zip(line_styles(len(labels)), labels.items(), strict=True):
        seen = [row for row in rows if name in row["times"]]
        times = [row["times"][name] for row in seen]
        middle = [t["median_ms"] for t in times]
        bars = [
            [t["median_ms"] - t["lower_ms"] for t in times],
            [t["upper_ms"] - t["median_ms"] for t in times],
        ]
        axis.errorbar(
            [row["tokens"] for row in seen],
            middle,
            bars,
            label=plain(label),
            linewidth=1.6,
            capsize=3,
            **style,
        )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(tokens, map(str, tokens))
    axis.set_xticks([], minor=True)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("T, tokens in the call", size=12)
    axis.set_ylabel("time of the call (ms)", size=12)
    axis.legend(frameon=False, fontsize=11)
    return fig


def bars(
    result: dict[str, Any],
    entries: Sequence[tuple[str, float, str, int]],
    what: str,
    axis_label: str,
) -> Figure:
    """Horizontal bars, log scale: entries (label, value, text beside the bar, colour's number)."""
    fig, axis = _figure(result, what, "")
    fig.set_size_inches(10, 2 + 0.24 * len(entries))
    labels, values, texts, numbers = zip(*entries, strict=True)
    palette = colours(max(numbers) + 1)
    drawn = axis.barh(labels, values, color=[palette[number] for number in numbers])
    axis.bar_label(drawn, texts, padding=4, fontsize=9)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlim(right=8 * max(values))  # room for the texts
    axis.xaxis.set_major_formatter("{x:g}")
    axis.margins(y=0.01)
    axis.set_xlabel(axis_label, size=12)
    axis.set_ylabel("kernel and variant", size=12)
    return fig


def _figure(result: dict[str, Any], what: str, note: str) -> tuple[Figure, Axes]:
    """(figure, axes) with a title that names shape, dtype and machine."""
    from matplotlib.figure import Figure

    settings = result["settings"]
    shape = "E {experts}, H {hidden}, I {intermediate}, top-{top_k}".format(**settings["shape"])
    about = f"{what}, {shape}, {settings['dtype'] or 'all dtypes'}"
    fig = Figure(figsize=(10, 6.5), dpi=120, layout="constrained")
    axis = fig.subplots()
    about = about[0].upper() + about[1:]
    axis.set_title(about, loc="left", size=13, weight="bold", pad=24)
    detail = "; ".join(filter(None, (plain(in_one_line(result["machine"])), note)))
    axis.annotate(
        detail, (0, 1), (0, 7), "axes fraction", "offset points", size=10, color="#444444"
    )
    axis.grid(color="#dddddd")
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=10)
    return fig, axis
