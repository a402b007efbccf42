"""What the panels of the figure share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def title(axis: Axes, headline: str, detail: str) -> None:
    lines = 1 + detail.count("\n")
    axis.set_title(headline, loc="left", size=15, weight="bold", pad=10 + 16 * lines)
    axis.text(0, 1.02, detail, transform=axis.transAxes, size=12, color="#444444")


def label(axis: Axes, x: str, y: str) -> None:
    axis.set_xlabel(x, size=13)
    axis.set_ylabel(y, size=13)


def shades(count: int) -> list[tuple[float, float, float, float]]:
    from matplotlib import colormaps

    return [colormaps["viridis"](x) for x in np.linspace(0, 0.85, count)]


def blank(axis: Axes, text: str) -> None:
    """An axis that has nothing to show says why."""
    axis.set_axis_off()
    axis.text(0.5, 0.5, text, ha="center", size=14, transform=axis.transAxes)
