"""Scores of a token's logits, and the grid of the histograms that count them.

Letters, here and in the whole package: L MoE layers, E experts, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Union

import numpy as np

from ..backends.spec import BINS, BINS_PER_UNIT, LARGEST, LOW

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


SCORES = ("logprob", "logit", "centred")
EDGES = LOW + np.arange(BINS + 1) / BINS_PER_UNIT
TINY = np.finfo(np.float64).tiny
Logits = Union["Tensor", "NDArray[Any]"]  # (T,E), what a user has


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def matrix_of(router_logits: Logits) -> NDArray[np.float32]:
    """(T,E) router logits, a tensor or an array, as a float32 array."""
    if hasattr(router_logits, "detach"):
        router_logits = router_logits.detach().float().cpu().numpy()
    if not isinstance(router_logits, np.ndarray):
        kind = type(router_logits).__name__
        raise TypeError(f"router_logits: expected a tensor or an array, got {kind}")
    if router_logits.ndim != 2 or router_logits.shape[1] == 0:
        raise ValueError(
            f"router_logits: expected 2 dimensions (T,E), E >= 1, got shape {router_logits.shape}"
        )
    with np.errstate(over="ignore"):  # beyond float32 is inf, as it is for the C path
        logits = np.ascontiguousarray(router_logits, dtype=np.float32)
    bad = np.isnan(logits).any(axis=1) | (logits == -np.inf).all(axis=1)
    if bad.any():
        raise ValueError(f"router_logits: row {bad.argmax()} has a NaN or is -inf throughout")
    return logits


def scores_of(logits: NDArray[np.float32], score: str) -> NDArray[np.float64]:
    """Scores (T,E) float64 of float32 logits (docs/statistics.md).

    `logprob`: z - logsumexp(z); where some are +inf these share, -log(count), the others -inf.
    `logit`: z itself. `centred`: z less the mean of the row's finite ones; what is infinite
    stays so.
    """
    z = logits.astype(np.float64)
    if score == "logit":
        return z
    if score == "centred":
        finite = np.isfinite(z)
        count = np.maximum(finite.sum(axis=1, keepdims=True), 1)
        return z - np.where(finite, z, 0.0).sum(axis=1, keepdims=True) / count
    top = z.max(axis=1, keepdims=True)
    below = np.zeros_like(z)  # stays 0 where z is the maximum: inf - inf would be NaN
    np.subtract(z, top, out=below, where=z != top)
    return below - np.log(np.exp(below).sum(axis=1, keepdims=True))


def stored_scores(logits: NDArray[np.float32], score: str) -> NDArray[np.float32]:
    """The same, rounded up to float32 (T,E): what a null counts and keeps.

    Half the bytes, and as the rounding is upwards (by 2^-19 at most inside the histogram's
    range, by nothing for `logit`) it can make no p-value smaller than that of the exact scores.
    """
    exact = scores_of(logits, score)
    rounded = exact.astype(np.float32)
    short = rounded < exact
    rounded[short] = np.nextafter(rounded[short], np.float32(np.inf))
    return rounded


def bins_of(scores: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
    """Histogram bin of each score, what lies outside the range in the outer bins.

    floor(128 s) is exact; floor(128 (s + 32)) would round a score just below an edge over it.
    """
    position = np.floor(scores * BINS_PER_UNIT) - LOW * BINS_PER_UNIT
    return np.clip(position, 0, BINS - 1).astype(np.int64)


def keep_largest(values: NDArray[np.float32], count: int = LARGEST) -> NDArray[np.float32]:
    """The `count` largest of each row (..., n), descending; fewer where n is less."""
    return -np.sort(-values, axis=-1)[..., :count]


def _median(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Row medians (T,1), the mean of the two middle values for even E; of -inf and +inf: 0."""
    ordered, size = np.sort(values, axis=1), values.shape[1]
    lower, upper = ordered[:, (size - 1) // 2, None], ordered[:, size // 2, None]
    middle = np.where(lower == upper, upper, 0.0)
    np.add(lower / 2, upper / 2, out=middle, where=np.abs(lower) != np.abs(upper))
    return middle


def normal_reference(router_logits: Logits) -> NDArray[np.float64]:
    """p-values (T,E) of the `normal` null in float64: each token against itself.

    p = 1 - Phi((z - m) / (1.4826022 MAD)), m the token's median and MAD the median of |z - m|,
    both the mean of the two middle values for even E. Where MAD is 0 or infinite p is 0, 1/2, 1
    for z >, =, < m; so one expert alone gets 1/2. A z equal to m lies at distance 0, infinite
    or not.

    A fallback without calibration: on pure noise (independent normal logits) BH at alpha .05
    rejects something in .109 of the tokens at E = 64 and in .19 at E = 8. Nothing called a
    false discovery rate holds under it; `moeprof calibrate` fits a null that knows the model.

    Raises ValueError for a row with a NaN or of -inf only, and for logits that are not (T,E).
    """
    z = matrix_of(router_logits).astype(np.float64)
    m = _median(z)
    away = np.zeros_like(z)
    np.subtract(z, m, out=away, where=z != m)
    sigma = 1.4826022 * _median(np.abs(away))
    flat = (sigma == 0) | np.isinf(sigma)
    x = away / np.where(flat, 1.0, sigma) * math.sqrt(0.5)
    x = np.where(flat & (away != 0), np.copysign(np.inf, away), x)
    return 0.5 * np.vectorize(math.erfc, otypes=[float])(x)


def softmax_reference(router_logits: Logits) -> NDArray[np.float64]:
    """p-values (T,E) float64 of the `softmax` null, 1 - softmax(z).

    Degenerate, kept to show it: a p-value should be uniform for what a token doesn't need, and
    this one is near 1 for nearly every expert. Infinite logits share, as in `logprob`. The
    quotient, so that equal logits give 1 - 1/E exactly.
    """
    z = matrix_of(router_logits).astype(np.float64)
    top = z.max(axis=1, keepdims=True)
    below = np.zeros_like(z)  # inf - inf would be NaN
    np.subtract(z, top, out=below, where=z != top)
    weights = np.exp(below)
    return 1.0 - weights / weights.sum(axis=1, keepdims=True)
