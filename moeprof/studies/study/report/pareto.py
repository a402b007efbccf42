"""Quality against what it costs: experts, bytes and time of a token, and the front of each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ....show.figures import COLOURS, line_styles, pads, plain, style
from ...comparison.bytes_read import quantized_name
from ...comparison.effects import ROUTER, STATIC, level_ends
from ...comparison.findings import View
from ...comparison.speed import SPEED
from ...grid.rows import ENDS
from ...sweep.compared import interval
from ...sweep.merged import merged
from .content import Drawn, Section, Sentence, Shown, plain_table
from .front import front

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .results import Results


TOP = "static top-k"
NEAR_X, NEAR_Y = 0.08, 0.034  # of a panel: numbers that are nearer overlap
MARKER = 0.04  # of a panel: a number that is nearer lies on a marker
KL = "KL to the model itself, nats per token"
BITS = "bits per byte above the model's own routing"
ALLOCATED = {"equal": "", "free": ", split over layers", "shared": ", one parameter"}


class Point(NamedTuple):
    """One way to route. None is what was not measured.

    group : its line of the legend; joined : the group's points are a line
    loss : low and high are its 95 % interval; speed : its _low and _high are the quartiles of
        its rounds
    """

    name: str
    group: str
    experts: float | None
    megabytes: float | None
    loss: float
    low: float | None = None
    high: float | None = None
    speed: float | None = None
    speed_low: float | None = None
    speed_high: float | None = None
    joined: bool = False


class Cost(NamedTuple):
    """A field of Point; sign : 1 where less is better, -1 where more is."""

    field: str
    label: str
    short: str
    better: str
    sign: int = 1

    def of(self, point: Point) -> float | None:
        value: float | None = getattr(point, self.field)
        return value

    def ends(self, point: Point) -> tuple[float, float] | None:
        """What the value may as well have been, where that is known."""
        low, high = (getattr(point, f"{self.field}_{end}", None) for end in ("low", "high"))
        return None if low is None or high is None else (low, high)


COSTS = (
    Cost("experts", "experts per token", "experts", "to the left is cheaper"),
    Cost("megabytes", "experts' weights that a token reads, MB", "bytes", "to the left is cheaper"),
    Cost("speed", "decode speed, tokens/s", "tokens/s", "to the right is faster", -1),
)


# ---- points ----


def of_compare(run: dict[str, Any]) -> list[Point]:
    """Of a run of `compare`: static top-k up to the model's own k, quantised too, all routers."""
    view = View(run)
    points = []
    for cell in run["static"][: view.top_k]:
        own = " (the model itself)" if cell["budget"] == view.top_k else ""
        points.append(_of_cell(cell, f"static top-{cell['budget']}{own}", TOP, True))
    for cell in view.quantized():
        name = f"static {quantized_name(cell['budget'], cell['bits'])}"
        points.append(_of_cell(cell, name, f"{TOP} in {cell['bits']} bits", True))
    for cell in [*view.cells(role=STATIC), *view.cells(role=ROUTER)]:
        about = ALLOCATED[cell["allocation"]]
        about += f" ({cell['table']})" if len(view.tables) > 1 else ""
        group = cell["contender"] if cell["role"] == ROUTER else f"{TOP}, split over layers"
        points.append(_of_cell(cell, f"{cell['contender']} at {cell['budget']}{about}", group))
    return points


def _of_cell(cell: Mapping[str, Any], name: str, group: str, joined: bool = False) -> Point:
    low, high = level_ends(cell) or (None, None)
    return Point(
        name,
        group,
        experts=cell["average_k"],
        loss=cell["kl"],
        low=low,
        high=high,
        joined=joined,
        **_read_and_speed(cell),
    )


def _read_and_speed(row: Mapping[str, Any]) -> dict[str, float | None]:
    """The other costs of a Point, as far as they were measured."""
    read = row.get("bytes_per_token")
    speeds = {f"speed{end}": row.get(SPEED + end) for end in ENDS}
    return {"megabytes": None if read is None else read / 1e6, **speeds}


