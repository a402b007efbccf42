"""The panels that answer what to use: quality by experts, and beside static top-k."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ...measure.bootstrap import are_few
from ...show.figures import MARKERS, runs
from .advice import is_below, is_one_document
from .beside import budgets
from .compared import BAND, ENDS, missing_ks, on_line
from .drawing import blank, label, shades, title
from .merged import merged

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes


STATIC = "black"
# Okabe & Ito: told apart with every kind of colour vision, and from the shades of alpha.
BY_BUDGET = {"bh": ("#CC79A7", "p"), "fixed_p": ("#D55E00", "*")}  # the last one on top
ONE_DOCUMENT = "no intervals over one document"
ASIDE = 0.05  # experts that those of one budget are moved by, so that both are seen
BESIDE = {"bh": ASIDE, "fixed_p": -ASIDE}


def quality(
    use: Axes,
    beside: Axes,
    bh: pandas.DataFrame,
    top_k: pandas.DataFrame,
    baseline: Any,
    run: dict[str, Any],
) -> None:
    """Draw both panels. bh, top_k, baseline: rows of results; run: as `sweep` returns it, or {}."""
    if baseline is None:
        for axis in (use, beside):
            blank(axis, "without the baseline there is nothing to compare with")
        return
    static = _static(top_k, baseline, run)
    found = [row for row in run.get("budgets", ()) if "nats_by_document" in row]
    points = [_beside_static(point, static) for point in _points(bh, baseline)]
    marks = budgets(int(baseline["max_k"]))
    _use(use, points, baseline, static, found, marks, run)
    rows = [*points, *found]
    if any(row.get("bits_above_static") is not None for row in rows):
        _beside(beside, points, found, marks, run)
    elif rows:
        ks = [row["k"] for row in static]
        missing = sorted({k for row in rows for k in missing_ks(row["avg_experts_heldout"], ks)})
        listed = ", ".join(map(str, missing))
        blank(beside, f"static top-k was not run for the k beside these: {listed}")
    else:
        blank(beside, "there is nothing to set beside static top-k")


def _static(top_k: pandas.DataFrame, baseline: Any, run: dict[str, Any]) -> list[dict[str, Any]]:
    """Static top-k of the results and of the run, the model's own among them, k ascending."""
    rows = {
        int(row["max_k"]): {"bits_above_own": row["bits_per_byte"] - baseline["bits_per_byte"]}
        for _, row in top_k.iterrows()
    }
    rows |= {row["k"]: row for row in run.get("static", ())}
    return [{**rows[k], "k": k} for k in sorted(rows)]


def _beside_static(point: dict[str, Any], static: list[dict[str, Any]]) -> dict[str, Any]:
    """Its distance from static top-k, where the results don't have it and it can be told."""
    ks, bits = (np.array([row[name] for row in static], float) for name in ("k", "bits_above_own"))
    at = point["avg_experts_heldout"]
    if "bits_above_static" in point or missing_ks(at, ks.tolist()):
        return point
    line = float(on_line(ks, bits[None], np.array([[at]]))[0, 0])
    return point | {"bits_above_static": point["bits_above_own"] - line}


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
    top = max(p["avg_experts_heldout"] for p in points) if points else 0
    if len(static) > 1:
        _static_line(axis, static)
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
    _legend(axis, points, found)
    axis.set_xlim(0.7, max(baseline["max_k"], top) + 0.3)
    others = [row for row in static if row["k"] != baseline["max_k"]]
    values = [p["bits_above_own"] for p in [*points, *others, *found]]
    if values and min(values) > 0:  # logarithmic down to the smallest, straight from there to 0
        axis.set_yscale("symlog", linthresh=min(values))
        axis.set_ylim(-0.2 * min(values), None)
    _plain_ticks(axis)
    label(axis, "experts per token, held-out text", "bits per byte above the model's own top-k")
    bars = ONE_DOCUMENT if _undecided(run) else "no intervals"
    if any(row.get("bits_above_own_low") is not None for row in [*points, *others, *found]):
        bars = "bars, shaded: 95 %"
    detail = f"down is better; {bars}; equal results share a point{_few(run)}"
    title(axis, _headline(run), detail)


