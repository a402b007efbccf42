"""Figures of a diagnosis: each panel answers one question, with axes, units and intervals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np

from ...show.figures import COLOURS, Name, pads, plain, put_names, style, whole_ticks
from ...show.tables import with_interval
from .discoveries import DOCUMENTS
from .rows import ALL, PATCHED, POOLED, SHOWN, STOCK
from .statistics import BINS
from .transfer import LEAST
from .views import IN_USE, departing_layers, in_layers, side_of

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from .rows import Diagnosed


LINE = 0.05  # of a panel's height: from one number beside a line to the next
DOMAIN = 16  # characters of a domain's name beside its row
MOST = 6  # layers in one figure; of more, evenly spaced ones
GREY = "#777777"
_OF = {STOCK: COLOURS[0], PATCHED: COLOURS[5]}
_MARK = {STOCK: "o", PATCHED: "s"}


def _figure(
    rows: int,
    columns: int,
    title: str,
    note: str = "",
    height: float = 4.1,
    width: float = 4.0,
    sharey: bool = False,
) -> tuple[Figure, Any]:
    """title: what came out; note: what the letters in the panels mean; sharey: in a row."""
    from matplotlib.figure import Figure

    fig = Figure(
        figsize=(max(width * columns, 12), height * rows + 0.9), dpi=100, layout="constrained"
    )
    pads(fig, 0.1, 0.12)
    fig.suptitle(title, x=0.01, ha="left", size=15, weight="bold")
    if note:
        fig.supxlabel(
            "\n".join(wrap(note, 11 * round(fig.get_figwidth()))),
            x=0.01,
            ha="left",
            size=11,
            color="#444444",
        )
    return fig, fig.subplots(rows, columns, squeeze=False, sharey="row" if sharey else False)


def _shown(frame: pandas.DataFrame) -> list[int]:
    """The layers that are drawn: all, or MOST evenly spaced ones."""
    layers = sorted(set(frame["layer"]) - {ALL})
    place = np.unique(np.linspace(0, len(layers) - 1, min(len(layers), MOST)).round().astype(int))
    return [layers[i] for i in place]


def _columns(rows: pandas.DataFrame, *names: str) -> Iterator[NDArray[np.float64]]:
    return (rows[name].to_numpy(dtype=float) for name in names)


def uniform_verdict(flatness: pandas.DataFrame) -> str:
    """Whether large p-values are told from uniform ones, of each model's logits; from its table."""
    if flatness["low"].isna().all():
        return "One document has no intervals, so nothing is decided"
    layers = in_layers(departing_layers(flatness), ", ")
    return f"p-values above 0.5 are shown not to be uniform in {layers}"


def clamp_verdict(selection: pandas.DataFrame, facts: dict[str, Any]) -> str:
    """What decides the number of experts most often, on the patched model."""
    frame = selection[(selection["layer"] == ALL) & (selection["routing"] == PATCHED)]
    frame = frame.set_index("quantity")["estimate"]
    floor, ceiling = frame["P(R < min_k)"], frame["P(R > max_k)"]
    shares = {
        f"min_k = {facts['min_k']} decides for {100 * floor:.0f} % of the tokens": floor,
        f"max_k = {facts['max_k']} decides for {100 * ceiling:.0f} % of the tokens": ceiling,
        f"R itself decides for {100 * (1 - floor - ceiling):.0f} % of the tokens": 1
        - floor
        - ceiling,
    }
    return max(shares, key=shares.__getitem__)


def fdp_verdict(fdp: pandas.DataFrame, facts: dict[str, Any]) -> str:
    """FDP at δ0 over all layers of the first router, beside its alpha where it has one."""
    router = next(iter(facts["compared"]))
    rows = fdp[(fdp["routing"] == router) & (fdp["layer"] == ALL)].set_index("quantity")
    row, of_all = (rows.loc[quantity] for quantity in ("FDP(delta0)", "false of all"))
    said, pooled = (
        with_interval(one["estimate"], one["low"], one["high"], ".2f") for one in (row, of_all)
    )
    sides = {1: "above", -1: "below", 0: "not told from", None: "without an interval;"}
    alpha, beside = facts["alpha"], ""
    if isinstance(alpha, float):
        beside = f", {sides[side_of(row, alpha)]} alpha = {alpha:g}"
    return plain(f"{router}: FDP at δ0 is {said}{beside}; of all selected {pooled} are false")