def of_sweep(run: dict[str, Any]) -> list[Point]:
    """Of a run of `sweep`: the model's own routing, static top-k, BH, what budgets set."""
    own, *rest = run["results"]
    named = [(f"{own['config']} (the model itself)", TOP, {"bits_above_own": 0.0} | own)]
    named += [(f"static top-{row['k']}", TOP, row) for row in run["static"]]
    for name, (row, *_) in merged(rest):
        named.append((name, f"BH alpha {row['alpha']:g}", row))
    done = (row for row in run["budgets"] if not row.get("error"))
    named += [(row["config"], f"{row['router']} set by budget", row) for row in done]
    # Its speeds are taken one configuration after the other: they can't be compared.
    return [_of_row(row | {SPEED: None}, name, group) for name, group, row in named]


def of_grid(rows: Iterable[Mapping[str, Any]]) -> list[Point]:
    """Of rows of one grid that have one model, text and seed."""
    measured = [row for row in rows if row.get("bits_above_own") is not None]
    return [
        _of_row(row, row["configuration"], TOP if row["router"] == "topk" else row["router"])
        for row in measured
    ]


def _of_row(row: Mapping[str, Any], name: str, group: str) -> Point:
    return Point(
        name,
        group,
        experts=row["avg_experts_heldout"],
        loss=row["bits_above_own"],
        low=row.get("bits_above_own_low"),
        high=row.get("bits_above_own_high"),
        joined=group == TOP,
        **_read_and_speed(row),
    )


# ---- fronts ----


def fronts(points: Sequence[Point]) -> dict[str, list[int]]:
    """{field of a cost: places of the front of loss against it}, of the costs that are known."""
    found = {}
    for cost in COSTS:
        values = [cost.of(point) for point in points]
        pairs = [
            (None if value is None else cost.sign * value, point.loss)
            for value, point in zip(values, points, strict=True)
        ]
        if places := front(pairs):
            found[cost.field] = places
    return found


def members(points: Sequence[Point]) -> list[int]:
    """Places of what is in any front, the least loss first: the rows of the table."""
    found = {place for places in fronts(points).values() for place in places}
    return sorted(found, key=lambda place: (points[place].loss, -(points[place].experts or 0)))


def sections(results: Results) -> Iterator[Section]:
    """One, of compare; of the sweep where there is no compare. A grid has its own fronts."""
    title = "Quality against cost: the Pareto fronts"
    if results.compare is not None:
        points, measure = of_compare(results.compare), KL
    elif results.sweep is not None:
        points, measure = of_sweep(results.sweep), BITS
    else:
        if not results.grid:
            yield Section(title, [Sentence("Neither compare nor sweep has a result to show.")])
        return
    sentences = [
        Sentence(
            "How to read it: a point is one way to route; down is closer to the model itself. The "
            "numbered ones are on the front: nothing else that was measured costs as little or "
            "less and is closer. A number is the row of the table.",
            "front-figure",
        ),
        *(Sentence(text, "front") for text in said(points)),
        Sentence(
            f"The fronts are of the estimates: {_near(points)} may change places on another text. "
            "Decode speeds are of this machine, one token at a time, and vary from "
            "run to run."
        ),
    ]
    yield Section(
        title,
        sentences,
        [table(points, measure, "front")],
        [drawn(points, measure, "front-figure", "front")],
    )


def said(points: Sequence[Point]) -> Iterator[str]:
    """Who is on each front, in a sentence."""
    for cost in COSTS:
        places = fronts(points).get(cost.field)
        if not places:
            yield f"Of {cost.short} there is no front: none were measured that can be compared."
            continue
        count = sum(cost.of(point) is not None for point in points)
        groups: dict[str, int] = {}
        for place in places:
            groups[points[place].group] = groups.get(points[place].group, 0) + 1
        order = sorted(groups.items(), key=lambda item: -item[1])
        listed = ", ".join(f"{number} of {group}" for group, number in order)
        yield f"On the front of {cost.short}, {len(places)} of {count} points: {listed}."