def _static_line(axis: Axes, static: list[dict[str, Any]]) -> None:
    """Straight in bits between neighbouring k, as results are compared with it; of many points,
    since a logarithmic axis bends it."""
    ks, bits = (np.array([row[name] for row in static], float) for name in ("k", "bits_above_own"))
    axis.plot(ks, bits, "|", markersize=12, color=STATIC)
    axis.plot([], [], "-|", markersize=12, color=STATIC, linewidth=1.8, label="static top-k")
    named = [f"bits_above_own_{end}" for end in ENDS]
    ends = [[row["bits_above_own" if row.get(n) is None else n] for row in static] for n in named]
    for run in runs(ks):
        if len(run) == 1:
            axis.plot(ks[run], bits[run], "o", color=STATIC, markersize=7)
            axis.plot(ks[[*run, *run]], [end[run[0]] for end in ends], color=STATIC, linewidth=1.5)
            continue
        x = np.linspace(ks[run[0]], ks[run[-1]], 40 * len(run))
        low, high = (np.interp(x, ks, end) for end in ends)
        axis.plot(x, np.interp(x, ks, bits), color=STATIC, linewidth=1.8)
        axis.fill_between(x, low, high, color=STATIC, alpha=0.15, linewidth=0)


def _plain_ticks(axis: Axes) -> None:
    """Numbers with all that belongs to them: a power of ten set apart would lie on the title."""
    axis.yaxis.set_major_formatter("{x:g}")


def _few(run: dict[str, Any]) -> str:
    documents = len(run.get("heldout_documents", ()))
    return f"; {documents} documents only" if are_few(documents) else ""


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
    axis.axhline(0, color=STATIC, linewidth=1.8)
    for point in points:
        if point.get("bits_above_static") is not None:
            _point(axis, point, "bits_above_static", point["colour"], point["marker"], 9)
    _by_budget(axis, found, "bits_above_static")
    _marks(axis, marks)
    _plain_ticks(axis)
    label(
        axis,
        "experts per token, held-out text",
        "bits per byte beside static top-k\nat the same experts (below 0: better)",
    )
    count, detail = len(shown), ""
    if any(row.get("bits_above_static_high") is not None for row in shown):
        headline = f"{sum(map(is_below, shown))} of {count} settings are better than static top-k"
        detail = "thick bars: 95 % intervals, each alone"
        if any(row.get("bits_above_static_band_high") is not None for row in shown):
            detail = "by bands (thin), which hold for all together; thick: intervals, each alone"
        detail += "\n"
    else:
        why = "one document" if _undecided(run) else "no intervals"
        headline = f"Nothing is decided of {count} settings: {why}"
    detail += "equal settings count once"
    if found:
        detail += f"; set by budget: drawn {ASIDE} experts aside"
    title(axis, headline, detail + _few(run))


def _point(
    axis: Axes, point: Mapping[str, Any], field: str, colour: Any, marker: str, size: float
) -> None:
    x = point["avg_experts_heldout"]
    for ends, width in ((BAND, 1.2), (ENDS, 1.5 if field == "bits_above_own" else 3.5)):
        low, high = (point.get(f"{field}_{end}") for end in ends)
        if low is not None and high is not None:
            axis.plot([x, x], [low, high], color=colour, linewidth=width)
    axis.plot(x, point[field], marker, color=colour, markersize=size, markeredgecolor="white")


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


def _legend(axis: Axes, points: list[dict[str, Any]], found: list[dict[str, Any]]) -> None:
    for alpha, colour in {p["alpha"]: p["colour"] for p in points}.items():
        axis.plot([], [], "-", color=colour, linewidth=5, label=f"BH alpha {alpha:g}")
    shapes: dict[str, set[int]] = {}
    for point in points:
        shapes.setdefault(point["marker"], set()).update(point["caps"])
    for marker, caps in shapes.items():
        axis.plot([], [], marker, color="#777777", markersize=9, label=f"max_k {min(caps)}")
    for name, (colour, marker) in BY_BUDGET.items():
        if any(row["router"] == name for row in found):
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
