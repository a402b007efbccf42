"""What the figures of a profile have in common. matplotlib's own state is not touched."""

import numpy as np

from ..show.figures import COLOURS, MARKERS

_OF = {"prefill": COLOURS[0], "decode": COLOURS[5], "verify": COLOURS[2], "unknown": COLOURS[3]}
_SIZES = (7, 4, 5, 4)  # of the markers, phase after phase


def figure(rows, columns, title, *, width=6.2, height=4.2, widths=None):
    """(Figure, its axes as `subplots` gives them). Sizes in inches, of one panel."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width * columns, height * rows + 0.5), dpi=100, layout="constrained")
    fig.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    fig.suptitle(title, x=0.01, ha="left", size=14, weight="bold")
    return fig, fig.subplots(rows, columns, width_ratios=widths)


def style(axis, x, y, title):
    axis.set_xlabel(x, size=11)
    axis.set_ylabel(y, size=11)
    axis.set_title(title, loc="left", size=11)
    axis.grid(color="#e5e5e5")
    axis.set_axisbelow(True)


def of_phase(phase):
    """Colour and label of a line."""
    return {"color": _OF[phase], "label": phase}


def marked(number):
    """The marker of a line; the second's leaves the first's to be seen where they coincide."""
    return {"marker": MARKERS[number], "markersize": _SIZES[number], "lw": 1.3 if number else 2.2}


def by_layer(axis, profile):
    """The layers along x, in the model's order, named by their own numbers."""
    labels = dict(enumerate(map(str, profile.labels)))
    axis.set_xlim(-0.5, len(profile.layers) - 0.5)
    axis.xaxis.set_major_formatter(lambda place, _: labels.get(place, ""))
    axis.xaxis.get_major_locator().set_params(integer=True)


def ticks_for(size, most=16):
    """At most `most` round steps from 0 to size - 1."""
    for step in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        if size <= most * step:
            return np.arange(0, size, step)
    return np.arange(0, size, size // most)