def p_values(diagnosis: Diagnosed) -> Figure:
    """Are the p-values of unneeded experts uniform? Histogram and QQ curve of each layer."""
    histogram, cdf = diagnosis.to_frame("histogram"), diagnosis.to_frame("cdf")
    layers = _shown(histogram)
    note = (
        "Held-out text; shaded: 95 % intervals. Uniform p-values would follow the dashed lines. "
        "Those of experts that are not needed should: beside few needed ones, which have small p, "
        "the histogram is then flat to the right and not above its line. The title: layers where, "
        "by a 95 % band, Storey's π̂0 changes between λ 0.5 and 0.9 or is above 1."
    )
    verdict = uniform_verdict(diagnosis.to_frame("flatness"))
    fig, axes = _figure(2, len(layers), verdict, note, sharey=True)
    for column, layer in enumerate(layers):
        for routing in (STOCK, PATCHED):
            rows = histogram[(histogram["layer"] == layer) & (histogram["routing"] == routing)]
            _steps(axes[0, column], rows, routing)
            rows = cdf[(cdf["layer"] == layer) & (cdf["routing"] == routing)]
            _qq(axes[1, column], rows, routing)
        axes[0, column].axhline(1, color="black", linestyle="--", linewidth=1)
        end = max(axes[1, column].get_xlim()[1], 1)
        axes[1, column].plot([0, end], [0, end], color="black", linestyle="--", linewidth=1)
        axes[0, column].set_ylim(bottom=0)
        density, log_p = ("", "") if column else ("density (uniform = 1)", "−log10 of p")
        style(axes[0, column], "p", density, f"layer {layer}")
        style(axes[1, column], "−log10 of the uniform quantile", log_p, "")
    axes[0, 0].legend(frameon=False, fontsize=11)
    return fig


def _steps(axis: Axes, rows: pandas.DataFrame, routing: str) -> None:
    estimate, low, high = _columns(rows, "estimate", "low", "high")
    edges = np.arange(BINS + 1) / BINS
    axis.stairs(estimate, edges, color=_OF[routing], linewidth=1.8, label=SHOWN[routing])
    axis.stairs(high, edges, baseline=low, fill=True, color=_OF[routing], alpha=0.25)


def _qq(axis: Axes, rows: pandas.DataFrame, routing: str) -> None:
    """Observed p against the uniform quantile, which is the share of p-values up to it."""
    p, share, low, high = _columns(rows, "at", "estimate", "low", "high")
    seen = share > 0
    p, share, low, high = p[seen], share[seen], low[seen], high[seen]
    axis.plot(-np.log10(share), -np.log10(p), color=_OF[routing], linewidth=1.8)
    ends = (-np.log10(np.maximum(x, share.min() / 2)) for x in (high, low))
    axis.fill_betweenx(-np.log10(p), *ends, color=_OF[routing], alpha=0.25, linewidth=0)


def selection(diagnosis: Diagnosed) -> Figure:
    """What decides R, and does a null travel between domains?"""
    facts = diagnosis.facts
    note = (
        "R: how many p-values the router rejects for a token, before min_k and max_k. λ, π̂0: "
        "#{p > λ} / ((1 − λ) n), the share of experts that the null explains. KS distance: the "
        "largest difference of two distribution functions, above 0 by chance alone. Bars and "
        "brackets: 95 % intervals; none of a KS distance, nor over fewer than "
        f"{LEAST} documents of a domain. Those of π̂0: in the CSV."
    )
    title = f"{facts['router']}: {clamp_verdict(diagnosis.to_frame('selection'), facts)}"
    between = "transfer" in diagnosis.tables  # texts of one domain have none
    fig, axes = _figure(1 + between, 3, plain(title), note, 4.4, 5.6)
    _pi0(axes[0, 0], diagnosis.to_frame("pi0"))
    frame = diagnosis.to_frame("selection")
    _bars(axes[0, 1], frame, ("P(R < min_k)", "P(R > max_k)"), ("floor", "ceiling"), 100)
    style(axes[0, 1], "layer", "% of tokens", "How often min_k or max_k decides")
    axes[0, 1].set_ylim(bottom=0)
    _bars(
        axes[0, 2],
        frame,
        ("Spearman(R, entropy)", "Spearman(R, loss)"),
        ("entropy", "loss"),
        1,
    )
    axes[0, 2].axhline(0, color="black", linewidth=1)
    style(axes[0, 2], "layer", "Spearman's correlation", "Does R follow entropy and loss?")
    if not between:
        return fig
    frame = diagnosis.to_frame("transfer")
    frame = frame[frame["layer"] == ALL]
    for axis, quantity, form, title in (
        (axes[1, 0], "experts", ".2f", "Experts per token"),
        (axes[1, 1], "P(R >= 1)", ".2f", "P(R ≥ 1)"),
        (axes[1, 2], "KS distance", ".3f", "KS distance of the p-values"),
    ):
        _matrix(axis, frame[frame["quantity"] == quantity], form, title)
    return fig


