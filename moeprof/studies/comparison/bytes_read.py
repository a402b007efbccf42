"""Skip experts or shrink them: what is lost at the bytes of experts' weights that a token reads.

The other axis of a comparison. Experts that are not selected are not read; quantised ones are
fewer bytes each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...measure.bootstrap import bootstrap
from ...models.blocks import runnable_blocks
from ...models.sizes import tensor_bytes
from .effects import interpolate, interval, sums

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from .effects import Documents


FIELDS = ("kl", "nats", "agree")


def expert_bytes(model: nn.Module) -> NDArray[np.float64]:
    """(L,) bytes of one expert's matrices, as the model has them now, by layer."""
    each = []
    for block in runnable_blocks(model):
        matrices = block.family.readable(block.module)[0].matrices
        each.append(sum(map(tensor_bytes, matrices)) / block.num_experts)
    return np.array(each)


def quantized_bytes(model: nn.Module, bits: int) -> int:
    """About what all experts take in 8 or 4 bits, with the scales of their groups."""
    tables = (block.family.readable(block.module)[0].matrices for block in runnable_blocks(model))
    weights = sum(matrix.numel() for matrices in tables for matrix in matrices)
    return weights * (bits + 1) // 8


def quantized_name(top_k: int | str, bits: int) -> str:
    """ "top-8 in 4 bits"; "top-k in 4 bits" is the line of all k."""
    return f"top-{top_k} in {bits} bits"


class BytesTable:
    """Cells with "by_document", as arrays over documents: means per token, by bytes.

    quantized: the cells of quantised static top-k. skipping: unquantised cells that they are
    compared with. curve: unquantised static top-k with k = 1, ..., K, K the model's own.
    """

    def __init__(
        self,
        quantized: list[dict[str, Any]],
        skipping: list[dict[str, Any]],
        curve: list[dict[str, Any]],
        documents: Documents,
    ) -> None:
        self.quantized, self.skipping, self.curve = quantized, skipping, curve
        self.predicted, self.tokens, self.groups = documents
        self.lines: dict[int, list[int]] = {}  # {bits: places of its cells, k ascending}
        for place in sorted(range(len(quantized)), key=lambda i: quantized[i]["budget"]):
            self.lines.setdefault(quantized[place]["bits"], []).append(place)

    def means(
        self, weights: NDArray[np.float64], cells: Sequence[dict[str, Any]], field: str
    ) -> NDArray[np.float64]:
        """(B, M) of cells: bytes per token that was routed, others per token that was predicted.

        weights: (B, D), how often each document counts.
        """
        of = self.tokens if field == "bytes" else self.predicted
        return weights @ sums(cells, field) / (weights @ of)[:, None]

    def effects(self, weights: NDArray[np.float64], field: str) -> NDArray[np.float64]:
        """(B, Q) of the quantised cells, less that of unquantised static top-k at as many bytes.

        Below the bytes of one expert that is static top-1, which reads more.
        """
        one = self.means(weights, self.curve[:1], "bytes")
        experts = self.means(weights, self.quantized, "bytes") / one
        curve = self.means(weights, self.curve, field)
        return self.means(weights, self.quantized, field) - interpolate(curve, experts)

    def contrasts(self) -> list[tuple[dict[str, Any], str]]:
        """[(cell, name of what it is compared with)] of `differences`."""
        found = []
        for bits, places in self.lines.items():
            full = self.quantized[places[-1]]
            found += [(cell, quantized_name(full["budget"], bits)) for cell in self.skipping]
            others = [other for other in self.lines if other > bits]
            found += [(full, quantized_name("k", other)) for other in others]
        return found

    def differences(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """(B, N) of KL: each unquantised cell less all experts in fewer bits, and all experts in
        few bits less static top-k in more bits at as many bytes."""
        quantized = self.means(weights, self.quantized, "kl")
        read = self.means(weights, self.quantized, "bytes")
        skipping = self.means(weights, self.skipping, "kl")
        columns = []
        for bits, places in self.lines.items():
            full = quantized[:, places[-1:]]
            columns.append(skipping - full)
            for other, line in self.lines.items():
                if other > bits:
                    at = read[:, places[-1:]] / read[:, line[:1]]
                    columns.append(full - interpolate(quantized[:, line], at))
        return np.hstack(columns)

    def analyse(self, seed: int = 0) -> None:
        """Write "effect" into the quantised cells, "against" and "level" into all.

        The bands of KL hold together over all effects and differences here.
        """
        for field in FIELDS:

            def statistic(weights: NDArray[np.float64], field: str = field) -> NDArray[np.float64]:
                effects = self.effects(weights, field)
                return np.hstack([effects, self.differences(weights)]) if field == "kl" else effects

            intervals = bootstrap(statistic, len(self.tokens), seed=seed, groups=self.groups)
            for place, cell in enumerate(self.quantized):
                cell.setdefault("effect", {})[field] = interval(intervals, place)
            if field == "kl":
                for place, (cell, name) in enumerate(self.contrasts(), len(self.quantized)):
                    cell.setdefault("against", {})[name] = interval(intervals, place)
        self._levels(seed)

    def _levels(self, seed: int) -> None:
        """Intervals of KL and of bytes themselves, each of one number alone."""
        cells = [*self.quantized, *self.skipping]
        for field in ("kl", "bytes"):
            intervals = bootstrap(
                lambda weights, field=field: self.means(weights, cells, field),  # type: ignore[misc]
                len(self.tokens),
                seed=seed,
                groups=self.groups,
            )
            for place, cell in enumerate(cells):
                found = interval(intervals, place)
                level = {end: found[end] for end in ("estimate", "low", "high")}
                cell.setdefault("level", {})[field] = level
