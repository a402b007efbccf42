"""The figures of a profile: which there are, and those with a line or a point for each layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..show.figures import COLOURS, MARKERS, style, whole_ticks
from . import maps
from .drawing import by_layer, figure, marked, of_phase, ticks_for
from .metrics import ratio_each
from .structure import pair_structure, strongest
from .wording import counted, percent, scaled, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from .metrics import LayerMetrics
    from .types import Profiled


def k(profile: Profiled) -> Figure:
    """How many experts does a token use?"""
    phases = [p for p in profile.phases if any(m.tokens for m in profile.each(p))]
    fig, (left, right) = figure(1, 2, "How many experts a token uses", widths=(1, 1.3))
    tables = {p: sum_of([c.k[0] for c in profile.counts_of(p)]) for p in phases}
    last = max(int(np.flatnonzero(t).max()) for t in tables.values())
    for number, (phase, table) in enumerate(tables.items()):
        width = 0.8 / len(tables)  # the phases stand beside each other
        aside = (number - (len(tables) - 1) / 2) * width
        at = np.arange(last + 1) + aside
        left.bar(at, 100 * ratio_each(table, table.sum())[: last + 1], width, **of_phase(phase))
        low, middle, high = np.array([_k_range(m) for m in profile.each(phase)]).T
        at = np.arange(len(middle)) + aside
        right.vlines(at, low, high, color=of_phase(phase)["color"], lw=2, alpha=0.5)
        right.plot(at, middle, **marked(number), **of_phase(phase))
    left.set_xticks(ticks_for(last + 1, 17))
    style(left, "experts per token", "% of tokens, all layers", "Distribution")
    right.set_ylim(bottom=0)
    by_layer(right, profile)
    style(right, "layer", "experts per token", "Mean by layer; bars: 10th to 90th percentile")
    left.legend(frameon=False)
    return fig


def _k_range(metrics: LayerMetrics) -> Sequence[float]:
    """The 10th percentile, the mean and the 90th of a layer's experts per token."""
    table = metrics.counts.k[0]
    if not table.sum():
        return [math.nan] * 3
    low, high = (int(np.searchsorted(np.cumsum(table), q * table.sum())) for q in (0.1, 0.9))
    return low, metrics.k_mean, high


