"""False discoveries by ablation: an operational definition, set beside alpha.

A discovery is an expert that the test selected and that ran: of rank <= min(R, experts), so
that experts which min_k forced in are none. It is false at delta if emptying its slot raises
the next-token loss by less than delta nats, so also if the expert hurts. FDP of a position in a
layer is V / max(R, 1), V the false ones; FDP of a layer is the mean over positions, of which one
without discoveries counts as 0: so the false discovery rate is defined, which alpha is about.
"false of all" is sum V / sum R over the positions, of all layers over these too. By it alone
routers can be compared that discover nothing at different numbers of positions.

delta0 is a size of change that means nothing: the 95 % quantile of |change| when a random
unselected expert is added with its own weight, layer by layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ...measure.bootstrap import intervals
from .ablation import ADDED, JOINT, SINGLE, Ablation
from .rows import ALL, rows
from .statistics import divide, joined, mean_statistic

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...measure.bootstrap import Intervals
    from .statistics import Statistic


DELTAS = np.geomspace(1e-4, 0.3, 24)
QUANTILE = 0.95
DOCUMENTS = 10  # fewer say nothing about a mean over documents
FDP = ("delta0", "FDP(delta0)", "FDP(0)", "false of all")
CURVES = ("FDP", "false of all")  # each at DELTAS
SIZE = len(FDP) + len(CURVES) * len(DELTAS)  # numbers of a layer
POOLED = [len(FDP) - 1, *range(SIZE - len(DELTAS), SIZE)]  # those of them that are sums V


def discovery_rows(
    ablation: Ablation, routing: str, groups: NDArray[np.int64], draws: int
) -> Iterator[dict[str, Any]]:
    """Rows of one router: the false ones by delta and at delta0 ("fdp", "fdp curve"), "joint".

    groups (D,): each document's domain. delta0 is estimated anew in every draw, and the FDP
    with it.
    """
    layers = ablation.counts.shape[1]
    curves = [_fdp_statistic(ablation, layer, len(groups)) for layer in range(layers)]
    means = _count_statistic(ablation, len(groups))
    by_delta = np.repeat(CURVES, len(DELTAS))

    def statistic(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        each = np.stack([curve(weights) for curve in curves], axis=1)
        each = np.concatenate([each, each.mean(axis=1, keepdims=True)], axis=1)
        each[..., POOLED] = divide(each[..., POOLED], each[..., SIZE:])
        each = each[..., :SIZE].reshape(len(weights), -1)
        return np.concatenate([each, means(weights)], axis=1)

    found = intervals(statistic, len(groups), groups=groups, draws=draws)
    delta0 = []
    for position, layer in enumerate([*range(layers), ALL]):
        start = position * SIZE
        part = _part(found, start, start + len(FDP))
        delta0.append(part.estimate[0])
        yield from rows("fdp", routing, layer, FDP, None, part)
        part = _part(found, start + len(FDP), start + SIZE)
        yield from rows("fdp curve", routing, layer, by_delta, np.tile(DELTAS, len(CURVES)), part)
    names = ("experts", "discoveries", "forced by min_k")
    part = _part(found, SIZE * (layers + 1), None)
    labels = np.repeat([*range(layers), ALL], len(names))
    yield from rows("fdp", routing, labels, np.tile(names, layers + 1), None, part)
    for layer in range(layers):
        yield from _joint_rows(ablation, layer, delta0[layer], routing, groups, draws)


def _part(intervals: Intervals, start: int, stop: int | None) -> Intervals:
    return type(intervals)(*(field[start:stop] for field in intervals))


def discoveries(ablation: Ablation) -> NDArray[np.int32]:
    """(P, L) experts that the test selected and that ran."""
    return np.minimum(ablation.rejections, ablation.counts)


def _fdp_statistic(ablation: Ablation, layer: int, size: int) -> Statistic:
    """(B, D) -> (B, SIZE + 1) of one layer: at POOLED sums V, at last sum R."""
    found = discoveries(ablation)[:, layer]
    of_layer = ablation.layer == layer
    single = (ablation.kind == SINGLE) & of_layer
    single &= ablation.slot < found[ablation.position]
    order = np.argsort(ablation.delta[single], kind="stable")
    position = ablation.position[single][order]
    delta, document = ablation.delta[single][order], ablation.documents[position]
    share = 1 / np.maximum(found, 1)[position]
    added = (ablation.kind == ADDED) & of_layer
    noise = np.abs(ablation.delta[added])
    by_size = np.argsort(noise, kind="stable")
    noise_document = ablation.documents[ablation.position[added]][by_size]
    noise = noise[by_size]
    positions = np.bincount(ablation.documents, minlength=size)

    def statistic(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        delta0 = _weighted_quantile(noise, weights[:, noise_document])
        drawn = weights[:, document]
        below = divide(_cumulative(drawn * share), (weights @ positions)[:, None])
        total = _cumulative(drawn)
        rank0 = np.searchsorted(delta, delta0, side="left")
        row = np.arange(len(weights))
        at = np.searchsorted(delta, DELTAS, side="left")
        zero = np.searchsorted(delta, 0.0, side="left")
        parts = delta0, below[row, rank0], below[:, zero], total[row, rank0]
        curves = below[:, at], total[:, at]
        return np.concatenate([np.stack(parts, axis=1), *curves, total[:, -1:]], axis=1)

    return statistic


def _cumulative(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(B, N) -> (B, N + 1): the sums of the first 0, 1, ... N."""
    return np.pad(np.cumsum(values, axis=1), ((0, 0), (1, 0)))


