"""The figure: KL and effects against experts, and every router's effect at one budget."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ...show.figures import COLOURS, Name, line_styles, pads, put_names
from .bytes_read import quantized_name
from .contenders import PRIMARY
from .effects import BETTER, ORACLE, QUANTIZED, RANDOM, ROUTER, STATIC, adaptive, verdict
from .findings import View, beside, megabytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from .findings import View


GREY, DARK = "#bbbbbb", "#555555"
LINEAR, TICKS = 5, (5, 10, 30, 100, 300, 1000)  # of the axes, in nats/1000
SHRUNK: dict[int, dict[str, Any]] = {
    8: {"color": COLOURS[2], "marker": "^"},
    4: {"color": COLOURS[5], "marker": "D"},
}
NOTHING = "Nothing is decided: the test text is one document"
SHOWN = 4  # routers in colour, besides BH: the best of the table and the worst
LINE = 0.034  # of the panel's height: from one name beside a line to the next
CONTROLS = {RANDOM: (":", "random R"), ORACLE: ("--", "oracle")}


def figure(run: dict[str, Any]) -> Figure:
    """A matplotlib Figure of a run (a dict as in the JSON), 1,600 px wide when saved.

    A row a table: effects against experts with bands, and all routers at one budget. Then, with
    quantised experts, KL against the bytes that a token reads. The user's matplotlib backend and
    its state are not touched.
    """
    from matplotlib.figure import Figure

    view = View(run)
    tables = [name for name in view.tables if view.cells(table=name)]
    count = len(tables) + bool(view.quantized())
    fig = Figure(figsize=(16, 7.2 * max(count, 1)), dpi=100, layout="constrained")
    pads(fig, 0.15, 0.35)  # room for the titles
    if not count:
        fig.text(0.5, 0.5, "no router has finished", ha="center", size=14)
        return fig
    axes = fig.subplots(count, 2, squeeze=False, width_ratios=(10, 8))
    coloured = _highlighted(view, tables[0]) if tables else []  # the same in every row
    for row, table in zip(axes, tables, strict=False):
        _curves(row[0], view, table, coloured)
        _forest(row[1], view, table)
    if view.quantized():
        _by_bytes(axes[-1][0], view)
        _ways(axes[-1][1], view)
    return fig


def _title(axis: Axes, headline: str, detail: str) -> None:
    pad = 26 + 16 * detail.count("\n")
    axis.set_title(headline, loc="left", size=15, weight="bold", pad=pad).set_in_layout(False)
    # Long lines must not make the axes narrower.
    text = axis.text(0, 1.015, detail, transform=axis.transAxes, size=12, color="#444444")
    text.set_in_layout(False)


def _ends(view: View, words: str) -> str:
    """What the bars are, where there are any."""
    return "no intervals" if view.is_one_document else words


def _line(
    view: View, table: str, role: str, contender: str
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """(experts, effect, band low, band high), of the budgets in every layer; (0,) if none."""
    cells = view.cells(table=table, allocation="equal", role=role, contender=contender)
    cells.sort(key=lambda cell: cell["average_k"])
    effects = [cell["effect"]["kl"] for cell in cells]
    estimate, low, high = (
        np.array([effect[end] for effect in effects])
        for end in ("estimate", "band_low", "band_high")
    )
    return np.array([cell["average_k"] for cell in cells]), estimate, low, high


def _highlighted(view: View, table: str) -> list[str]:
    """Names in colour: BH, then those with the lowest effects, then that with the highest.

    By the mean of KL over static's, so that small budgets don't decide alone; only routers that
    reach every budget that some router reaches.
    """
    lines = {name: _line(view, table, ROUTER, name) for name in view.contenders}
    most = max(len(experts) for experts, *_ in lines.values())
    score = {
        name: float(np.mean(effect / np.maximum(np.interp(experts, *_static(view)), 1e-3)))
        for name, (experts, effect, _, _) in lines.items()
        if len(experts) == most and most
    }
    order = sorted((name for name in score if name != PRIMARY), key=score.__getitem__)
    chosen = order if len(order) <= SHOWN else [*order[: SHOWN - 1], order[-1]]
    own = [PRIMARY] if len(lines.get(PRIMARY, ((),))[0]) else []
    return own + chosen


def _static(view: View) -> tuple[list[int], list[float]]:
    curve = view.run["static"]
    return [cell["budget"] for cell in curve], [cell["kl"] for cell in curve]


def _curves(axis: Axes, view: View, table: str, coloured: list[str]) -> None:
    """Effects against experts: static top-k is the line at 0."""
    for name in (name for name in view.contenders if name not in coloured):
        experts, effect, _, _ = _line(view, table, ROUTER, name)
        axis.plot(experts, 1e3 * effect, ".-", color=GREY, linewidth=1, zorder=1, label=name)
    for name, style in zip(coloured, line_styles(len(coloured)), strict=True):
        experts, effect, low, high = _line(view, table, ROUTER, name)
        axis.fill_between(experts, 1e3 * low, 1e3 * high, color=style["color"], alpha=0.15, lw=0)
        if len(experts) == 1:  # nothing to shade
            axis.vlines(experts, 1e3 * low, 1e3 * high, color=style["color"], linewidth=2)
        primary = name == PRIMARY
        axis.plot(
            experts,
            1e3 * effect,
            markersize=7,
            linewidth=2.6 if primary else 1.8,
            label=name,
            zorder=3 + primary,
            **style,
        )
    for role, (dashes, label) in CONTROLS.items():
        name = {RANDOM: "random R", ORACLE: "oracle"}[role]
        experts, effect, _, _ = _line(view, table, role, name)
        look: dict[str, Any] = {"linestyle": dashes, "marker": ".", "color": DARK, "linewidth": 1.6}
        axis.plot(experts, 1e3 * effect, label=label, zorder=2, **look)
    x, y = np.concatenate([line.get_xydata() for line in axis.lines]).astype(float).T
    axis.axhline(0, color="black", linewidth=1.6, zorder=3)
    budgets = view.tables[table]["budgets"]
    axis.plot(x.max(initial=min(budgets)), 0, color="black", label="static top-k")  # for its name
    _scale(axis, "y", y)
    axis.set_xlim(min(budgets) - 0.4, max(max(budgets), x.max()) + 0.4)
    _name_lines(axis)
    axis.set_xticks(range(min(budgets), max(budgets) + 1))
    axis.grid(color="#e4e4e4")
    axis.set_axisbelow(True)
    axis.set_xlabel("experts per token on the test text", size=13)
    axis.set_ylabel("KL to the full model less static's, nats/1000 (log scale beyond 5)", size=13)
    most = view.tables[table]["max_k"]
    _title(
        axis,
        _headline(view, table),
        f"table {table}: at most {most} experts a token; below 0 is better; "
        f"{_ends(view, 'bars: bands' if len(budgets) == 1 else 'shaded: bands')}\n"
        "random R: random numbers of experts; oracle: knows the experts' outputs",
    )


def _scale(axis: Axes, name: str, values: NDArray[np.float64]) -> None:
    """Linear around 0, logarithmic beyond: effects at many and at few experts are both seen."""
    getattr(axis, f"set_{name}scale")("symlog", linthresh=LINEAR, linscale=0.6)
    reached = np.abs(values).max(initial=LINEAR)
    ticks = [tick for tick in TICKS if tick <= 1.5 * reached]
    low, high = np.min(values, initial=0.0), np.max(values, initial=0.0)
    ticks = [-t for t in ticks if low < -0.7 * t] + [0] + [t for t in ticks if high > 0.7 * t]
    getattr(axis, f"set_{name}ticks")(ticks, [f"{tick:+g}" if tick else "0" for tick in ticks])
    getattr(axis, f"set_{name}ticks")([], minor=True)


def _headline(view: View, table: str) -> str:
    if view.is_one_document:
        return NOTHING
    cells = view.cells(table=table, allocation="equal", role=ROUTER)
    budgets = {cell["budget"] for cell in cells}
    won = {cell["contender"] for cell in cells if verdict(cell["effect"]["kl"]) == BETTER}
    everywhere = [
        name
        for name in won
        if all(verdict(c["effect"]["kl"]) == BETTER for c in cells if c["contender"] == name)
    ]
    number = len(view.contenders)
    counted = f"{len(won)} of {number} routers"
    if len(budgets) == 1:
        counted = counted if won else f"None of {number} routers"
        beat = "beat" if len(won) > 1 else "beats"
        return f"{counted} {beat} static top-k at {budgets.pop()} experts"
    if not won:
        return f"None of {number} routers beats static top-k at any budget"
    return f"{counted} beat static top-k somewhere, {len(everywhere)} always"


def _name_lines(axis: Axes) -> None:
    """Each line's name at its right end, moved up or down where names would overlap."""
    drawn: list[Any] = list(axis.lines)
    lines = [line for line in drawn if len(line.get_xdata()) and line.get_label()[0] != "_"]
    names = []
    for line in lines:
        (x, y), colour = line.get_xydata()[-1], line.get_color()
        names.append(Name(x, y, line.get_label(), DARK if colour == GREY else colour))
    put_names(axis, names, LINE)


