"""A budget split over the layers by how much the model's predictions need each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from ...measure.passes import Reference, evaluating
from ...models.blocks import find_blocks, model_norm
from ...routers import TopK
from ...texts.windows import HeldOut

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from torch import nn


PARTS = 4  # quarters of an expert, where whole ones can't make up the budget


def sensitivity(
    model: nn.Module,
    text: HeldOut,
    ks: Sequence[int],
    *,
    layers: Sequence[int] | None = None,
    norm: str = "model",
    step: Callable[[], object] = lambda: None,
) -> NDArray[np.float64]:
    """(L, len(ks)) mean KL(full model || model with only layer l at top-k), nats per token.

    0 at the model's own k. ks: integers from 1 to E. layers: of these L only. step is called
    after each window of the 1 + L * len(ks) passes (those at the model's own k are left out).
    """
    layers = range(len(find_blocks(model))) if layers is None else layers
    own, result = model_norm(model)[1], np.zeros((len(layers), len(ks)))
    with evaluating(model):
        reference = Reference(model, text, step)
        for (row, layer), (column, k) in product(enumerate(layers), enumerate(ks)):
            if k != own:
                quality = reference.measure({layer: TopK(int(k))}, norm=norm, step=step)
                result[row, column] = quality.mean_kl
    return result


def shortened(text: HeldOut, tokens: int) -> HeldOut:
    """The first windows of a text, about `tokens`: `heldout_windows` has the domains in turns."""
    windows, total = [], 0
    for window in text.windows:
        if total >= tokens:
            break
        windows.append(window)
        total += window.ids.shape[1]
    return HeldOut(windows, text.documents)


def allocate(sensitivity: ArrayLike, ks: ArrayLike, total: int) -> NDArray[np.int64]:
    """(L,) ints of `ks` with sum `total` that minimise the sum of sensitivity over the layers.

    By dynamic programming, exact. sensitivity (L, K), inf where a layer can't have that many;
    ks (K,) distinct integers >= 0.

    Raises
    ------
    ValueError
        If no choice has that sum.
    """
    cost, ks = np.asarray(sensitivity, float), np.asarray(ks)
    if cost.ndim != 2 or ks.shape != cost.shape[1:] or len(set(ks.tolist())) < len(ks):
        raise ValueError(f"allocate: expected (L, {len(ks)}) for distinct ks, got {cost.shape}")
    if total < 0 or int(total) != total:
        raise ValueError(f"total: expected an integer >= 0, got {total!r}")
    total = int(total)
    least = np.full(total + 1, np.inf)  # least[s]: the cheapest way to spend s so far
    least[0] = 0.0
    chosen = np.zeros((len(cost), total + 1), int)
    for layer, row in enumerate(cost):
        ways = np.full((len(ks), total + 1), np.inf)
        for column, k in enumerate(ks):
            if k <= total:
                ways[column, k:] = least[: total + 1 - k] + row[column]
        chosen[layer] = ways.argmin(axis=0)
        least = ways.min(axis=0)
    if not np.isfinite(least[total]):
        raise ValueError(f"total: no choice of {ks.tolist()} in each layer sums to {total}")
    result = np.zeros(len(cost), int)
    for layer in reversed(range(len(cost))):
        result[layer] = ks[chosen[layer, total]]
        total -= result[layer]
    return result


def split(
    sensitivity: ArrayLike,
    ks: ArrayLike,
    reach: ArrayLike,
    average_k: float,
    *,
    whole: bool = False,
) -> NDArray[np.float64]:
    """(L,) experts per token of the layers, mean `average_k`, each within its reach (L, 2).

    Whole experts where they can make up the budget, else quarters, with the sensitivity on
    straight lines between the ks; what quarters leave goes to the layers that have room.
    whole: whole experts or a ValueError.
    """
    reach = np.asarray(reach, float)
    total = average_k * len(reach)
    for parts in (1, PARTS):
        share = _in_parts(np.asarray(sensitivity), np.asarray(ks), reach, total, parts)
        if share is not None:
            break
        if whole:
            raise ValueError(f"average_k: no whole numbers within the reach sum to {total:.6g}")
    else:  # a budget at an end of the reach: the same part of every layer's own range
        low, high = reach[:, 0], reach[:, 1]
        width = (high - low).sum()
        share = low + (high - low) * ((total - low.sum()) / width if width else 0)
    return np.clip(share, reach[:, 0], reach[:, 1])


def _in_parts(
    sensitivity: NDArray[np.float64],
    ks: NDArray[np.int64],
    reach: NDArray[np.float64],
    total: float,
    parts: int,
) -> NDArray[np.float64] | None:
    """The split on a grid of 1/parts experts, or None where it has none of that sum."""
    grid = np.arange(1, int(np.floor(ks.max() * parts)) + 1)
    units = round(total * parts)
    if parts == 1 and abs(units - total) > 1e-9:
        return None
    values = grid / parts
    cost = np.stack([np.interp(values, ks, row) for row in sensitivity])
    inside = (values >= reach[:, :1] - 1e-9) & (values <= reach[:, 1:] + 1e-9)
    inside &= values >= ks.min()
    try:
        share = allocate(np.where(inside, cost, np.inf), grid, units) / parts
    except ValueError:
        return None
    rest = total - share.sum()
    room = np.maximum(reach[:, 1] - share if rest > 0 else share - reach[:, 0], 0)
    if room.sum() < abs(rest):
        return None
    return share + (rest * room / room.sum() if room.sum() else 0)