def _weighted_quantile(
    ordered: NDArray[np.float64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(B,) the smallest of `ordered` (N,) at which QUANTILE of a row's weight is reached.

    0 where a layer has nothing to add (all experts selected).
    """
    if not len(ordered):
        return np.zeros(len(weights))
    total = np.cumsum(weights, axis=1)
    reached = total >= QUANTILE * total[:, -1:] - 1e-9
    return ordered[reached.argmax(axis=1)]


def _count_statistic(ablation: Ablation, size: int) -> Statistic:
    """Means over positions of experts, discoveries and whether min_k forced one in."""
    found = discoveries(ablation)
    values = np.stack([ablation.counts, found, found < ablation.counts], axis=2).astype(float)
    values = np.concatenate([values, values.mean(axis=1, keepdims=True)], axis=1)
    return mean_statistic(values.reshape(len(values), -1), ablation.documents, size)


def _joint_rows(
    ablation: Ablation,
    layer: int,
    delta0: float,
    routing: str,
    groups: NDArray[np.int64],
    draws: int,
) -> Iterator[dict[str, Any]]:
    """What emptying all ranks > r does together, r from 0 (the whole layer) on.

    Beside it the sum of what emptying each alone does, at the same positions, and the share of
    positions at which the joint change stays below delta0 (which stays as it is in the draws).
    Ranks that fewer than DOCUMENTS documents have are left out.
    """
    counts = ablation.counts[:, layer]
    documents = [len(set(ablation.documents[counts > r])) for r in range(counts.max(initial=0))]
    most = sum(np.array(documents) >= DOCUMENTS)
    single = np.full((len(counts), len(documents)), np.nan)
    together = single.copy()
    for kind, values in ((SINGLE, single), (JOINT, together)):
        chosen = (ablation.kind == kind) & (ablation.layer == layer)
        values[ablation.position[chosen], ablation.slot[chosen]] = ablation.delta[chosen]
    last = np.flatnonzero(counts), counts[counts > 0] - 1
    together[last] = single[last]
    alone = np.where(np.isnan(single), 0, single)[:, ::-1].cumsum(axis=1)[:, ::-1]
    alone = np.where(np.isnan(together), np.nan, alone)
    below = np.where(np.isnan(together), np.nan, together < delta0)
    if not most:
        return
    size = len(groups)
    statistic = joined(
        *(
            mean_statistic(values[:, :most], ablation.documents, size)
            for values in (together, alone, below)
        )
    )
    found = intervals(statistic, size, groups=groups, draws=draws)
    names = np.repeat(["joint change", "sum of single changes", "share below delta0"], most)
    yield from rows("joint", routing, layer, names, np.tile(np.arange(most), 3), found)
