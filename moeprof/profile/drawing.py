"""What the figures of a profile have in common. matplotlib's own state is not touched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..show.figures import COLOURS, MARKERS, pads, whole_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from .types import Profiled


_OF = {"prefill": COLOURS[0], "decode": COLOURS[5], "verify": COLOURS[2], "unknown": COLOURS[3]}
_SIZES = (7, 4, 5, 4)  # of the markers, phase after phase


def figure(
    rows: int,
    columns: int,
    title: str,
    *,
    width: float = 6.2,
    height: float = 4.2,
    widths: Sequence[float] | None = None,
) -> tuple[Figure, Any]:
    """(Figure, its axes as `subplots` gives them). Sizes in inches, of one panel."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width * columns, height * rows + 0.5), dpi=100, layout="constrained")
    pads(fig, 0.1, 0.08)
    fig.suptitle(title, x=0.01, ha="left", size=14, weight="bold")
    return fig, fig.subplots(rows, columns, width_ratios=widths)


def of_phase(phase: str) -> dict[str, Any]:
    """Colour and label of a line."""
    return {"color": _OF[phase], "label": phase}


def marked(number: int) -> dict[str, Any]:
    """The marker of a line; the second's leaves the first's to be seen where they coincide."""
    return {"marker": MARKERS[number], "markersize": _SIZES[number], "lw": 1.3 if number else 2.2}


def by_layer(axis: Axes, profile: Profiled) -> None:
    """The layers along x, in the model's order, named by their own numbers."""
    labels: dict[float, str] = dict(enumerate(map(str, profile.labels)))
    axis.set_xlim(-0.5, len(profile.layers) - 0.5)
    axis.xaxis.set_major_formatter(lambda place, _: labels.get(place, ""))
    whole_ticks(axis)


def ticks_for(size: int, most: int = 16) -> NDArray[np.int64]:
    """At most `most` round steps from 0 to size - 1."""
    for step in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        if size <= most * step:
            return np.arange(0, size, step)
    return np.arange(0, size, size // most)
