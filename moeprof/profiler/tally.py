"""The counts of one layer in one phase: fixed memory, however many tokens pass."""

from functools import lru_cache
from typing import Any

import numpy as np

from .. import _C

_Places = dict[str, tuple[int, int, int]]  # {field: (offset, rows, columns)}
_SCALARS, _TABLES = ("steps", "nanoseconds"), ("k", "load", "pairs", "moves")


class Counts:
    """Integers and sums that `_C.tally` adds to; each field is a view of `ints` or `floats`.

    E experts; a step is one call of the layer. Two rows: real tokens, padding.

    steps, nanoseconds : calls of the block, the sum of their times
    latency (LATENCY_BINS,) : steps by duration, see `latency_edges`
    k (2, E + 1) : tokens by number of experts
    load (2, E) : selections of each expert
    skipped (2,) : slots that a user's router left out
    unique (E + 1,) : steps by number of distinct experts, those of padding too
    batch_steps, batch_unique (257,) : steps, and their distinct experts summed, by the number
        of tokens in the step; the last one: 256 or more
    reuse (E + 1,) : accesses to experts by LRU distance, 0 for the last one used; [E]: never
        used before. A step accesses each of its distinct experts once, ascending.
    confidence, gap (100,) : real tokens by 1 - H(p) / ln E, and by p_(1) - p_(2), over [0, 1]
    pairs (E, E) : real tokens that select both i and j
    moves (E, E) : real tokens that select i in the MoE layer before and j here
    sums (3,) : of the confidence, the gap, and logsumexp(z)^2
    probability (E,) : of each expert's softmax probability

    left_out (2, E + 1) : selections of each expert that did not run, negative where it got more
        rows than were selected; [E]: of experts that are not known. The first row: in steps
        without padding, the second: in steps with padding, where it isn't known of which tokens.

    The five before it are of real tokens whose logits are known. pairs and moves are (0, 0) where
    they were not asked for.
    """

    steps: np.ndarray
    nanoseconds: np.ndarray
    latency: np.ndarray
    k: np.ndarray
    load: np.ndarray
    skipped: np.ndarray
    unique: np.ndarray
    batch_steps: np.ndarray
    batch_unique: np.ndarray
    reuse: np.ndarray
    confidence: np.ndarray
    gap: np.ndarray
    pairs: np.ndarray
    moves: np.ndarray
    sums: np.ndarray
    probability: np.ndarray

    def __init__(self, num_experts: int, pairs: bool = True):
        counts, sums = _layout(num_experts, pairs)
        self.num_experts, self.has_pairs = num_experts, pairs
        self.ints = np.zeros(_length(counts), np.int64)
        self.floats = np.zeros(_length(sums), np.float64)
        self.left_out = np.zeros((2, num_experts + 1), np.int64)
        self._open()

    @classmethod
    def from_arrays(cls, num_experts: int, ints: Any, floats: Any, left_out: Any = 0) -> "Counts":
        """Counts of a copy of stored `ints`, `floats` and `left_out`; ValueError for other
        lengths."""
        for pairs in (True, False):
            made = cls(num_experts, pairs)
            if made.ints.shape == np.shape(ints) and made.floats.shape == np.shape(floats):
                made.ints[:], made.floats[:], made.left_out[:] = ints, floats, left_out
                return made
        raise ValueError(
            f"counts: expected those of {num_experts} experts, got {np.shape(ints)} integers and "
            f"{np.shape(floats)} sums"
        )

    def _open(self) -> None:
        for array, layout in zip(
            (self.ints, self.floats), _layout(self.num_experts, self.has_pairs), strict=True
        ):
            for name, (offset, rows, columns) in layout.items():
                view = array[offset : offset + rows * columns]
                table = (rows, columns) if name in _TABLES else (columns,)
                shape = () if name in _SCALARS else table
                setattr(self, name, view.reshape(shape))

    def copy(self) -> "Counts":
        return self.from_arrays(self.num_experts, self.ints, self.floats, self.left_out)

    def __add__(self, other: "Counts") -> "Counts":
        total = self.copy()
        total.ints += other.ints
        total.floats += other.floats
        total.left_out += other.left_out
        return total

    def __sub__(self, before: "Counts") -> "Counts":
        """What was added since `before`, an earlier state of the same counts."""
        since = self.copy()
        since.ints -= before.ints
        since.floats -= before.floats
        since.left_out -= before.left_out
        return since

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Counts)
            and self.num_experts == other.num_experts
            and np.array_equal(self.ints, other.ints)
            and np.array_equal(self.floats, other.floats)
            and np.array_equal(self.left_out, other.left_out)
        )

    __hash__ = None  # type: ignore[assignment]  # they change

    @property
    def tokens(self) -> int:
        """Real tokens."""
        return int(self.k[0].sum())

    @property
    def tokens_padding(self) -> int:
        return int(self.k[1].sum())


@lru_cache
def _layout(num_experts: int, pairs: bool) -> tuple[_Places, _Places]:
    return _C.tally_layout(num_experts, pairs)


def _length(layout: _Places) -> int:
    return max(offset + rows * columns for offset, rows, columns in layout.values())


LATENCY_BINS = _layout(1, False)[0]["latency"][2]


@lru_cache
def latency_edges() -> np.ndarray:
    """(LATENCY_BINS + 1,) ns: the bins' edges. 64 equal parts of each octave from 64 ns on."""
    octaves = [2.0**n * np.arange(64, 128) for n in range(LATENCY_BINS // 64 - 1)]
    edges = np.concatenate([np.arange(64.0), *octaves, [128 * 2.0 ** (LATENCY_BINS // 64 - 2)]])
    edges.flags.writeable = False
    return edges
