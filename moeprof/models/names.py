"""The names of MoE layers: numbers as the model counts its layers, and what may stand for them.

A layer has the qualified names of its block, "model.layers.3.mlp", and of its gate,
"model.layers.3.mlp.gate".
"""

import re
from collections.abc import Sequence
from typing import Any


def layer_labels(blocks: Sequence[str]) -> list[int | str]:
    """What each layer is called: its own number in the model, as its block's name has it.

    The first number of the name ("encoder.block.3.layer.1.mlp": 3). Where layers have the same
    one, the word that tells them apart comes before it ("encoder 3", "decoder 3"); the block's
    whole name where that is not enough, or where there is no number.

    >>> layer_labels(["model.layers.1.mlp", "model.layers.2.mlp"])
    [1, 2]
    >>> layer_labels(["encoder.block.1.mlp", "decoder.block.1.mlp"])
    ['encoder 1', 'decoder 1']
    """
    found = [re.search(r"(?:^|\.)(\d+)(?:\.|$)", name) for name in blocks]
    numbers = [int(m[1]) if m else None for m in found]
    labels: list[int | str] = [
        (name or "model") if n is None else n for n, name in zip(numbers, blocks, strict=True)
    ]
    if len(set(labels)) == len(labels):
        return labels
    words = [[part for part in name.split(".") if not part.isdigit()] for name in blocks]
    for column in zip(*words, strict=False):
        if len(set(column)) > 1:
            labels = [w if n is None else f"{w} {n}" for w, n in zip(column, numbers, strict=True)]
            if len(set(labels)) == len(labels):
                return labels
    return [name or "model" for name in blocks]


def layer_numbers(blocks: Sequence[str]) -> list[int]:
    """The labels, where all of them are numbers; else the places in the model, from 0."""
    labels = layer_labels(blocks)
    numbers = [label for label in labels if isinstance(label, int)]
    return numbers if len(numbers) == len(labels) else list(range(len(labels)))


def layer_keys(blocks: Sequence[str], gates: Sequence[str]) -> dict[int | str, int]:
    """{what a user may call a layer: its place}: number or label, block's name, gate's name."""
    keys: dict[int | str, int] = {}
    for names in (layer_labels(blocks), layer_numbers(blocks), blocks, gates):
        keys |= {name: place for place, name in enumerate(names) if name not in keys}
    return keys


def spans(labels: Sequence[int | str]) -> str:
    """ "0 to 3, 7 and 9 to 12" of numbers in the order of the model; other labels one by one."""
    runs: list[list[Any]] = []  # first and last label of each
    for label in labels:
        if runs and isinstance(label, int) and label - 1 == runs[-1][1]:
            runs[-1][1] = label
        else:
            runs.append([label, label])
    return listed([str(a) if a == b else f"{a} to {b}" for a, b in runs])


def listed(parts: Sequence[str]) -> str:
    """ "a, b and c"."""
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last
