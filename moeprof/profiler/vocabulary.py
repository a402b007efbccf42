"""Which experts the tokens of the vocabulary are sent to."""

from typing import Any

import numpy as np


class Vocabulary:
    """Selections by input token: (E,) counts for each layer and token id that was seen.

    num_experts: of each layer; 0 for one that does not get the tokens which layer 0 gets.
    """

    def __init__(self, num_experts: list[int]):
        self._rows: dict[int, int] = {}
        self._widths = num_experts
        self.seen = np.zeros(1024, np.int64)
        self.counts = [np.zeros((1024, width), np.int64) for width in num_experts]

    def add(
        self, index: int, ids: np.ndarray, experts: np.ndarray, real: np.ndarray | None
    ) -> None:
        """Of layer `index`: experts (T, k) of the input tokens ids (T,)."""
        if real is not None:
            ids, experts = ids[real], experts[real]
        distinct, which = np.unique(ids, return_inverse=True)
        rows = np.array([self._rows.setdefault(i, len(self._rows)) for i in distinct.tolist()], int)
        self._grow(len(self._rows))
        slot = experts >= 0
        tokens = np.broadcast_to(rows[which][:, None], experts.shape)
        np.add.at(self.counts[index], (tokens[slot], experts[slot]), 1)
        if index == 0:
            np.add.at(self.seen, rows[which], 1)

    def _grow(self, rows: int) -> None:
        if rows <= len(self.seen):
            return
        size = 2 * rows
        self.seen = np.concatenate([self.seen, np.zeros(size - len(self.seen), np.int64)])
        self.counts = [
            np.concatenate([c, np.zeros((size - len(c), c.shape[1]), np.int64)])
            for c in self.counts
        ]

    def as_dict(self) -> dict[str, Any]:
        """As Profile takes it; layers of other sizes than the first are left out."""
        order = sorted(self._rows, key=self._rows.__getitem__)
        rows = len(order)
        layers = [i for i, width in enumerate(self._widths) if width == self._widths[0]]
        counts = np.stack([self.counts[i][:rows] for i in layers])
        return {
            "tokens": order,
            "layers": layers,
            "counts": counts,
            "seen": self.seen[:rows].copy(),
            "text": None,
        }
