"""The scores of a model's routers, counted: what a null is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..backends.spec import BINS, LARGEST
from .model import trim_padding
from .scores import bins_of, keep_largest, stored_scores

if TYPE_CHECKING:
    from numpy.typing import NDArray


_PENDING = 4096  # tokens of a layer that wait for being counted together


class Histograms:
    """Counts scores layer by layer, in memory that doesn't grow with the text.

    score, r_high and r_low: as in Null. Logits wait until there are enough of them to be worth
    a pass over the counts, which is (E,8192) numbers long whatever it adds.
    """

    def __init__(
        self, layers: int, experts: int, score: str, r_high: int = 0, r_low: int = 0
    ) -> None:
        self.score, self.r_high, self.r_low = score, r_high, r_low
        self._counts = np.zeros((layers, experts, BINS), np.uint64)
        self._largest = np.full((layers, experts, LARGEST), -np.inf, np.float32)
        self._pending: list[list[NDArray[np.float32]]] = [[] for _ in range(layers)]

    @property
    def counts(self) -> NDArray[np.uint64]:
        """(L,E,8192) uint64."""
        self._count_all()
        return self._counts

    @property
    def largest(self) -> NDArray[np.float32]:
        """(L,E,at most 1024) float32, descending, padded with -inf."""
        self._count_all()
        return trim_padding(keep_largest(self._largest))

    def add(self, layer: int, logits: NDArray[np.float32]) -> None:
        """Count a layer's float32 logits (T,E); of equal ones the lower id ranks higher."""
        self._pending[layer].append(np.array(logits))  # a gate may use its memory again
        if sum(map(len, self._pending[layer])) >= _PENDING:
            self._count(layer)

    def _count_all(self) -> None:
        for layer, pending in enumerate(self._pending):
            if pending:
                self._count(layer)

    def _count(self, layer: int) -> None:
        logits = np.concatenate(self._pending[layer])
        self._pending[layer].clear()
        scores, experts = stored_scores(logits, self.score), logits.shape[1]
        at = bins_of(scores) + BINS * np.arange(experts)
        if self.r_high or self.r_low:
            ranked = np.argsort(-logits, axis=1, kind="stable")
            kept = np.zeros(scores.shape, bool)
            middle = ranked[:, self.r_high : experts - self.r_low]
            np.put_along_axis(kept, middle, True, axis=1)
            at, scores = at[kept], np.where(kept, scores, np.float32(-np.inf))
        found = np.bincount(at.ravel(), minlength=experts * BINS).reshape(experts, BINS)
        self._counts[layer] += found.astype(np.uint64)
        joined = np.concatenate([self._largest[layer], scores.T], axis=1)
        # A partition only: `largest` sorts, once.
        self._largest[layer] = np.partition(joined, -LARGEST, axis=1)[:, -LARGEST:]
