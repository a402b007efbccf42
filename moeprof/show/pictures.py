"""A matplotlib Figure inside an HTML page: as an SVG that follows dark mode, or as a PNG."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING

from .figures import on_black

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# What the figures are drawn in, and what stands for it: black and white change places in the dark.
_ROLES = {
    "#000000": "ink",
    "#ffffff": "ground",
    "#e5e5e5": "grid",
    "#e4e4e4": "grid",
    "#dddddd": "grid",
    "#444444": "soft",
    "#555555": "soft",
    "#777777": "soft",
}
_STYLE = (
    "svg{--ink:#000;--ground:#fff;--grid:#e5e5e5;--soft:#555;fill:var(--ink)}"
    "@media (prefers-color-scheme:dark)"
    "{svg{--ink:#e8e8e8;--ground:#121212;--grid:#3a3a3a;--soft:#aaa}}"
)


def picture(figure: Figure, text: str, *, paper: bool = False) -> str:
    """The figure as an image that scrolls in a box of its own where the screen is narrow.

    text : what is said where images are not seen; paper : it stays on white, whatever the
        reader's setting, since it has colours that mean something on white only
    """
    width = round(96 * figure.get_size_inches()[0])
    kind = "picture paper" if paper else "picture"
    image = _data(svg(figure, paper=paper), "svg+xml")
    return (
        f'<div class="{kind}" style="--width:{width}px"><img src="{image}"'
        f' alt="{escape(text)}"></div>'
    )


def svg(figure: Figure, *, paper: bool = False) -> bytes:
    """The figure in lines and letters' outlines, black and white by the reader's setting; with
    `paper` black on white."""
    from matplotlib import rc_context

    out = io.StringIO()
    # The same figure gives the same bytes, and needs no font of the reader's.
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "moeprof"}):
        figure.savefig(
            out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r">\s+<", "><", text)
    if paper:
        return text.encode()
    changed = {colour: new for colour, new in on_black().items() if colour in text}
    roles = _ROLES | {colour: f"c{colour[1:]}" for colour in changed}

    def role(match: re.Match[str]) -> str:
        what, colour = match.groups()
        return f"{what}: var(--{roles[colour]})" if colour in roles else match.group()

    text = re.sub(r"(fill|stroke): (#[0-9a-f]{6})\b", role, text)
    style = _STYLE + _lighter(changed)
    return re.sub(r"(<svg[^>]*>)", rf"\1<style>{style}</style>", text, count=1).encode()


def _lighter(changed: Mapping[str, str]) -> str:
    """Style in which colours that are lost on black are others there."""
    light, dark = (
        ";".join(f"--c{colour[1:]}:{value}" for colour, value in pairs)
        for pairs in ([(colour, colour) for colour in changed], changed.items())
    )
    return f"svg{{{light}}}@media (prefers-color-scheme:dark){{svg{{{dark}}}}}" if changed else ""


def png(figure: Figure, dpi: float, text: str) -> str:
    """The figure as a PNG on white."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=dpi)
    return f'<img src="{_data(out.getvalue(), "png")}" alt="{escape(text)}">'


def _data(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