def _pi0(axis: Axes, frame: pandas.DataFrame) -> None:
    """The mean of the layers, thick; each layer, thin, some with their numbers."""
    shown, ends = _shown(frame), []
    for routing in (STOCK, PATCHED):
        of = frame[frame["routing"] == routing]
        for layer, rows in of.groupby("layer"):
            at, estimate = _columns(rows, "at", "estimate")
            axis.plot(at, estimate, color=_OF[routing], linewidth=1)
            if layer in shown:
                ends.append(Name(at[-1], estimate[-1], f"{layer}", _OF[routing]))
        mean = of.assign(at=of["at"].astype(float)).groupby("at")["estimate"].mean()
        axis.plot(
            mean.index,
            mean,
            color=_OF[routing],
            linewidth=3,
            marker=_MARK[routing],
            label=SHOWN[routing],
        )
    axis.axhline(1, color="black", linestyle="--", linewidth=1)
    axis.legend(frameon=False, fontsize=10)
    put_names(axis, ends, LINE)
    style(axis, "λ", "π̂0 (can exceed 1)", "Share of nulls by λ; thick: mean; numbers: layers")


def _bars(
    axis: Axes,
    frame: pandas.DataFrame,
    quantities: Sequence[str],
    names: Sequence[str],
    factor: float,
) -> None:
    """Points with intervals: colour says the model, filling the quantity."""
    layers = sorted(set(frame["layer"]) - {ALL})
    shift = iter(np.linspace(-0.27, 0.27, 4))
    for quantity, name in zip(quantities, names, strict=True):
        for routing in (STOCK, PATCHED):
            rows = frame[(frame["routing"] == routing) & (frame["quantity"] == quantity)]
            rows = rows[rows["layer"] != ALL].sort_values("layer")
            y, low, high = (factor * x for x in _columns(rows, "estimate", "low", "high"))
            off = next(shift)
            fill = _OF[routing] if quantity == quantities[0] else "white"
            axis.errorbar(
                np.array(layers) + off,
                y,
                yerr=np.abs([y - low, high - y]),
                capsize=2,
                fmt=_MARK[routing],
                color=_OF[routing],
                markerfacecolor=fill,
                label=f"{name}, {SHOWN[routing]}",
                clip_on=False,
                zorder=3,
            )
    whole_ticks(axis)
    axis.margins(y=0.3)
    axis.legend(frameon=False, fontsize=10, ncols=2, loc="upper center")


def _matrix(axis: Axes, frame: pandas.DataFrame, form: str, title: str) -> None:
    """Fitted on (down) by checked on (across); each cell with its 95 % interval."""
    down, across = (list(dict.fromkeys(frame[name])) for name in ("routing", "at"))
    shown = np.full((len(down), len(across)), np.nan)
    values = frame["estimate"].to_numpy(dtype=float)
    low, high = np.nanmin(values), np.nanmax(values)
    for row in frame.to_dict("records"):
        shown[down.index(row["routing"]), across.index(row["at"])] = row["estimate"]
    axis.imshow(shown, cmap="Blues", aspect="auto", vmin=low, vmax=high)
    for row in frame.to_dict("records"):
        place = across.index(row["at"]), down.index(row["routing"])
        dark = (row["estimate"] - low) > 0.6 * (high - low) > 0
        ends = with_interval(row["estimate"], row["low"], row["high"], form, apart="\n")
        axis.text(
            *place, ends, ha="center", va="center", size=9, color="white" if dark else "black"
        )
    turn = 30 if len(across) > 4 else 0
    axis.set_xticks(range(len(across)), [plain(name, DOMAIN) for name in across], rotation=turn)
    fitted = [IN_USE if name == POOLED else name for name in down]
    axis.set_yticks(range(len(down)), [plain(name, DOMAIN) for name in fitted])
    axis.tick_params(length=0)
    axis.set_xlabel("checked on held-out text of", size=11)
    axis.set_ylabel("null fitted on", size=11)
    axis.set_title(f"{title}, mean of layers", loc="left", size=12)


