"""What a cell is worth against static top-k at as many experts, with intervals over documents.

A cell is a dict as in the JSON (see `runner`); its sums by document are in "by_document".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...measure.bootstrap import ROUNDING, bootstrap

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from ...measure.bootstrap import Intervals


STATIC, ROUTER, SHUFFLED, RANDOM, ORACLE = "static", "router", "shuffled", "random", "oracle"
QUANTIZED = "quantized"  # static top-k with experts in fewer bits
CONTRASTS = (("bh", "fixed_p"), ("bh", "bh (logit)"), ("bh", "bh (trimmed)"))
BETTER, WORSE, UNDECIDED = "better", "worse", "undecided"


def interpolate(curve: NDArray[np.float64], at: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values at `at` (B, M) of curves (B, K) with knots 1, 2, ..., K; flat beyond their ends."""
    knots = curve.shape[1]
    at = np.clip(at, 1, knots)
    left = np.minimum(at.astype(int), max(knots - 1, 1)) - 1
    right = np.minimum(left + 1, knots - 1)
    low = np.take_along_axis(curve, left, axis=1)
    high = np.take_along_axis(curve, right, axis=1)
    return low + (high - low) * (at - 1 - left)


def sums(cells: Sequence[dict[str, Any]], field: str) -> NDArray[np.float64]:
    """(D, M): a field of each of M cells, summed over each document."""
    return np.array([cell["by_document"][field] for cell in cells], float).T


class Documents(NamedTuple):
    """(D,) of the test's documents: tokens that were predicted, all tokens, numbers of domains."""

    predicted: NDArray[np.int64]
    tokens: NDArray[np.int64]
    groups: NDArray[np.int64]

    @classmethod
    def of(cls, predicted: ArrayLike, tokens: ArrayLike, domains: ArrayLike) -> Documents:
        groups = np.unique(domains, return_inverse=True)[1]
        return cls(np.asarray(predicted), np.asarray(tokens), groups)


class Table:
    """The measured cells of one table, as arrays over documents.

    cells: of one table, all with "by_document". curve: the cells of static top-k with
    k = 1, ..., K in every layer.
    """

    def __init__(
        self, cells: list[dict[str, Any]], curve: list[dict[str, Any]], documents: Documents
    ) -> None:
        self.cells, self.curve = cells, curve
        self.predicted, self.tokens, self.groups = documents

    def effects(self, weights: NDArray[np.float64], field: str) -> NDArray[np.float64]:
        """(B, M) mean of a field per predicted token, less that of static top-k at equal experts.

        weights: (B, D), how often each document counts.
        """
        predicted = weights @ self.predicted
        experts = weights @ sums(self.cells, "experts") / (weights @ self.tokens)[:, None]
        means = weights @ sums(self.cells, field) / predicted[:, None]
        curve = weights @ sums(self.curve, field) / predicted[:, None]
        return means - interpolate(curve, experts)

    def pairs(self) -> list[tuple[int, int, str]]:
        """[(i, j, name)] of cells whose effects are compared: a router with its shuffle, with
        other routers, and where the layers' budgets differ with static top-k on the same ones."""
        place = {key(cell): i for i, cell in enumerate(self.cells)}
        found = []
        for i, cell in enumerate(self.cells):
            if cell["role"] != ROUTER:
                continue
            others = {SHUFFLED: {"role": SHUFFLED}}
            if cell["allocation"] == "free":
                others[STATIC] = {"role": STATIC, "contender": "top-k"}
            names = (other for one, other in CONTRASTS if one == cell["contender"])
            others |= {name: {"contender": name} for name in names}
            for name, changes in others.items():
                if (j := place.get(key(cell | changes))) is not None:
                    found.append((i, j, name))
        return found

    def analyse(self, seed: int = 0) -> None:
        """Write "effect" {field: interval} and "against" {other: interval of KL} into the cells.

        The bands of KL hold together over all effects, shuffles and contrasts of the table; those
        of the other fields over theirs.
        """
        pairs = self.pairs()
        first, second = (np.array([pair[side] for pair in pairs], int) for side in (0, 1))
        for field in ("kl", "nats", "agree"):

            def statistic(weights: NDArray[np.float64], field: str = field) -> NDArray[np.float64]:
                effects = self.effects(weights, field)
                if field != "kl":
                    return effects
                return np.hstack([effects, effects[:, first] - effects[:, second]])

            intervals = bootstrap(statistic, len(self.tokens), seed=seed, groups=self.groups)
            for i, cell in enumerate(self.cells):
                cell.setdefault("effect", {})[field] = interval(intervals, i)
            if field != "kl":
                continue
            for place, (i, _, name) in enumerate(pairs, start=len(self.cells)):
                self.cells[i].setdefault("against", {})[name] = interval(intervals, place)


def key(cell: dict[str, Any]) -> frozenset[tuple[str, Any]]:
    """What identifies a cell within its table."""
    return frozenset((name, cell[name]) for name in ("role", "contender", "allocation", "budget"))


def interval(intervals: Intervals, at: int) -> dict[str, float]:
    """One statistic of bootstrap Intervals as a dict of plain numbers."""
    return {name: float(values[at]) for name, values in intervals._asdict().items()}


def varies(effect: Mapping[str, float]) -> bool:
    """Is it not the same in all draws of documents? It is where the text has only one."""
    return effect["band_high"] - effect["band_low"] > ROUNDING


def level_ends(cell: Mapping[str, Any]) -> tuple[float, float] | None:
    """The 95 % interval of a cell's KL; None where it was not taken, or the KL doesn't vary."""
    found = cell.get("level", {}).get("kl")
    if found is None or found["high"] - found["low"] <= ROUNDING:
        return None
    return found["low"], found["high"]


def verdict(effect: Mapping[str, float]) -> str:
    """BETTER where the whole band is below 0, WORSE where it is above, UNDECIDED otherwise; and
    UNDECIDED where nothing varies, so that there is no band."""
    if not varies(effect):
        return UNDECIDED
    if effect["band_high"] < 0:
        return BETTER
    return WORSE if effect["band_low"] > 0 else UNDECIDED


def adaptive(cell: dict[str, Any]) -> bool | None:
    """Whether the router beats its own numbers of experts dealt to other tokens; None: not run."""
    against = cell.get("against", {}).get(SHUFFLED)
    return None if against is None else verdict(against) == BETTER
