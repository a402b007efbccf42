"""Scores, p-values and local false discovery rates, as csrc/null.c and the scalar kernels define
them, of z (T, E): what a router sees in place of the logits.

A null of a layer doesn't look at the order of the experts; one with a table for each expert takes
them all, in the order of their ids. A row with a NaN gives values that mean nothing.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..spec import BINS, BINS_PER_UNIT, HIGH, LARGEST, LOW
from .prepared import Prepared
from .rule import below_top, softmax

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAD_TO_SIGMA = 1.4826022


def is_by_expert(own: Prepared) -> bool:
    """Whether each expert has a table of its own."""
    table = own.spec.null[2]
    return table is not None and np.ndim(table) == 2


def p_values(own: Prepared, z: Tensor) -> Tensor:
    """p of each expert; z and p are `precise`."""
    form, score, _ = own.spec.null
    if form == "normal":
        return _p_normal(z)
    if form == "softmax":
        return 1 - softmax(z)
    s = scores(score, z)
    return _p_table(own, s) if form == "table" else _p_conformal(own, s)


def local_fdr(own: Prepared, z: Tensor) -> Tensor:
    """The local fdr of each expert by the spec's table of it, linear between the edges."""
    table = own.constant(_local_fdr_table, own)
    at = (scores(own.spec.null[1], z).clamp(LOW, HIGH) - LOW) * BINS_PER_UNIT
    i = at.to(torch.int64).clamp(0, BINS - 1)
    left = table[i]
    return left + (table[i + 1] - left) * (at - i)


def scores(score: str, z: Tensor) -> Tensor:
    if score == "logprob":
        return torch.log_softmax(below_top(z), 1)
    if score == "centred":
        finite = z.isfinite()
        count = finite.sum(1, keepdim=True).clamp(min=1)
        return z - z.where(finite, 0.0).sum(1, keepdim=True) / count
    return z


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
    sigma = sigma.where(sigma.isfinite(), 0.0)
    return 0.5 * torch.erfc(_without_nan(away / sigma * math.sqrt(0.5)))


def _without_nan(values: Tensor) -> Tensor:
    return values.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)


# ---- table: x_max, p_max, beta, the survival function at the edges ----


def _p_table(own: Prepared, s: Tensor) -> Tensor:
    """As csrc/scalar/p_table_scalar.c: rounding breaks neither the order of p nor p > 0."""
    x_max, p_max, beta = own.constant(_heads, own)  # numbers, or (E,)
    survival = own.constant(_survival, own)
    inside = torch.minimum(s, x_max)
    bin_ = _bins(inside)
    at, right = bin_, (bin_ + 1) / BINS_PER_UNIT + LOW
    if is_by_expert(own):
        at = bin_ + own.constant(_first_of_each, own).to(torch.int64)
    left, right_p = survival[at], survival[at + 1]
    # The bin of the largest score seen ends there, as does the last bin.
    last = (right >= x_max) | (bin_ == BINS - 1)
    width = right.where(~last, x_max) - (right - 1 / BINS_PER_UNIT)
    share = ((right.where(~last, x_max) - inside) / width).where(inside < x_max, 0.0)
    right_p = right_p.where(~last, p_max)
    p = torch.minimum(left, right_p + (left - right_p) * share)
    tail = (p_max * ((x_max - s) / beta).exp()).clamp(min=torch.finfo(s.dtype).tiny)
    return tail.where(s > x_max, p.where(s > LOW, 1.0))


def _tables(own: Prepared) -> NDArray[np.float64]:
    table: Any = own.spec.null[2]
    return np.asarray(table)


def _heads(own: Prepared) -> NDArray[np.float64]:
    """(3,) or (3, E)."""
    return np.ascontiguousarray(_tables(own)[..., :3].T)


def _survival(own: Prepared) -> NDArray[np.float64]:
    return _tables(own)[..., 3:].reshape(-1)


def _first_of_each(own: Prepared) -> NDArray[np.int64]:
    """(E,): where the survival function of each expert begins."""
    return np.arange(own.spec.num_experts) * (BINS + 1)


def _local_fdr_table(own: Prepared) -> NDArray[np.float64]:
    return np.asarray(own.spec.table)


# ---- conformal: n, the number of scores >= each edge, the largest ones ----


def _p_conformal(own: Prepared, s: Tensor) -> Tensor:
    """(1 + #{calibration scores >= s}) / (n + 1): of the largest by each of them, below them the
    whole bin of s counts, which can only make p larger."""
    table = own.constant(_tables, own)
    n, at_least, largest = table[..., 0], table[..., 1 : 2 + BINS], table[..., 2 + BINS :]
    ascending = largest.flip(-1).contiguous()
    if is_by_expert(own):
        below = torch.searchsorted(ascending, s.T.contiguous()).T
        by_bin = at_least.gather(1, _bins(s).T).T
    else:
        below = torch.searchsorted(ascending, s.contiguous())
        by_bin = at_least[_bins(s)]
    # With n < LARGEST the padding is -inf: a score of -inf would count it.
    counted = torch.minimum((LARGEST - below).to(s.dtype), n)
    known = (s > largest[..., -1]) | (n <= LARGEST)
    return (1 + counted.where(known, by_bin)) / (n + 1)