def _forest(axis: Axes, view: View, table: str) -> None:
    """Every router's effect at one budget, with band and interval, best first."""
    budget = view.budgets(table)[0]
    cells = [
        cell
        for role in (ROUTER, RANDOM, ORACLE)
        for cell in view.cells(table=table, allocation="equal", role=role, budget=budget)
    ]
    free = view.cell(table=table, allocation="free", role=STATIC, budget=budget)
    cells = sorted([*cells, free] if free else cells, key=lambda c: c["effect"]["kl"]["estimate"])
    labels = []
    for place, cell in enumerate(cells):
        effect = {name: 1e3 * value for name, value in cell["effect"]["kl"].items()}
        colour = COLOURS[0] if cell["contender"] == PRIMARY else "black"
        if cell["role"] != ROUTER:
            colour = DARK
        axis.plot([effect["band_low"], effect["band_high"]], [place] * 2, color=colour, lw=1.2)
        axis.plot([effect["low"], effect["high"]], [place] * 2, color=colour, lw=4)
        silent = adaptive(cell) is False
        axis.plot(
            effect["estimate"],
            place,
            "o",
            color=colour,
            markersize=8,
            markerfacecolor="white" if silent else colour,
        )
        labels.append("top-k, split over layers" if cell["role"] == STATIC else cell["contender"])
    axis.axvline(0, color="black", linewidth=1.6, zorder=0)
    _scale(axis, "x", np.concatenate([line.get_xdata() for line in axis.lines]).astype(float))
    axis.set_yticks(range(len(cells)), labels, size=11)
    axis.invert_yaxis()
    axis.grid(axis="x", color="#e4e4e4")
    axis.set_axisbelow(True)
    axis.set_xlabel("KL to the full model less static's, nats/1000 (log scale beyond 5)", size=13)
    reached = view.count([cell for cell in cells if cell["role"] == ROUTER])
    detail = (
        f"{reached} reach it; {_ends(view, 'thick: 95 % interval; thin: band')}\n"
        "hollow: the band against shuffled-k reaches 0"
    )
    _title(axis, f"At a budget of {budget} experts in every layer", detail)