def table(points: Sequence[Point], measure: str, key: str) -> Shown:
    """The members of the fronts with all four numbers."""
    on = fronts(points)
    rows = []
    for number, place in enumerate(members(points), 1):
        point = points[place]
        loss = {"loss": point.loss, "loss_low": point.low, "loss_high": point.high}
        rows.append(
            [
                str(number),
                point.name,
                _number(point.experts, ".2f"),
                _number(point.megabytes, ".3g"),
                interval(point._asdict(), "speed", ".1f"),
                interval(loss, "loss", ".4f"),
                ", ".join(cost.short for cost in COSTS if place in on.get(cost.field, ())),
            ]
        )
    head = ["#", "way to route", "experts", "MB", "tokens/s", measure, "on the front of"]
    note = (
        "Experts per token; MB of experts' weights that a token reads; decode speed"
        f"{_of_rounds(points, ', the median of its rounds, in brackets their quartiles')}"
        f"{_of_intervals(points, '; behind the loss its 95 % interval over documents')}. The "
        "least loss first."
    )
    made = plain_table("Members of the fronts", note, head, rows)
    return Shown(key, made._replace(words=(head[1], head[-1])))


def _of_intervals(points: Sequence[Point], words: str) -> str:
    """The words where any of the points has an interval: over one document none has."""
    return words if any(point.low is not None for point in points) else ""


def _of_rounds(points: Sequence[Point], words: str) -> str:
    """The words where a speed was measured more than once."""
    return words if any(point.speed_low is not None for point in points) else ""


def _near(points: Sequence[Point]) -> str:
    return _of_intervals(points, "neighbours whose bars overlap") or "all of these"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


# ---- the figure ----


def drawn(points: Sequence[Point], measure: str, key: str, of: str) -> Drawn:
    caption = (
        "Static top-k has the colour of the text"
        f"{_of_intervals(points, '; upright bars: 95 % intervals')}"
        f"{_of_rounds(points, '; level ones: quartiles of the speeds')}; the wide line joins the "
        "front, whose members have the numbers of the table. The scale is logarithmic, but "
        "straight from 0 to the smallest loss above it."
    )
    return Drawn(key, "Quality against cost", caption, figure(points, measure), of)


def figure(points: Sequence[Point], measure: str) -> Figure:
    """A matplotlib Figure: loss against each cost that was measured, 1,600 px wide when saved."""
    from matplotlib.figure import Figure

    on, numbers = fronts(points), {place: n for n, place in enumerate(members(points), 1)}
    costs = [cost for cost in COSTS if cost.field in on]
    groups = list(dict.fromkeys(point.group for point in points))
    others = [group for group in groups if group != TOP]
    looks = dict(zip(others, line_styles(len(others)), strict=True))
    looks[TOP] = {"color": "black", "marker": "o"}
    fig = Figure(figsize=(16, 7), dpi=100, layout="constrained")
    pads(fig, 0.12, 0.1)
    if not costs:
        fig.text(0.5, 0.5, "nothing was measured", ha="center", size=14)
        return fig
    axes = fig.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    _scale(axes[0], points)
    for place, (axis, cost) in enumerate(zip(axes, costs, strict=True)):
        style(axis, cost.label, "" if place else measure, f"{cost.better}, down is better")
        _front(axis, points, cost, on[cost.field])
        for group in groups:
            _group(axis, points, cost, group, looks[group], on[cost.field])
        axis.margins(x=0.14)  # room for the numbers
        _numbers(axis, points, cost, on[cost.field], numbers)
        axis.tick_params(labelsize=11)
    handles, labels = axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=11)
    return fig