def ablation(diagnosis: Diagnosed) -> Figure:
    """How many selected experts did nothing for the next token? By delta, and taken together."""
    fdp, curve = diagnosis.to_frame("fdp"), diagnosis.to_frame("fdp curve")
    layers = _shown(curve)
    name, alpha = next(iter(diagnosis.facts["compared"])), diagnosis.facts["alpha"]
    dotted = (
        f"FDP (dotted): the mean over positions of the share of what {name} selects that is "
        "false, 0 where it selects nothing; only this is to be held against alpha. "
    )
    note = (
        f"{diagnosis.facts['positions']:,} positions. False at δ: a selected expert without which "
        "the next token's loss rises by less than δ nats. Lines and shades: the false of all that "
        f"a router selects, by which routers can be compared. {dotted if alpha is not None else ''}"
        "δ0 (the dots): 95 % of random experts that were not selected change the loss by less when "
        "they are added. Shaded and bars: 95 % intervals. "
    )
    together = "joint" in diagnosis.tables
    note += (
        "r: how many of the best experts by weight are kept; the others are taken out."
        if together
        else f"What experts do together is not known: fewer than {DOCUMENTS} documents have a "
        "position in a layer. More positions and documents are needed."
    )
    fig, axes = _figure(1 + together, len(layers), fdp_verdict(fdp, diagnosis.facts), note)
    routers = list(dict.fromkeys(curve["routing"]))
    colours = dict(zip(routers, (COLOURS[5], COLOURS[2], COLOURS[0]), strict=False))
    for column, layer in enumerate(layers):
        axis = axes[0, column]
        for router in routers:
            known = fdp[(fdp["layer"] == layer) & (fdp["routing"] == router)]
            known = known.set_index("quantity")["estimate"]
            of = curve[(curve["layer"] == layer) & (curve["routing"] == router)]
            drawn = [("false of all", "false of all", router, "-")]
            if router == name and alpha is not None:
                drawn.append(("FDP", "FDP(delta0)", f"{router}, FDP", ":"))
            for quantity, at_delta0, words, line in drawn:
                rows = of[of["quantity"] == quantity]
                at, estimate, low, high = _columns(rows, "at", "estimate", "low", "high")
                if line == "-":
                    axis.fill_between(at, low, high, color=colours[router], alpha=0.2, linewidth=0)
                if known["delta0"] > at[-1]:  # the curve goes on to its dot
                    at = np.append(at, known["delta0"])
                    estimate = np.append(estimate, known[at_delta0])
                axis.plot(at, estimate, line, color=colours[router], linewidth=1.8, label=words)
                axis.plot(
                    known["delta0"],
                    known[at_delta0],
                    "o",
                    color=colours[router],
                    markersize=8,
                    markeredgecolor="black",
                )
        if alpha is not None:
            own = alpha if isinstance(alpha, float) else alpha[layer]
            axis.axhline(own, color="black", linestyle="--", linewidth=1, label="alpha")
        axis.set_xscale("log")
        axis.set_ylim(0, 1)
        style(
            axis,
            "δ (nats of next-token loss)",
            "false (share, 0 to 1)",
            f"layer {layer}; dots: at δ0",
        )
        if together:
            _together(axes[1, column], diagnosis, layer, routers[0], colours[routers[0]])
    axes[0, 0].legend(frameon=False, fontsize=10, loc="upper left")
    if together and axes[1, 0].get_legend_handles_labels()[0]:
        axes[1, 0].legend(frameon=False, fontsize=10)
    return fig


def _together(axis: Axes, diagnosis: Diagnosed, layer: int, router: str, colour: str) -> None:
    """What taking out all but the r best costs, beside the sum of the single costs."""
    style(
        axis,
        "r (the r best kept, the others taken out)",
        "change of loss (nats)",
        f"{router}: together and one by one",
    )
    frame = diagnosis.to_frame()
    joint = frame[(frame["table"] == "joint") & (frame["layer"] == layer)]
    joint = joint[joint["routing"] == router]
    if not len(joint):
        why = (
            f"Not known: fewer than {DOCUMENTS} documents have a position here. More positions "
            "and documents are needed."
        )
        axis.text(
            0.5,
            0.5,
            "\n".join(wrap(why, 34)),
            transform=axis.transAxes,
            size=11,
            color="#444444",
            ha="center",
            va="center",
        )
        axis.set_xticks([])
        axis.set_yticks([])
        return
    drawn = (
        ("joint change", "all at once", colour, "o"),
        ("sum of single changes", "sum of one at a time", GREY, "s"),
    )
    for off, (quantity, name, shade, mark) in zip((-0.08, 0.08), drawn, strict=True):
        at, y, low, high = _columns(
            joint[joint["quantity"] == quantity], "at", "estimate", "low", "high"
        )
        axis.errorbar(
            at + off,
            y,
            yerr=np.abs([y - low, high - y]),
            fmt=f"{mark}-",
            capsize=2,
            color=shade,
            label=name,
        )
    axis.axhline(0, color="black", linewidth=1)
    ranks = sorted(set(joint["at"].astype(int)))
    axis.set_xticks(ranks)
    axis.set_xlim(min(ranks, default=0) - 0.5, max(ranks, default=0) + 0.5)
