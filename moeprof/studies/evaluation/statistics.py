"""From sums by document to results: means, intervals over documents, paired tests.

No model is needed: `results` is a function of what `Evaluation.measure` gave.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from ...measure.bootstrap import DRAWS, bootstrap

if TYPE_CHECKING:
    from numpy.typing import NDArray


METRICS = ("perplexity", "bits_per_byte", "bits_above_own", "kl", "agreement", "experts")
FLIPS = 9999  # of the signs of documents; all of them where there are no more
TIE = 1e-12  # sums that differ by less than this share are equal but for rounding
Row = dict[str, Any]


def slices(documents: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, list[int]]]:
    """[(kind, value, indices of documents)]: all, each domain, each complexity that is named.

    A kind of which there is one value only says nothing that "all" doesn't.
    """
    found = [("all", "", list(range(len(documents))))]
    for kind in ("domain", "complexity"):
        values = dict.fromkeys(d[kind] for d in documents if d.get(kind) is not None)
        members = {v: [i for i, d in enumerate(documents) if d.get(kind) == v] for v in values}
        if len(members) > 1 or (members and len(next(iter(members.values()))) < len(documents)):
            found += [(kind, value, indices) for value, indices in members.items()]
    return found


def results(
    documents: Sequence[Mapping[str, Any]],
    measured: Mapping[str, Mapping[str, Any]],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> tuple[list[Row], list[Row]]:
    """(a row for each configuration and slice, a row for each pair of configurations).

    documents: as HeldOut has them; measured: {configuration: what `Evaluation.measure` gave}, the
    model's own routing first, without those that gave an error. A metric comes with _low and
    _high, a 95 % interval by bootstrap over documents, drawn within their domain (see
    `bootstrap`); None where there is one document.
    """
    rows = []
    for kind, value, at in slices(documents):
        sums = _Sums([_part(one, at) for one in measured.values()])
        found = bootstrap(
            sums.metrics, len(at), draws=draws, seed=seed, groups=_groups(documents, at)
        )
        shape = (len(METRICS), len(measured))
        estimate, low, high = (
            values.reshape(shape) for values in (found.estimate, found.low, found.high)
        )
        for place, name in enumerate(measured):
            row: Row = {"config": name, "slice": kind, "value": value, "documents": len(at)}
            row["tokens"] = int(sums.predicted.sum())
            several = len(at) > 1
            for number, metric in enumerate(METRICS):
                row[metric] = float(estimate[number, place])
                row[f"{metric}_low"] = float(low[number, place]) if several else None
                row[f"{metric}_high"] = float(high[number, place]) if several else None
            rows.append(row)
    return rows, _pairs(documents, measured, draws, seed)


def _part(one: Mapping[str, Any], at: list[int]) -> dict[str, NDArray[np.float64]]:
    fields = ("nats", "kl", "agree", "predicted", "tokens", "experts", "bytes")
    return {field: np.asarray(one[field], float)[at] for field in fields}


def _groups(documents: Sequence[Mapping[str, Any]], at: list[int]) -> NDArray[np.int64]:
    """The domain of each document, as a number."""
    return np.unique([documents[i]["domain"] for i in at], return_inverse=True)[1]


class _Sums:
    """Sums by document of M configurations, the model's own first; arrays (D, M), or (D,) of what
    is the same for all."""

    def __init__(self, parts: Sequence[Mapping[str, NDArray[np.float64]]]) -> None:
        def stack(field: str) -> NDArray[np.float64]:
            return np.stack([part[field] for part in parts], axis=1)

        self.bits, self.kl, self.agree = stack("nats") / math.log(2), stack("kl"), stack("agree")
        self.experts = stack("experts")
        self.predicted, self.tokens, self.bytes = (
            parts[0][field] for field in ("predicted", "tokens", "bytes")
        )

    def metrics(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """(B, 6 M): `METRICS` in turn, with documents weighed by (B, D)."""
        predicted, size = ((weights @ x)[:, None] for x in (self.predicted, self.bytes))
        bits = weights @ self.bits
        per_byte = bits / size
        return np.hstack(
            [
                np.exp2(bits / predicted),
                per_byte,
                per_byte - per_byte[:, :1],
                weights @ self.kl / predicted,
                weights @ self.agree / predicted,
                weights @ self.experts / (weights @ self.tokens)[:, None],
            ]
        )


# ---- pairs ----


def _pairs(
    documents: Sequence[Mapping[str, Any]],
    measured: Mapping[str, Mapping[str, Any]],
    draws: int,
    seed: int,
) -> list[Row]:
    """Every two configurations: how many bits per byte the second has above the first."""
    pairs = list(combinations(range(len(measured)), 2))
    if not pairs or len(documents) < 2:
        return []
    names, at = list(measured), list(range(len(documents)))
    sums = _Sums([_part(one, at) for one in measured.values()])
    first, second = np.array(pairs).T
    differences = sums.bits[:, second] - sums.bits[:, first]

    def statistic(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return weights @ differences / (weights @ sums.bytes)[:, None]

    found = bootstrap(
        statistic, len(documents), draws=draws, seed=seed, groups=_groups(documents, at)
    )
    p = sign_flip(differences, seed=seed)
    adjusted = holm(p)
    return [
        {
            "first": names[i],
            "second": names[j],
            "bits": float(found.estimate[place]),
            "bits_low": float(found.low[place]),
            "bits_high": float(found.high[place]),
            "p": float(p[place]),
            "p_holm": float(adjusted[place]),
        }
        for place, (i, j) in enumerate(pairs)
    ]


def sign_flip(
    differences: NDArray[np.float64], *, flips: int = FLIPS, seed: int = 0
) -> NDArray[np.float64]:
    """(P,) two-sided p-values of paired differences (D, P), documents by pairs.

    Tests that a document's two results could as well be swapped: then each difference is as
    likely to have the other sign. p is the share of sign flips whose sum is as far from 0 as the
    one found, over all 2^D where there are at most flips + 1; else of random ones with the one
    found among them, (1 + #) / (1 + flips).

    Source: Fisher 1935, The Design of Experiments, section 21; for the 1 Phipson & Smyth 2010,
    Stat. Appl. Genet. Mol. Biol. 9.
    """
    size = len(differences)
    far = np.abs(differences.sum(axis=0)) * (1 - TIE)
    exact = size < 60 and 2**size <= flips + 1
    rng, left = np.random.default_rng(seed), 2**size if exact else flips
    count, done = np.zeros(differences.shape[1], np.int64), 0
    while done < left:
        number = min(1024, left - done)
        if exact:
            bits = np.arange(done, done + number)[:, None] >> np.arange(size) & 1
        else:
            bits = rng.integers(2, size=(number, size), dtype=np.int8)
        count += (np.abs((1.0 - 2 * bits) @ differences) >= far).sum(axis=0)
        done += number
    return count / left if exact else (1 + count) / (1 + left)


def holm(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """p-values adjusted so that one below 5 % is by chance in at most 5 % of such families.

    Source: Holm 1979, Scand. J. Statist. 6.
    """
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    factors = np.arange(len(p), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * factors), 1)
    return adjusted