def _scale(axis: Axes, points: Sequence[Point]) -> None:
    above = [point.loss for point in points if point.loss > 0]
    if above:
        axis.set_yscale("symlog", linthresh=min(above), linscale=0.4)
        first, last = (math.floor(math.log10(end(above))) for end in (min, max))
        axis.set_yticks([0.0, *(10.0**power for power in range(first + 1, last + 1))])
        axis.yaxis.set_major_formatter("{x:g}")
        low = min(point.loss for point in points)
        axis.set_ylim(min(low, 0) - 0.4 * min(above), 1.8 * max(above))


def _front(axis: Axes, points: Sequence[Point], cost: Cost, places: list[int]) -> None:
    line = sorted((cost.of(points[place]), points[place].loss) for place in places)
    x, y = zip(*line, strict=True)
    axis.plot(x, y, color=COLOURS[1], linewidth=7, alpha=0.45, zorder=1, label="the front")


def _group(
    axis: Axes,
    points: Sequence[Point],
    cost: Cost,
    group: str,
    look: dict[str, Any],
    places: list[int],
) -> None:
    """The points of a group: those of the front large and in front of the others."""
    of = [i for i, point in enumerate(points) if point.group == group]
    of = [i for i in of if cost.of(points[i]) is not None]
    if of and points[of[0]].joined and cost.sign > 0:  # times vary too much for a line
        line = sorted((cost.of(points[i]), points[i].loss) for i in of)
        dashes = "-" if group == TOP else "--"
        axis.plot(*zip(*line, strict=True), dashes, color=look["color"], linewidth=1.3, zorder=2)
    for i in of:
        point, best = points[i], i in places
        x = cost.of(point)
        assert x is not None  # `of` has only those
        if point.low is not None and point.high is not None:
            axis.plot([x, x], [point.low, point.high], color=look["color"], lw=1.6, zorder=2)
        if ends := cost.ends(point):
            axis.plot(ends, [point.loss] * 2, color=look["color"], lw=1.6, zorder=2)
        axis.plot(
            x,
            point.loss,
            linestyle="",
            markersize=10 if best else 8,
            zorder=3 + best,
            markeredgecolor="black" if best else "white",
            markeredgewidth=0.8 if best else 0.4,
            **look,
        )
    axis.plot([], [], linestyle="", markersize=8, label=plain(group, 32), **look)


def _numbers(
    axis: Axes, points: Sequence[Point], cost: Cost, places: list[int], numbers: Mapping[int, int]
) -> None:
    """Beside the members, on the side of the front where there are no points, one below the other
    where they would overlap, and below the members' own markers."""
    axis.get_xlim()  # so that the limits are those of what is drawn
    to_axes = axis.transScale + axis.transLimits
    at = [[cost.of(points[place]), points[place].loss] for place in places]
    spots = to_axes.transform(np.array(at, float)).tolist()
    put: list[tuple[float, float]] = []
    for (x, y), place in sorted(zip(spots, places, strict=True), key=lambda spot: -spot[0][1]):
        at_x, at_y = x - cost.sign * 0.035, y - 0.025
        middle = at_x - cost.sign * 0.03
        while any(
            abs(at_x - other) < NEAR_X and abs(at_y - below) < NEAR_Y for other, below in put
        ) or any(abs(middle - px) < MARKER and abs(at_y - py) < MARKER for px, py in spots):
            at_y -= 0.005
        put.append((at_x, at_y))
        text = axis.annotate(
            str(numbers[place]),
            (x, y),
            (at_x, at_y),
            "axes fraction",
            "axes fraction",
            ha="right" if cost.sign > 0 else "left",
            va="center",
            size=11,
            weight="bold",
            annotation_clip=False,
            zorder=6,
            bbox={"boxstyle": "square,pad=0.05", "facecolor": "white", "edgecolor": "none"},
            arrowprops={"arrowstyle": "-", "lw": 0.6, "color": "#777777", "shrinkA": 0},
        )
        text.set_in_layout(False)
