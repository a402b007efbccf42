"""Scores, p-values and local false discovery rates, as csrc/null.c and the scalar kernels define
them, of z (T, E): what a router sees in place of the logits.

A null of a layer doesn't look at the order of the experts; one with a table for each expert takes
them all, in the order of their ids. A row with a NaN gives values that mean nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..spec import BINS, BINS_PER_UNIT, HIGH, LARGEST, LOW, RouteSpec
from .prepared import Prepared
from .rule import finite, softmax

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAD_TO_SIGMA = 1.4826022


def scores(own: Prepared, z: Tensor) -> Tensor:
    score = own.spec.null[1]
    if score == "logprob":
        return torch.log_softmax(finite(z), 1)
    if score == "centred":
        infinite = ~z.isfinite()
        count = (infinite.shape[1] - infinite.sum(1, keepdim=True)).clamp(min=1)
        return z - z.masked_fill(infinite, 0.0).sum(1, keepdim=True) / count
    return z


def p_values(own: Prepared, z: Tensor) -> Tensor:
    """p of each expert; z and p are `precise`."""
    if own.is_tabled:
        return p_of_scores(own, scores(own, z))
    return _p_normal(z) if own.spec.null[0] == "normal" else 1 - softmax(z)


def p_of_scores(own: Prepared, s: Tensor) -> Tensor:
    """By the null's tables; of a null by layer, of scores of any shape."""
    return _p_table(own, s) if own.spec.null[0] == "table" else _p_conformal(own, s)


def least_scores(spec: RouteSpec, levels_of: Callable[..., NDArray[Any]], *arguments: Any) -> Any:
    """The least score whose p is at most a level, of a null by layer; NaN if none is.

    p never rises with the score, so that comparing scores is as good, and takes no table.
    """
    wanted = levels_of(spec, *arguments)
    each, where = np.unique(wanted, return_inverse=True)
    levels = torch.from_numpy(each)
    own = Prepared.of(spec, levels.device)  # the CPU
    ends = torch.tensor([-math.inf, math.inf], dtype=torch.float64, device=levels.device)
    low, high = (end.expand_as(levels) for end in _in_order(ends.view(torch.int64)))
    while (low < high).any():
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, which their sum would exceed
        is_low = p_of_scores(own, _in_order(middle).view(torch.float64)) <= levels
        low, high = torch.where(is_low, low, middle + 1), torch.where(is_low, middle, high)
    found = _in_order(high).view(torch.float64)
    found = found.masked_fill(~(p_of_scores(own, found) <= levels), math.nan)
    return found.numpy()[where].reshape(wanted.shape)


def _in_order(bits: Tensor) -> Tensor:
    """The bits of float64 numbers as integers in the order of the numbers, and back."""
    return bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)


def local_fdr_of(own: Prepared, s: Tensor) -> Tensor:
    """The local fdr of scores by the spec's table of it, linear between the edges."""
    table = own.constant(_local_fdr_table)
    at = (s.clamp(LOW, HIGH) - LOW) * BINS_PER_UNIT
    i = at.to(torch.int64).clamp(0, BINS - 1)
    left = table[i]
    return left + (table[i + 1] - left) * (at - i)


def _local_fdr_table(spec: RouteSpec) -> NDArray[np.float64]:
    return np.asarray(spec.table)


def _bins(s: Tensor) -> Tensor:
    """The bin of the histogram that a score lies in; the outer ones for what is outside."""
    # floor(128 s) is exact, 128 (s + 32) would not be. Clamped as integers: NaN has none.
    position = (s.clamp(LOW, HIGH) * BINS_PER_UNIT).floor().to(torch.int64)
    return (position - LOW * BINS_PER_UNIT).clamp(0, BINS - 1)


# ---- normal ----


def _median(values: Tensor) -> Tensor:
    """(T, 1): the mean of the two middle values for an even count, 0 of -inf and +inf."""
    ordered, count = values.sort(1).values, values.shape[1]
    lower, upper = ordered[:, (count - 1) // 2], ordered[:, count // 2]
    return _without_nan(0.5 * (lower + upper))[:, None]


def _p_normal(z: Tensor) -> Tensor:
    """1 - Phi((z - m) / sigma); where sigma is 0 or infinite 0, 1/2, 1 for z >, =, < m."""
    away = z - _median(z)  # NaN for an infinite z at an infinite median: no distance
    sigma = MAD_TO_SIGMA * _median(_without_nan(away.abs()))
    sigma = sigma.masked_fill(sigma == math.inf, 0.0)
    return 0.5 * torch.erfc(_without_nan(away / sigma * math.sqrt(0.5)))


def _without_nan(values: Tensor) -> Tensor:
    return values.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)


# ---- table: x_max, p_max, beta, the survival function at the edges ----


def _p_table(own: Prepared, s: Tensor) -> Tensor:
    """As csrc/scalar/p_table_scalar.c: rounding breaks neither the order of p nor p > 0."""
    x_max, p_max, beta = own.constant(_heads)  # numbers, or (E,)
    survival = own.constant(_survival)
    inside = torch.minimum(s, x_max)
    bin_ = _bins(inside)
    at = bin_
    if own.is_by_expert:
        at = bin_ + torch.arange(s.shape[1], device=s.device) * (BINS + 1)
    left_p, right_p = survival[at], survival[at + 1]
    left = bin_.to(s.dtype) / BINS_PER_UNIT + LOW
    right = left + 1 / BINS_PER_UNIT
    # The bin of the largest score seen ends there, as does the last bin.
    last = (right >= x_max) | (bin_ == BINS - 1)
    right, right_p = torch.where(last, x_max, right), torch.where(last, p_max, right_p)
    share = ((right - inside) / (right - left)).masked_fill(inside >= right, 0.0)
    p = torch.minimum(left_p, right_p + (left_p - right_p) * share)
    p = p.masked_fill(s <= LOW, 1.0)
    tail = (p_max * (-(s - x_max) / beta).exp()).clamp(min=torch.finfo(s.dtype).tiny)
    return torch.where(s > x_max, tail, p)


def _tables(spec: RouteSpec) -> NDArray[np.float64]:
    return np.asarray(spec.null[2])


def _heads(spec: RouteSpec) -> NDArray[np.float64]:
    """(3,) or (3, E)."""
    return np.ascontiguousarray(_tables(spec)[..., :3].T)


def _survival(spec: RouteSpec) -> NDArray[np.float64]:
    return _tables(spec)[..., 3:].reshape(-1)


# ---- conformal: n, the number of scores >= each edge, the largest ones ----


def _p_conformal(own: Prepared, s: Tensor) -> Tensor:
    """(1 + #{calibration scores >= s}) / (n + 1): of the largest by each of them, below them the
    whole bin of s counts, which can only make p larger."""
    table = own.constant(_tables)
    n, at_least, largest = table[..., 0], table[..., 1 : 2 + BINS], table[..., 2 + BINS :]
    ascending = largest.flip(-1).contiguous()
    if own.is_by_expert:
        below = torch.searchsorted(ascending, s.T.contiguous()).T
        by_bin = at_least.gather(1, _bins(s).T).T
    else:
        below = torch.searchsorted(ascending, s.contiguous())
        by_bin = at_least[_bins(s)]
    # With n < LARGEST the padding is -inf: a score of -inf would count it.
    counted = torch.minimum((LARGEST - below).to(s.dtype), n)
    known = (s > largest[..., -1]) | (n <= LARGEST)
    return (1 + torch.where(known, counted, by_bin)) / (n + 1)