# ---- skip experts or shrink them ----


def _by_bytes(axis: Axes, view: View) -> None:
    """KL against the bytes of experts' weights that a token reads: a line for each way."""
    top_k = view.top_k
    static = view.run["static"][:top_k]
    routers = view.best_routers()
    lines: list[tuple[str, list[dict[str, Any]], dict[str, Any]]]
    lines = [("static top-k", static, {"color": "black", "marker": "o"})]
    lines += [("best router", routers, {"color": COLOURS[0], "marker": "s"})] if routers else []
    for bits in sorted({cell["bits"] for cell in view.quantized()}, reverse=True):
        lines.append((f"static, {bits} bits", view.quantized(bits), SHRUNK[bits]))
    for name, cells, style in lines:
        cells = [cell for cell in cells if cell["kl"] > 0]
        read = [cell["bytes_per_token"] / 1e6 for cell in cells]
        axis.plot(read, [cell["kl"] for cell in cells], markersize=7, lw=1.8, label=name, **style)
        for x, cell in zip(read, cells, strict=True):
            if level := cell.get("level", {}).get("kl"):
                axis.plot([x, x], [level["low"], level["high"]], color=style["color"], lw=4)
            if name != "best router":
                text = axis.annotate(
                    f"{cell['budget']}", (x, cell["kl"]), (5, 4), textcoords="offset points", size=9
                )
                text.set_color(style["color"])
    whole_model = view.static(top_k)
    if whole_model:
        axis.axvline(whole_model["bytes_per_token"] / 1e6, color=DARK, ls=":", lw=1.4)
        axis.annotate(
            "the model itself: KL 0",
            (whole_model["bytes_per_token"] / 1e6, 0.02),
            (-5, 0),
            axis.get_xaxis_transform(),
            "offset points",
            size=11,
            rotation=90,
            ha="right",
            va="bottom",
            color=DARK,
        )
    _bytes_scale(axis)
    axis.legend(loc="lower left", fontsize=12, frameon=False)
    axis.set_ylabel("KL to the full model, nats per token", size=13)
    dtype = view.run["dtype"]
    ends = _ends(view, "bars: 95 % intervals")
    detail = f"numbers: k; {ends}; model in {dtype}\nto the left and down is better"
    _title(axis, _answer(view), detail)


