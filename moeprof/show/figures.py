"""What all figures share: colours, markers, names that are safe to draw."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray


# Okabe & Ito: told apart with every kind of colour vision; black is left for baselines and limits.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
# One more than colours: the same pair of colour and marker comes back only after 42 lines.
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LETTER = 0.01  # of a panel's width: a letter of a name in it
_SHADES = ((1.0, 0.0), (0.5, 0.0), (0.5, 0.5))  # (share of the colour, share of white), rest black


def colours(count: int) -> list[str]:
    """`count` colours, all different: the palette, then it darker, then lighter.

    Of more than 18 an even walk through viridis, whose lightness alone tells its colours apart.
    """
    if count > len(COLOURS) * len(_SHADES):
        from matplotlib import colormaps
        from matplotlib.colors import to_hex

        return [to_hex(colormaps["viridis"](0.9 * i / (count - 1))) for i in range(count)]
    return [_shade(COLOURS[i % len(COLOURS)], *_SHADES[i // len(COLOURS)]) for i in range(count)]


@cache
def on_black() -> dict[str, str]:
    """{one of `colours` that is lost on black: what stands for it there}."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    viridis = colormaps["viridis"]
    walk = [to_hex(viridis(i)) for i in range(viridis.N)]
    lighter = [walk[round(i)] for i in np.linspace(0.3 * len(walk), len(walk) - 1, len(walk))]
    shades = {_shade(colour, *_SHADES[1]): _shade(colour, 0.45, 0.35) for colour in COLOURS}
    return {old.lower(): new for old, new in [*shades.items(), *zip(walk, lighter, strict=True)]}


def _shade(colour: str, share: float, white: float) -> str:
    if share == 1:
        return colour
    parts = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return "#" + "".join(f"{round(share * part + white * 255):02X}" for part in parts)


def line_styles(count: int) -> list[dict[str, Any]]:
    """Keywords of matplotlib for `count` lines in one panel: each its own colour, and a marker."""
    return [
        {"color": colour, "marker": MARKERS[number % len(MARKERS)]}
        for number, colour in enumerate(colours(count))
    ]


def style(axis: Axes, x: str, y: str, title: str) -> None:
    """The labels of a panel's axes, its title, and a grid behind what is drawn."""
    axis.set_xlabel(x, size=11)
    axis.set_ylabel(y, size=11)
    axis.set_title(title, loc="left", size=11)
    axis.grid(color="#e5e5e5")
    axis.set_axisbelow(True)


def runs(ks: NDArray[np.float64]) -> list[NDArray[np.int64]]:
    """Places of the whole numbers `ks` (K,), ascending, that follow each other, run by run: a
    curve of static top-k isn't drawn over k that were not run."""
    return np.split(np.arange(len(ks)), np.flatnonzero(np.diff(ks) > 1.5) + 1)


def whole_ticks(axis: Axes) -> None:
    """Ticks along x at whole numbers only."""
    locator: Any = axis.xaxis.get_major_locator()
    locator.set_params(integer=True)


def pads(figure: Figure, width: float, height: float) -> None:
    """The room around panels, in inches, of a figure with a constrained layout."""
    layout: Any = figure.get_layout_engine()
    layout.set(w_pad=width, h_pad=height)


def apart(heights: NDArray[np.float64], least: float) -> NDArray[np.float64]:
    """Ascending heights (N,), moved as little as a few passes can to be `least` apart."""
    made = heights.astype(float).copy()
    for _ in range(200):
        close = np.flatnonzero(np.diff(made) < least - 1e-9)
        if not len(close):
            break
        for i in close:
            push = (least - (made[i + 1] - made[i])) / 2
            if push > 0:
                made[i], made[i + 1] = made[i] - push, made[i + 1] + push
    return made


class Name(NamedTuple):
    """What a point (x, y) of a panel is called.

    side : 1 for a name to the right of the point and above it, -1 to the left and below, 0 beside
        the panel
    """

    x: float
    y: float
    text: str
    colour: str
    side: int = 0


def put_names(axis: Axes, names: Sequence[Name], line: float) -> None:
    """Names with lines to their points, moved up or down where they would overlap: at least `line`
    of the panel's height from one to the next. After all else is drawn."""
    axis.get_xlim()  # so that the limits are those of what is drawn
    to_axes = axis.transScale + axis.transLimits
    spots = to_axes.transform([(name.x, name.y) for name in names])
    order = np.argsort(spots[:, 1], kind="stable")
    wanted = spots[:, 1] + line * np.array([name.side for name in names])
    for i, height in zip(order.tolist(), apart(wanted[order], line).tolist(), strict=True):
        (x, y), name = spots[i].tolist(), names[i]
        side = -1 if name.side and x + LETTER * len(name.text) > 0.97 else name.side
        text = axis.annotate(
            name.text,
            (x, y),
            (x + 0.02 * side if side else 1.03, height),
            "axes fraction",
            "axes fraction",
            size=11,
            ha="right" if side < 0 else "left",
            va="center",
            arrowprops={"arrowstyle": "-", "lw": 0.6, "color": name.colour, "shrinkA": 0},
        )
        text.set_color(name.colour)


@cache
def _drawable() -> frozenset[int]:
    """The characters that the font of the figures has."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties())).get_charmap())


def plain(text: object, most: int | None = None) -> str:
    """A name that others chose, as matplotlib may draw it.

    "$" begins no formula; what isn't printable, or what the font lacks, becomes "□". most : the
    number of characters from which on it is cut, with "…" as the last one
    """
    text = "".join(c if c.isprintable() and ord(c) in _drawable() else "□" for c in str(text))
    if most is not None and len(text) > most:
        text = f"{text[: most - 1]}…"
    return text.replace("$", r"\$")
