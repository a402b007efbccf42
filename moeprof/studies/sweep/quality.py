"""The panels that answer what to use: quality by experts, and beside static top-k."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ...show.figures import MARKERS
from .advice import is_below, is_one_document
from .beside import budgets
from .drawing import blank, label, shades, title
from .merged import merged

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes


STATIC = "black"
# Okabe & Ito: told apart with every kind of colour vision, and from the shades of alpha.
BY_BUDGET = {"bh": ("#CC79A7", "p"), "fixed_p": ("#D55E00", "*")}  # the last one on top
UNDECIDED = "no intervals over one document"
BESIDE = {"bh": 0.05, "fixed_p": -0.05}  # experts that they are moved by, being at the same budget


def quality(
    use: Axes, beside: Axes, bh: pandas.DataFrame, baseline: Any, run: dict[str, Any]
) -> None:
    """Draw both panels. bh, baseline: rows of results; run: as `sweep` returns it, or {}."""
    if baseline is None:
        for axis in (use, beside):
            blank(axis, "without the baseline there is nothing to compare with")
        return
    static = sorted(run.get("static", ()), key=lambda row: row["k"])
    found = [row for row in run.get("budgets", ()) if "nats_by_document" in row]
    points = _points(bh, baseline)
    marks = budgets(int(baseline["max_k"]))
    _use(use, points, baseline, static, found, marks, run)
    _beside(beside, points, found, marks, run)


def _points(bh: pandas.DataFrame, baseline: Any) -> list[dict[str, Any]]:
    """A dict for each BH result, equal ones once: where it lies, its colour, marker and name."""
    alphas, caps = sorted(bh["alpha"].unique()), sorted(bh["max_k"].unique())
    colours = dict(zip(alphas, shades(len(alphas)), strict=True))
    points = []
    for _, group in merged(bh.to_dict("records")):
        # The table has nan for None in a column of numbers.
        row = {n: None if isinstance(v, float) and np.isnan(v) else v for n, v in group[0].items()}
        points.append(
            row
            | {
                "bits_above_own": row.get(
                    "bits_above_own", row["bits_per_byte"] - baseline["bits_per_byte"]
                ),
                "colour": colours[row["alpha"]],
                "marker": MARKERS[caps.index(row["max_k"]) % len(MARKERS)],
                "caps": tuple(int(other["max_k"]) for other in group),
            }
        )
    return points


def _use(
    axis: Axes,
    points: list[dict[str, Any]],
    baseline: Any,
    static: list[dict[str, Any]],
    found: list[dict[str, Any]],
    marks: list[float],
    run: dict[str, Any],
) -> None:
    line = [*static, {"k": baseline["max_k"], "bits_above_own": 0.0}]
    line = sorted(line, key=lambda row: row["k"])
    top = max(p["avg_experts_heldout"] for p in points) if points else 0
    if static:
        ks = [row["k"] for row in line]
        bits = [row["bits_above_own"] for row in line]
        axis.plot(
            ks,
            bits,
            "-",
            marker="|",
            markersize=12,
            color=STATIC,
            linewidth=1.8,
            label="static top-k",
        )
        ends = [
            [
                value if (value := row.get(f"bits_above_own_{end}")) is not None else at
                for row, at in zip(line, bits, strict=True)
            ]
            for end in ("low", "high")
        ]
        low, high = ends
        axis.fill_between(ks, low, high, color=STATIC, alpha=0.15, linewidth=0)
    axis.plot(
        baseline["avg_experts_heldout"],
        0,
        "o",
        color=STATIC,
        markersize=9,
        label=f"the model's own top-{baseline['max_k']:g}",
    )
    for point in points:
        _point(axis, point, "bits_above_own", point["colour"], point["marker"], 9)
    _by_budget(axis, found, "bits_above_own")
    _marks(axis, marks)
    _legend(axis, points)
    axis.set_xlim(0.7, max(baseline["max_k"], top) + 0.3)
    values = [p["bits_above_own"] for p in [*points, *static, *found]]
    if values and min(values) > 0:  # logarithmic down to the smallest, straight from there to 0
        axis.set_yscale("symlog", linthresh=min(values))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_ylim(-0.2 * min(values), None)
    label(axis, "experts per token, held-out text", "bits per byte above the model's own top-k")
    bars = UNDECIDED if _undecided(run) else "bars and band: 95 %"
    title(axis, _headline(run), f"down is better; {bars}; equal results share a point")


def _undecided(run: dict[str, Any]) -> bool:
    return bool(run) and is_one_document(run)


def _headline(run: dict[str, Any]) -> str:
    if _undecided(run):
        return "Nothing is decided: one document"
    answers = [f"{i['budget']:g}: {_short(i['best'], run)}" for i in run.get("advice", ())]
    return f"At {'; at '.join(answers)}" if answers else "Quality by experts per token"


def _short(config: str | None, run: dict[str, Any]) -> str:
    """The configuration of this name in few words."""
    rows = [*run["results"], *run["static"], *run["budgets"]]
    row = next((row for row in rows if row["config"] == config), None)
    if row is None:
        return "no answer"
    if "k" in row:
        return f"static top-{row['k']}"
    if "budget" in row:
        return f"{row['router']} set by budget"
    return f"BH, alpha {row['alpha']:g}, max_k {row['max_k']:g}"


def _beside(
    axis: Axes,
    points: list[dict[str, Any]],
    found: list[dict[str, Any]],
    marks: list[float],
    run: dict[str, Any],
) -> None:
    shown = [p for p in [*points, *found] if p.get("bits_above_static") is not None]
    if not shown:
        blank(axis, "static top-k was not run beside these")
        return
    axis.axhline(0, color=STATIC, linewidth=1.8)
    for point in points:
        if point.get("bits_above_static") is not None:
            _point(axis, point, "bits_above_static", point["colour"], point["marker"], 9)
    _by_budget(axis, found, "bits_above_static")
    _marks(axis, marks)
    label(
        axis,
        "experts per token, held-out text",
        "bits per byte beside static top-k\nat the same experts",
    )
    below = sum(map(is_below, shown))
    headline = f"{below} of {len(shown)} settings are better than static top-k"
    ends = "bars: 95 %, paired by document"
    if _undecided(run):
        headline, ends = f"Nothing is decided of {len(shown)} settings: one document", UNDECIDED
    title(axis, headline, f"below the line is better; {ends}; by budget: 0.05 aside")


def _point(
    axis: Axes, point: Mapping[str, Any], field: str, colour: Any, marker: str, size: float
) -> None:
    y: Any
    y, low, high = (point.get(field + end) for end in ("", "_low", "_high"))
    x = point["avg_experts_heldout"]
    if low is not None and not np.isnan(low):
        axis.plot([x, x], [low, high], color=colour, linewidth=1.5)
    axis.plot(x, y, marker, color=colour, markersize=size, markeredgecolor="white")


def _by_budget(axis: Axes, found: list[dict[str, Any]], field: str) -> None:
    for router, (colour, marker) in BY_BUDGET.items():
        for row in found:
            if row["router"] == router and row.get(field) is not None:
                x = row["avg_experts_heldout"] + BESIDE[router]
                beside = row | {"avg_experts_heldout": x}
                _point(axis, beside, field, colour, marker, 14)


def _marks(axis: Axes, marks: list[float]) -> None:
    for budget in marks:
        axis.axvline(budget, color="#999999", linestyle=":", linewidth=1.5, zorder=0)
    axis.grid(color="#eeeeee")
    axis.set_axisbelow(True)


def _legend(axis: Axes, points: list[dict[str, Any]]) -> None:
    for alpha, colour in {p["alpha"]: p["colour"] for p in points}.items():
        axis.plot([], [], "-", color=colour, linewidth=5, label=f"BH alpha {alpha:g}")
    shapes: dict[str, set[int]] = {}
    for point in points:
        shapes.setdefault(point["marker"], set()).update(point["caps"])
    for marker, caps in shapes.items():
        axis.plot([], [], marker, color="#777777", markersize=9, label=f"max_k {min(caps)}")
    for name, (colour, marker) in BY_BUDGET.items():
        axis.plot(
            [],
            [],
            marker,
            color=colour,
            markersize=14,
            markeredgecolor="white",
            label=f"{name} set by budget",
        )
    axis.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.12), fontsize=11, frameon=False, ncols=3
    )