def _bytes_scale(axis: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_yscale("log")
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    axis.grid(color="#e4e4e4")
    axis.set_axisbelow(True)
    axis.set_xlabel("experts' weights that a token reads, MB", size=13)


def _answer(view: View) -> str:
    """In short, from the bands: of the fewest bits that beat all that reads more, or the fewest."""
    if view.is_one_document:
        return NOTHING
    answer = "Skip experts or shrink them: not measured to the end"
    for whole in view.whole():  # bits descending
        beaten = len(beside(view, whole)["beaten"])
        more = sum(c["bytes_per_token"] > whole["bytes_per_token"] for c in view.skipping())
        lead = f"All {whole['budget']} experts in {whole['bits']} bits beat"
        if beaten == more > 0:
            answer = f"{lead} fewer that read more"
        elif "fewer" not in answer:
            answer = f"{lead} {beaten} of {more} ways that read more"
    return answer


def _ways(axis: Axes, view: View) -> None:
    """KL of all experts in few bits beside that of every router at one budget, least first."""
    table, top_k = next(iter(view.tables)), view.top_k
    budget = view.budgets(table)[-1]
    cells = [
        (cell, cell["contender"])
        for cell in view.cells(role=ROUTER, table=table, allocation="equal", budget=budget)
    ]
    cells += [(c, f"static top-{budget}") for c in view.run["static"] if c["budget"] == budget]
    cells += [(c, quantized_name(c["budget"], c["bits"])) for c in view.whole()]
    cells.sort(key=lambda pair: pair[0]["kl"])
    labels = []
    for place, (cell, name) in enumerate(cells):
        shrunk = cell["role"] == QUANTIZED
        colour = SHRUNK[cell["bits"]]["color"] if shrunk else "black"
        if level := cell.get("level", {}).get("kl"):
            axis.plot([level["low"], level["high"]], [place] * 2, color=colour, lw=4)
        axis.plot(
            cell["kl"],
            place,
            SHRUNK[cell["bits"]]["marker"] if shrunk else "o",
            color=colour,
            markersize=8,
        )
        labels.append(f"{name}: {megabytes(cell)} MB")
    axis.set_xscale("log")
    axis.set_yticks(range(len(cells)), labels, size=11)
    axis.invert_yaxis()
    axis.grid(axis="x", color="#e4e4e4")
    axis.set_axisbelow(True)
    axis.set_xlabel("KL to the full model, nats per token", size=13)
    _title(
        axis,
        f"KL at {budget} experts, or all {top_k} in fewer bits",
        f"beside each name: what a token reads\n{_ends(view, 'bars: 95 % intervals')}",
    )
