"""Numbers and names as a reader wants them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..models.names import layer_labels, listed, spans

if TYPE_CHECKING:
    from ..models.layer import Layer


__all__ = ["counted", "layer_names", "listed", "number", "percent", "scaled", "short", "spans"]

PLAIN = "–"  # stands for what was not measured


def number(value: float, form: str) -> str:
    """format(value, form), never with "-0"; a dash for nan."""
    if math.isnan(value):
        return PLAIN
    text = format(value, form)
    return format(0.0, form) if float(text) == 0 else text


def short(value: float) -> str:
    """Three significant digits without an exponent, "0.123", "12.3", "12,345"."""
    if math.isnan(value):
        return PLAIN
    size = abs(value)
    digits = 3 if size < 1 else 2 if size < 10 else 1 if size < 100 else 0
    return f"{value:,.{digits}f}"


def scaled(value: float, unit: str) -> str:
    """ "1.23 GFLOP": with the prefix that leaves one to three digits before the point."""
    if math.isnan(value):
        return PLAIN
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{short(value / size)} {prefix}{unit}"
    return f"{value:,.0f} {unit}"


def percent(share: float) -> str:
    """ "12 %", "0.4 %"."""
    return PLAIN if math.isnan(share) else f"{100 * share:.{0 if share >= 0.0995 else 1}f} %"


def counted(value: int, what: str) -> str:
    """ "1 step", "2 steps"."""
    return f"{value:,} {what}{'' if value == 1 else 's'}"


def layer_names(layers: Sequence[Layer]) -> str:
    """What the layers' labels stand for: "Layers 1 to 3: model.layers.{1 … 3}.mlp"."""
    blocks = [layer.block or layer.name for layer in layers]
    labels = layer_labels([layer.block for layer in layers])
    if len(blocks) < 2:
        return "".join(
            f"Layer {label}: {block}" for label, block in zip(labels, blocks, strict=True)
        )
    parts = [re.split(r"(\d+)", block) for block in (blocks[0], blocks[-1])]
    first, last = parts
    if len(first) == len(last):
        pairs = list(zip(first, last, strict=True))
        if sum(a != b for a, b in pairs) == 1:
            name = "".join(a if a == b else f"{{{a} … {b}}}" for a, b in pairs)
            return f"Layers {spans(labels)}: {name}"
    return f"Layers {spans(labels)}: {blocks[0]} … {blocks[-1]}"
