"""The figures of a profile that are maps: experts by layers, experts by experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..show.figures import COLOURS, plain
from .drawing import figure, ticks_for
from .specialisation import beyond_chance
from .structure import clustered, move_structure, pair_structure, strongest
from .wording import spans

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from numpy.typing import NDArray

    from ..profiler.tally import Counts
    from .types import Label, Profiled


FOLD = 3  # the colours of a ratio reach from 2^-FOLD to 2^FOLD
NEVER = "#777777"  # lines that cross where an expert was never selected
BAR = 0.7  # inches of the bar of colours below the maps
BARS = 12
NAMES = 32  # experts named along a side of a square map
POINTS = "share of its tokens less that of the others', in points; white: alike but for chance"
LABEL = 32  # characters of a domain's above its map


def _ratio_map(axis: Axes, table: NDArray[np.float64], labels: Sequence[Label]) -> AxesImage:
    """imshow of ratios (L, E) to an even choice: white 1, red more, blue less, crossed never."""
    with np.errstate(divide="ignore"):
        shown = np.ma.masked_where(table == 0, np.log2(table))
    return _more_or_less(axis, shown, FOLD, labels, 32)


def _more_or_less(
    axis: Axes,
    shown: NDArray[np.float64],
    limit: float,
    labels: Sequence[Label],
    ticks: int,
) -> AxesImage:
    """imshow of an array (L, E): white 0, red to `limit`, blue to -limit, crossed if masked."""
    image = axis.imshow(
        shown, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="none"
    )
    _cross(axis)
    rows = ticks_for(shown.shape[0])
    axis.set_yticks(rows, [str(labels[row]) for row in rows])
    axis.set_xticks(ticks_for(shown.shape[1], ticks))
    axis.set_xlabel("expert", size=11)
    axis.set_ylabel("layer", size=11)
    return image


def _crossed(never: NDArray[np.bool_]) -> str:
    """What a title says of experts that were never selected, where there are some."""
    return "; crossed: never selected" if never.any() else ""


def _cross(axis: Axes) -> None:
    """Lines that cross, unlike any colour on paper and in the dark, where an image has none."""
    axis.patch.set(facecolor="none", hatch="xxxxx", edgecolor=NEVER, linewidth=0)


def _bar(fig: Figure, image: AxesImage, axes: Any, label: str, **options: Any) -> Colorbar:
    """The colours below the maps at their left, where a narrow screen shows them."""
    bar = fig.colorbar(
        image, ax=axes, location="bottom", anchor=(0, 1), aspect=24, pad=0.02, **options
    )
    bar.set_label(label, size=11, loc="left")
    solids: Any = bar.solids
    solids.set_rasterized(True)  # one small picture in an SVG, not 256 rectangles
    return bar


def _ratio_bar(fig: Figure, image: AxesImage, axes: Any, label: str) -> None:
    ticks = range(-FOLD, FOLD + 1)
    bar = _bar(fig, image, axes, label, ticks=ticks, extend="both", shrink=0.35)
    bar.ax.set_xticklabels([f"1/{2**-n}" if n < 0 else f"{2**n}" for n in ticks])


def _stack(rows: Sequence[NDArray[np.float64]], widths: Sequence[int]) -> NDArray[np.float64]:
    """A (L, E) table of rows that may differ in length; nan beyond."""
    table = np.full((len(rows), max(widths)), np.nan)
    for place, row in enumerate(rows):
        table[place, : len(row)] = row
    return table


def _height(profile: Profiled) -> float:
    """Inches of a map with a row for each layer."""
    return min(max(1.6, 0.16 * len(profile.layers)), 6.5)


def load(profile: Profiled) -> Figure:
    """Which experts do the work?"""
    phases = [p for p in profile.phases if any(m.tokens for m in profile.each(p))]
    fig, axes = figure(
        len(phases),
        1,
        "Load of the experts, relative to an even one",
        width=12,
        height=_height(profile) + 0.7 + BAR / len(phases),
    )
    axes = np.atleast_1d(axes)
    for axis, phase in zip(axes, phases, strict=True):
        ms = profile.each(phase)
        rows = [np.array(m.expert_load) * m.layer.num_experts for m in ms]
        table = _stack(rows, [layer.num_experts for layer in profile.layers])
        image = _ratio_map(axis, table, profile.labels)
        tokens = max(m.tokens for m in ms)
        crossed = _crossed(table == 0)
        axis.set_title(f"{phase}: {tokens:,} tokens a layer{crossed}", loc="left", size=11)
    _ratio_bar(fig, image, axes, "tokens of the expert / (tokens · k/E)")
    return fig


def domains(profile: Profiled) -> Figure:
    """Which experts belong to a domain?"""
    labels = list(profile.domains or ())
    columns = 2 if len(profile.layers) > 12 and len(labels) > 1 else 1
    rows = -(-len(labels) // columns)
    fig, axes = figure(
        rows,
        columns,
        "Domain specialisation: which experts a domain selects more often than the others",
        width=(12, 7)[columns - 1],
        height=_height(profile) * 0.8 + 0.7 + BAR / rows,
    )
    axes = np.atleast_1d(axes).ravel()
    frame = profile.domain_specialisation()
    never = frame["share"].eq(0) & frame["others"].eq(0)
    points = 100 * (frame["share"] - frame["others"]).where(beyond_chance(frame), 0)
    frame["points"] = points.mask(never | frame["p"].isna())
    limit = max(float(points.abs().max()), 1.0)
    for axis, label in zip(axes, labels, strict=False):
        of = frame[frame["domain"] == label]
        pivot = of.pivot(index="layer", columns="expert", values="points")
        table = np.ma.masked_invalid(pivot.loc[profile.labels].to_numpy())
        image = _more_or_less(axis, table, limit, profile.labels, 16)
        tokens = f"{of['tokens'].max():,} tokens{_crossed(np.ma.getmaskarray(table))}"
        axis.set_title(f"{plain(label, LABEL)}: {tokens}", loc="left", size=11)
    for axis in axes[len(labels) :]:
        axis.set_axis_off()
    _bar(fig, image, axes, POINTS, shrink=0.35)
    return fig


def _chosen(
    profile: Profiled,
    layer: Label | None,
    structure: Callable[[Counts], float],
    what: str,
    first: int = 0,
) -> tuple[int, str]:
    """(index, how it was chosen); ValueError for a layer that has no such map.

    what : is counted, in a word for the title
    """
    counts = profile.counts_of()
    if layer is None:
        best = strongest(counts, structure)
        assert best is not None  # such a map isn't offered
        return best, f"where {what} differ most from chance"
    try:
        index = profile.place_of(layer)
    except (KeyError, TypeError):
        index = -1
    if index < first or isinstance(layer, bool):
        raise ValueError(f"layer: expected {spans(profile.labels[first:])}, got {layer!r}")
    return index, "as asked for"


def coactivation(profile: Profiled, layer: Label | None = None) -> Figure:
    """Which experts are selected together? Both phases; layer: its number or a name."""
    index, how = _chosen(profile, layer, pair_structure, "pairs")
    metrics = profile.each()[index]
    table = metrics.coactivation
    assert table is not None
    order = clustered(table)
    title = f"Experts selected together: layer {profile.labels[index]}, {how}"
    fig, (left, right) = figure(1, 2, title, width=6.6, height=6.3, widths=(1.35, 1))
    off = np.where(np.eye(len(table), dtype=np.bool_), np.nan, table)
    _square(fig, left, off[np.ix_(order, order)], order, "share of j's tokens that select i")
    left.set_xlabel(f"expert j, those alike side by side{_named(order)}", size=11)
    left.set_ylabel("expert i, in the same order", size=11)
    load = metrics.counts.load[0]
    crossed = "; crossed: diagonal" + ", never selected" * bool((load == 0).any())
    left.set_title(f"N_ij / N_j of {metrics.tokens:,} tokens{crossed}", loc="left", size=11)
    usual = np.broadcast_to((load / metrics.tokens)[:, None], table.shape)  # whatever j
    _bars(right, _largest(off, usual, load, axis=1), off, usual, "{0}, of the tokens of {1}")
    return fig


def moves(profile: Profiled, layer: Label | None = None) -> Figure:
    """Where do an expert's tokens go in the next MoE layer? layer: that next one."""
    index, how = _chosen(profile, layer, move_structure, "moves", first=1)
    metrics = profile.each()[index]
    table, before = metrics.moves, profile.counts_of()[index - 1].load[0]
    assert table is not None
    rows = clustered(table)
    # Columns in the order in which the rows, as ordered, send to them.
    weight = np.nan_to_num(table[rows]) ** 2
    centre = (np.arange(len(rows))[:, None] * weight).sum(0) / np.maximum(weight.sum(0), 1e-12)
    columns = np.argsort(centre, kind="stable")
    last, own = profile.labels[index - 1], profile.labels[index]
    title = f"From expert to expert: layer {last} to layer {own}, {how}"
    fig, (left, right) = figure(1, 2, title, width=6.6, height=6.3, widths=(1.35, 1))
    _square(
        fig, left, table[np.ix_(rows, columns)], rows, "share of i's tokens that go to j", columns
    )
    left.set_xlabel(f"expert j of layer {own}{_named(columns)}", size=11)
    left.set_ylabel(f"expert i of layer {last}, those alike side by side", size=11)
    crossed = _crossed(np.isnan(table))
    left.set_title(f"{metrics.tokens:,} tokens{crossed}", loc="left", size=11)
    usual = np.broadcast_to(metrics.counts.load[0] / metrics.tokens, table.shape)
    _bars(right, _largest(table, usual, before, axis=0), table, usual, "{0} to {1}")
    return fig