def sum_of(tables: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """The sum of arrays (E + 1,) of layers that may differ in E."""
    total = np.zeros(max(map(len, tables)), np.int64)
    for table in tables:
        total[: len(table)] += table
    return total


def confidence(profile: Profiled) -> Figure:
    """How sure is the router?"""
    fig, axes = figure(1, 2, "The router's softmax, each quartile to within 0.005")
    panels = (
        (axes[0], "router_confidence_quartiles", "1 − H(p) / ln E (1: certain)", "Confidence"),
        (
            axes[1],
            "router_gap_quartiles",
            "most probable less second most probable",
            "Gap of the two most probable experts",
        ),
    )
    for axis, name, y, title in panels:
        for number, phase in enumerate(profile.phases):
            low, middle, high = np.array([getattr(m, name) for m in profile.each(phase)]).T
            colour = of_phase(phase)["color"]
            axis.fill_between(range(len(low)), low, high, color=colour, alpha=0.15, lw=0)
            axis.plot(middle, **marked(number), **of_phase(phase))
        axis.set_ylim(*_unit_limits(axis))
        by_layer(axis, profile)
        style(axis, "layer", y, f"{title}: median; shaded: quartiles")
    axes[0].legend(frameon=False)
    return fig


def _unit_limits(axis: Axes) -> tuple[float, float]:
    """Limits of y that show where the data lie, a part of 0 to 1."""
    low, high = axis.dataLim.intervaly
    if not np.isfinite(high - low):
        return 0, 1
    room = max(0.08 * (high - low), 0.01)
    return max(low - room, 0), min(high + room, 1)


def latency(profile: Profiled) -> Figure:
    """How long does each layer take?"""
    phases = profile.phases
    fig, axes = figure(1, len(phases), "Time of a layer's step", width=6.2)
    for axis, phase in zip(np.atleast_1d(axes), phases, strict=True):
        ms = profile.each(phase)
        colour = of_phase(phase)["color"]
        p50, p90, p99 = ([m.latency_ms(q) for m in ms] for q in (50, 90, 99))
        at = np.arange(len(ms))
        axis.vlines(at, p50, p99, color=colour, lw=1, alpha=0.6)
        axis.plot(at, p50, "o-", color=colour, label="median", markersize=5)
        axis.plot(at, p90, "_", color=colour, label="90th percentile", markersize=9, mew=2)
        axis.plot(at, p99, "^", color=colour, label="99th percentile", markersize=5, mfc="white")
        axis.set_ylim(0, 1.15 * np.nanmax(p99))  # room for the legend
        by_layer(axis, profile)
        steps = max(m.steps for m in ms)
        tokens = max(m.tokens + m.tokens_padding for m in ms)
        each = f"{tokens / steps:,.1f}".removesuffix(".0")
        title = f"{phase}: {counted(steps, 'step')}, {each} token{'s' * (each != '1')} on average"
        style(axis, "layer", "time (ms)", title)
        axis.legend(frameon=False, loc="upper left", ncols=3)
    return fig


def roofline(profile: Profiled) -> Figure:
    """What limits the layers, and how near they come to it?"""
    roof = profile.roofline
    assert roof is not None  # without one the figure isn't offered
    fig, axis = figure(1, 1, "MoE layers under the machine's roof", width=9)
    points = {
        phase: [(m.arithmetic_intensity, m.gflops) for m in profile.each(phase) if m.steps]
        for phase in profile.phases
    }
    ridge = roof.gemm_gflops / roof.read_gbs
    known = np.array([p for ps in points.values() for p in ps if not math.isnan(p[0] + p[1])])
    low = min(known[:, 0].min(), ridge) / 4
    high = max(known[:, 0].max(), ridge) * 3
    x = np.geomspace(low, high, 200)
    axis.plot(x, np.minimum(roof.gemm_gflops, x * roof.read_gbs), color="black", lw=2)
    axis.set_xscale("log")
    axis.set_yscale("log")
    for number, (phase, each) in enumerate(points.items()):
        colour = of_phase(phase)["color"]
        axis.plot(*np.array(each).T, ".", color=colour, alpha=0.6, markersize=6)
        _total(axis, profile, phase, MARKERS[number], colour)
    bottom = known[:, 1].min() / 3
    axis.set_ylim(bottom, max(roof.gemm_gflops, known[:, 1].max()) * 2.5)
    axis.set_xlim(low, high)
    for one in (axis.xaxis, axis.yaxis):
        one.set_major_formatter("{x:g}")
        one.set_minor_formatter("")
    axis.annotate(
        f"matrix products: {scaled(1e9 * roof.gemm_gflops, 'FLOP/s')}",
        (high, roof.gemm_gflops),
        (-6, 6),
        textcoords="offset points",
        ha="right",
    )
    middle = math.sqrt(low * ridge)
    axis.annotate(
        f"reading: {short(roof.read_gbs)} GB/s",
        (middle, middle * roof.read_gbs),
        (-10, 4),
        textcoords="offset points",
        ha="right",
    )
    style(
        axis,
        "arithmetic intensity (FLOP for each byte of weights)",
        "GFLOP/s",
        f"Dots: layers; large: all of a phase. Roof: measured, {roof.conditions}",
    )
    axis.legend(frameon=False, loc="lower right", markerscale=0.6)
    return fig


def _total(axis: Axes, profile: Profiled, phase: str, marker: str, colour: str) -> None:
    """The phase as a whole, named with what it reached."""
    ms = [m for m in profile.each(phase) if m.steps]
    time = sum(int(m.counts.nanoseconds) for m in ms)
    read = sum(m.bytes_per_step * m.steps for m in ms)
    done = sum(m.flops_total_with_padding for m in ms)
    roof = profile.roofline
    assert roof is not None
    label = (
        f"{phase}: {short(read / time)} GB/s ({percent(read / time / roof.read_gbs)}), "
        f"{short(done / time)} GFLOP/s ({percent(done / time / roof.gemm_gflops)})"
    )
    axis.plot(
        done / read,
        done / time,
        marker,
        color=colour,
        markersize=15,
        mew=2,
        markerfacecolor="none",
        label=label,
        ls="none",
    )


def union(profile: Profiled) -> Figure:
    """How many experts does a step with several tokens read?"""
    ms = [m for m in profile.each() if m.steps]
    fig, axis = figure(1, 1, "Distinct experts that a step reads, by its tokens", width=9)
    tables = [m.unique_experts_by_tokens for m in ms]
    sizes = sorted(set().union(*tables))
    shares = [
        [table[n] / m.layer.num_experts for m, table in zip(ms, tables, strict=True) if n in table]
        for n in sizes
    ]
    middle = [100 * np.mean(s) for s in shares]
    ends = [[100 * abs(f(s) - np.mean(s)) for s in shares] for f in (np.min, np.max)]
    axis.errorbar(
        sizes,
        middle,
        ends,
        fmt="o",
        color=COLOURS[0],
        capsize=3,
        label="measured: mean, lowest and highest layer",
    )
    x = np.geomspace(1, max(*sizes, 2), 200)
    share = np.mean([m.k_mean_with_padding / m.layer.num_experts for m in ms])
    axis.plot(
        x,
        100 * (1 - (1 - share) ** x),
        "--",
        color="black",
        lw=1.2,
        label="if tokens chose k of E evenly, each for itself",
    )
    axis.set_xscale("log", base=2)
    ticks = [2**n for n in range(9) if 2**n <= max(*sizes, 2)]
    axis.set_xticks(ticks, [f"{n}" if n < 256 else "≥ 256" for n in ticks])
    axis.set_ylim(0, 103)
    style(axis, "tokens in the step, padding included", "distinct experts (% of E)", "Both phases")
    axis.legend(frameon=False, loc="upper left" if middle[-1] < 60 else "lower right")
    return fig


def cache(profile: Profiled) -> Figure:
    """How many experts would have to be kept near?"""
    fig, axis = figure(1, 1, "Hit rate of an LRU cache of experts", width=9)
    sizes = {layer.num_experts for layer in profile.layers}
    # As the findings count them: in experts, where the layers have as many.
    whole, unit = (100, "% of E") if len(sizes) > 1 else (max(sizes), f"of {max(sizes)}")
    for phase in profile.phases:
        ms = [m for m in profile.each(phase) if m.counts.reuse.sum()]
        if not ms:
            continue
        common = np.linspace(0, 1, 129)  # of E, which layers may differ in
        rates = 100 * np.array(
            [
                np.interp(common, np.linspace(0, 1, len(m.lru_hit_rates)), m.lru_hit_rates)
                for m in ms
            ]
        )
        colour = of_phase(phase)["color"]
        at = common * whole
        axis.fill_between(at, rates.min(0), rates.max(0), color=colour, alpha=0.15, lw=0)
        axis.plot(at, rates.mean(0), lw=2, **of_phase(phase))
    axis.set_xlim(0, whole)
    axis.set_ylim(0, 103)
    whole_ticks(axis)
    style(
        axis,
        f"experts kept of each layer ({unit})",
        "accesses served (%)",
        "Mean of layers; shaded: lowest to highest layer. First accesses are misses",
    )
    axis.legend(frameon=False, loc="upper left")
    return fig


def _measured(profile: Profiled) -> dict[str, tuple[Callable[..., Figure], str | None]]:
    """{name: why it can't be drawn, or None}, in the order of the page."""
    each = profile.each()
    steps = None if profile.phases else "no step was counted"
    tokens = steps or (None if any(m.tokens for m in each) else "no real token was counted")
    logits = tokens or (
        None
        if any(c.confidence.any() for c in profile.counts_of())
        else "the router's logits were not known"
    )
    counted_pairs = tokens or (
        None if any(m.counts.pairs.any() for m in each) else "pairs of experts were not counted"
    )
    pairs = counted_pairs or (
        "no token selects two experts"
        if strongest(profile.counts_of(), pair_structure) is None
        else None
    )
    moves = counted_pairs or (
        None
        if any(m.counts.moves.any() for m in each)
        else "no token was followed from layer to layer"
    )
    several = None if any(layer.num_experts > 1 for layer in profile.layers) else "one expert each"
    kept = steps or (None if any(m.counts.reuse.any() for m in each) else "no expert ran")
    roof = steps or ("there is no measured roof" if profile.roofline is None else None)
    if not roof and not any(m.gflops > 0 and m.read_gbs > 0 for m in each):
        roof = "the experts' sizes are not known"
    domains = tokens or (
        None if len(profile.domains or ()) > 1 else "the texts had no two domain labels to compare"
    )
    return {
        "load": (maps.load, tokens),
        "k": (k, tokens),
        "confidence": (confidence, logits or several),
        "latency": (latency, steps),
        "roofline": (roofline, roof),
        "union": (union, steps),
        "cache": (cache, kept or several),
        "coactivation": (maps.coactivation, pairs),
        "moves": (maps.moves, moves),
        "domains": (maps.domains, domains),
    }


def instead(profile: Profiled) -> dict[str, str]:
    """{figure: the sentence that says as much}, of figures that show a single number."""
    seen = {n for c in profile.counts_of() for n in np.flatnonzero(c.k[0]).tolist()}
    if len(seen) != 1:
        return {}
    return {"k": f"Every token uses {counted(max(seen), 'expert')} in every layer."}


def available(profile: Profiled) -> list[str]:
    return [name for name, (_, reason) in _measured(profile).items() if not reason]


def plot(profile: Profiled, name: str = "load", **options: Any) -> Figure:
    """See Profile.plot."""
    known = _measured(profile)
    if name not in known:
        raise ValueError(f"figure: expected one of {', '.join(known)}, got {name!r}")
    draw, reason = known[name]
    if reason:
        raise ValueError(f"figure {name!r}: {reason}")
    if options and name not in ("coactivation", "moves"):
        raise ValueError(f"figure {name!r} takes no options, got {', '.join(options)}")
    return draw(profile, **options)