def _square(
    fig: Figure,
    axis: Axes,
    table: NDArray[np.float64],
    rows: NDArray[np.int64],
    label: str,
    columns: NDArray[np.int64] | None = None,
) -> None:
    """imshow of shares (E, E), the ticks named by the experts in the order of the map."""
    top = np.nanquantile(table, 0.995) if np.isfinite(table).any() else 1
    image = axis.imshow(
        table,
        cmap="viridis",
        vmin=0,
        vmax=max(float(top), 1e-9),
        aspect="equal",
        interpolation="none",
    )
    columns = rows if columns is None else columns
    for names, place, turn in ((columns, axis.set_xticks, 90), (rows, axis.set_yticks, 0)):
        shown = ticks_for(len(names), NAMES)
        place(shown, names[shown], size=9, rotation=turn)
    _cross(axis)
    _bar(fig, image, axis, label, extend="max", shrink=0.7)


def _named(order: NDArray[np.int64]) -> str:
    """What the axis says of its numbers, where they are not all there."""
    step = np.diff(ticks_for(len(order), NAMES)[:2])
    return f"; 1 in {step[0]} is named" if step.size and step[0] > 1 else ""


def _largest(
    table: NDArray[np.float64], usual: NDArray[np.float64], load: NDArray[np.int64], axis: int
) -> list[tuple[int, int]]:
    """The BARS pairs (i, j) with the largest share above the usual one.

    Of experts with at least a quarter of the mean load, as a share of a few tokens says little;
    axis: of the expert whose tokens the share is of.
    """
    often = load >= max(load.mean() / 4, 2)
    above = np.where(often[None, :] if axis == 1 else often[:, None], table - usual, -1)
    above = np.nan_to_num(above, nan=-1)
    places = np.argsort(-above, axis=None, kind="stable")[:BARS]
    pairs = []
    for place in places:
        i, j = np.unravel_index(place, above.shape)
        pairs.append((int(i), int(j)))
    return [pair for pair in pairs if above[pair] > 0]


def _bars(
    axis: Axes,
    pairs: list[tuple[int, int]],
    table: NDArray[np.float64],
    usual: NDArray[np.float64],
    name: str,
) -> None:
    names = [name.format(i, j) for i, j in pairs]
    at = np.arange(len(pairs))
    shares = [100 * table[pair] for pair in pairs]
    above = [share - 100 * usual[pair] for share, pair in zip(shares, pairs, strict=True)]
    bars = axis.barh(at, shares, color=COLOURS[0])
    axis.bar_label(bars, [f"+{points:.1f}" for points in above], padding=4)
    axis.plot([100 * usual[pair] for pair in pairs], at, "|", color="black", markersize=18, mew=2)
    axis.set_yticks(at, names)
    axis.invert_yaxis()
    axis.set_xlim(0, 115)  # room for what stands beside a bar
    axis.set_xticks(range(0, 101, 20))
    axis.grid(axis="x", color="#e5e5e5")
    axis.set_axisbelow(True)
    axis.set_xlabel("share of the tokens (%)", size=11)
    axis.set_title("Points above the usual; bar across: share of all tokens", loc="left", size=11)
