"""Null: the nulls of a whole model."""

from __future__ import annotations

import html
import math
import os
import re
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np

from ..backends.spec import BINS, LARGEST, LOW
from ..checks import check_model, check_type
from ..files import printable
from ..late import late
from ..models.identity import (
    add_digests,
    gate_weight,
    gates_of,
    model_name,
    router_sample,
    same_sample,
)
from .efron import efron_table, fit_efron
from .layers import LayerNull
from .scores import SCORES, check_choice, keep_largest
from .storage import read_null, write_null
from .tables import conformal_table, counted_table, pooled

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from ..checks import Tokenizer
    from .efron import EfronNull


KINDS = ("efron", "trimmed", "all", "conformal")
COMPLETE_KINDS = ("efron", "all", "conformal")  # of the same histograms
TAIL_RULE = "exponential, top 1 %"
_ARRAYS = ("counts", "largest", "router_sample")
_FACTS = (
    "kind",
    "score",
    "r_high",
    "r_low",
    "alpha_min",
    "tokens",
    "model_name",
    "text_digest",
    "tail_rule",
)
_TYPES = (
    (str, ("kind", "score", "model_name", "text_digest", "tail_rule")),
    (Integral, ("r_high", "r_low", "tokens")),
    (np.ndarray, _ARRAYS),
)


@dataclass(frozen=True, eq=False, repr=False)
class Null:
    """A calibrated null for each MoE layer of one model, or for each layer and expert.

    `fit_null` and `Null.load` make one.

    Attributes
    ----------
    kind
        "efron", "trimmed", "all" or "conformal".
    score
        "logprob", "logit" or "centred".
    r_high
        How many of each token's highest scores were left out; 0 but for `trimmed`.
    r_low
        How many of the lowest.
    counts
        (L, E, 8192) uint64: histograms over [-32, 32] of the scores, rounded up to float32.
    largest
        (L, E, at most 1024) float32: the largest scores of each expert, descending, padded with
        -inf.
    tokens
        How many were counted.
    model_name
        What the model is called in messages.
    router_sample
        (L, at most 16) float32: the first weights of each router.
    text_digest
        Tells which texts it was fitted to.
    tail_rule
        How p-values go on beyond the largest score.
    alpha_min
        None for one null per layer, else what `per_expert` was given.
    """

    kind: str
    score: str
    r_high: int
    r_low: int
    counts: NDArray[np.uint64]
    largest: NDArray[np.float32]
    tokens: int
    model_name: str
    router_sample: NDArray[np.float32]
    text_digest: str
    tail_rule: str = TAIL_RULE
    alpha_min: float | None = None
    _layers: dict[int, LayerNull] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        """TypeError or ValueError unless the parts fit together: a file may be anybody's."""
        self._check_types()
        check_choice("kind", self.kind, KINDS)
        check_choice("score", self.score, SCORES)
        self._check_alpha_min()
        if self.kind != "trimmed" and (self.r_high or self.r_low):
            raise ValueError("r_high and r_low belong to kind='trimmed'")
        if min(self.r_high, self.r_low) < 0:
            raise ValueError("r_high and r_low: expected at least 0")
        if not 1 <= self.tokens < 2**63:
            raise ValueError(f"tokens: expected at least 1, got {self.tokens}")
        if not re.fullmatch("[0-9a-f]{64}", self.text_digest):
            raise ValueError(f"text_digest: expected 64 hex digits, got {self.text_digest!r}")
        counts, sample = self.counts, self.router_sample
        if counts.ndim != 3 or counts.shape[2] != BINS or counts.dtype != np.uint64:
            raise ValueError(f"expected counts (L,E,{BINS}) uint64, got {counts.shape}")
        seen = counts.sum(axis=2)
        scores = self.tokens * (counts.shape[1] - self.r_high - self.r_low)
        if scores <= 0 or (seen.sum(axis=1) != scores).any():
            raise ValueError(f"expected {scores} scores in each layer's histogram")
        if self.kind != "trimmed" and (seen != self.tokens).any():
            raise ValueError(f"expected {self.tokens} scores in each expert's histogram")
        self._check_largest(np.minimum(seen, LARGEST))
        if sample.ndim != 2 or len(sample) != len(counts) or sample.dtype != np.float32:
            raise ValueError("expected a float32 sample of each layer's router weights")

    def _check_types(self) -> None:
        for kind, names in _TYPES:
            for name in names:
                value = getattr(self, name)
                if not isinstance(value, kind) or isinstance(value, bool):
                    raise TypeError(f"{name}: expected {kind.__name__}, got {value!r:.60}")

    def _check_alpha_min(self) -> None:
        alpha = self.alpha_min
        if alpha is None:
            return
        if self.kind == "trimmed":
            raise ValueError(
                "per expert: not of a trimmed null, which lacks popular experts' own high scores"
            )
        if not isinstance(alpha, Real) or isinstance(alpha, bool) or not 0 < alpha <= 1:
            raise ValueError(f"alpha_min: expected a number in (0, 1], got {alpha!r}")

    def _check_largest(self, expected: NDArray[np.int64]) -> None:
        """expected: (L,E), how many of the largest scores each expert must have."""
        largest = self.largest
        shape = (*expected.shape, int(expected.max()))
        if largest.shape != shape or largest.dtype != np.float32:
            raise ValueError(f"expected largest scores {shape} float32, got {largest.shape}")
        if np.isnan(largest).any() or (np.isfinite(largest).sum(axis=2) != expected).any():
            raise ValueError("expected the largest scores of each expert, all of them finite")
        if (largest[..., 1:] > largest[..., :-1]).any():
            raise ValueError("expected the largest scores in descending order")
        if (largest.max(axis=(1, 2)) <= LOW).any():
            raise ValueError(f"every score of a layer lies below {LOW}, the histogram's range")

    def __len__(self) -> int:
        return len(self.counts)

    def __repr__(self) -> str:
        return f"<moeprof.Null: {self.describe()}>"

    def _repr_html_(self) -> str:
        facts = self._facts() | {"layers": len(self), "experts": self.counts.shape[1]}
        facts["fallbacks"] = len(self.fallbacks)
        row = "<tr><th>{}</th><td>{}</td></tr>".format
        rows = "".join(row(name, html.escape(str(value))) for name, value in facts.items())
        return f"<table>{rows}</table>"

    def _facts(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _FACTS}

    def describe(self) -> str:
        """One line: kind, score, tokens, model, text."""
        trim = f" (without each token's {self.r_high} highest and {self.r_low} lowest)"
        each = "" if self.alpha_min is None else ", one for each expert"
        if self.fallbacks:
            each += f" but for {len(self.fallbacks)} that had too few scores"
        return (
            f"{self.kind} null{trim if self.kind == 'trimmed' else ''} on {self.score}{each}, "
            f"{self.tokens:,} tokens, {len(self)} layers x {self.counts.shape[1]} experts of "
            f"{printable(self.model_name)}, text {self.text_digest[:12]}"
        )

    # ---- p-values ----

    @property
    def fallbacks(self) -> list[tuple[int, int]]:
        """[(layer, expert)] that use their layer's null, for want of scores; [] by layer.

        Below E/alpha_min - 1 scores the smallest conformal p-value can't be rejected at
        alpha_min.
        """
        if self.alpha_min is None:
            return []
        enough = math.ceil(self.counts.shape[1] / self.alpha_min - 1)
        few = self.counts.sum(axis=2) < enough
        return [(int(layer), int(expert)) for layer, expert in np.argwhere(few)]

    def layer(self, index: int) -> LayerNull:
        """The LayerNull of MoE layer `index`, from 0 on, computed when first asked for.

        Raises IndexError.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"layer {index}: the null has {len(self)} layers")
        if index not in self._layers:
            self._layers[index] = replace(self._make_layer(index), words=self.describe())
        return self._layers[index]

    def _make_layer(self, index: int) -> LayerNull:
        counts, largest = self.counts[index], self.largest[index]
        per_bin, top = pooled(counts, largest)
        form = "conformal" if self.kind == "conformal" else "table"
        fit = fit_efron(per_bin) if self.kind == "efron" else None
        whole = self._table(per_bin, top, fit)
        if self.alpha_min is None:
            return LayerNull(self.score, whole, form, fit, None if fit is None else per_bin)
        few = {expert for layer, expert in self.fallbacks if layer == index}
        tables = [
            whole if e in few else self._table(*pooled(counts[e : e + 1], largest[e : e + 1]))
            for e in range(len(counts))
        ]
        return LayerNull(self.score, np.stack(tables), form)

    def _table(
        self, per_bin: NDArray[np.uint64], top: NDArray[np.float64], fit: EfronNull | None = None
    ) -> NDArray[np.float64]:
        if self.kind == "efron":
            return efron_table(fit or fit_efron(per_bin))
        return (conformal_table if self.kind == "conformal" else counted_table)(per_bin, top)

    # ---- other nulls from this one ----

    def as_kind(self, kind: str) -> Null:
        """The null of another kind from the same scores: efron, all and conformal share them.

        Raises ValueError from or to `trimmed`, whose histograms lack the trimmed scores.
        """
        check_choice("kind", kind, KINDS)
        if kind == self.kind:
            return self
        if "trimmed" in (kind, self.kind):
            raise ValueError(
                f"a {self.kind} null can't become {kind}: they count other scores; fit one with "
                f"kind={kind!r} (moeprof.fit_null, or `moeprof calibrate --kind {kind}`)"
            )
        return replace(self, kind=kind)

    def per_expert(self, alpha_min: float | None = 0.01) -> Null:
        """One null for each layer and expert; None as alpha_min goes back to one per layer.

        An expert with fewer than E/alpha_min - 1 scores keeps its layer's and is listed in
        `.fallbacks`. Raises ValueError for a trimmed null or an alpha_min outside of (0, 1].
        """
        return replace(self, alpha_min=alpha_min)

    def merge(self, other: Null) -> Null:
        """The null fitted to both texts: exact, and the same to the bit in any order.

        Raises ValueError unless both have the same kind, score, trimming and model.
        """
        check_type("merge: other", other, Null, "a Null")
        for name in ("kind", "score", "r_high", "r_low", "alpha_min", "tail_rule"):
            mine, its = getattr(self, name), getattr(other, name)
            if mine != its:
                raise ValueError(f"merge: {name} differs: {mine!r}, {its!r}")
        same_shape = self.counts.shape == other.counts.shape
        if not same_shape or not same_sample(self.router_sample, other.router_sample):
            names = f"{self.model_name!r}, {other.model_name!r}"
            raise ValueError(f"merge: fitted to different models: {names}")
        # The two may come from one model under two names or dtypes: the smaller one stays, in
        # whichever order they were given.
        first = min(self, other, key=lambda n: (n.model_name, n.router_sample.tobytes()))
        return replace(
            self,
            counts=self.counts + other.counts,
            largest=trim_padding(
                keep_largest(np.concatenate([self.largest, other.largest], axis=2))
            ),
            tokens=self.tokens + other.tokens,
            model_name=first.model_name,
            router_sample=first.router_sample,
            text_digest=add_digests(self.text_digest, other.text_digest),
        )

    # ---- of one model, in a file ----

    def check(self, model: nn.Module) -> None:
        """ValueError, naming both models and the difference, if this is not `model`'s null.

        The router's weights decide, not the name: a model has one name on the hub and another
        in a folder. The comparison survives loading in fp32, bf16 or fp16.
        """
        check_model("Null.check", model)
        gates = gates_of(model)
        experts = {gate_weight(name, gate).shape[0] for name, gate in gates}
        if len(gates) != len(self):
            differs = f"it has {len(self)} MoE layers, the model {len(gates)}"
        elif experts != {self.counts.shape[1]}:
            differs = f"it has {self.counts.shape[1]} experts a layer, the model {sorted(experts)}"
        elif not same_sample(self.router_sample, router_sample(gates)):
            differs = "the weights of the routers differ"
        else:
            return
        name = model_name(model)
        here = f"{name!r}" if name != self.model_name else "this one of the same name"
        raise ValueError(f"this null was fitted to {self.model_name!r}, not to {here}: {differs}")

    def diagnose(self, model: nn.Module, tokenizer: Tokenizer, **options: Any) -> Any:
        """What this null and a router on it do to `model` on held-out text: a Diagnosis.

        Options, returns and errors: `moeprof.studies.diagnosis.diagnose`.

        Example
        -------
        >>> found = null.diagnose(model, tokenizer, router=moeprof.BH(0.3))   # doctest: +SKIP
        >>> print(found.summary())                                            # doctest: +SKIP
        """
        return late("diagnose")(self, model, tokenizer, **options)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to `path` (.safetensors or .npz), as a whole or not at all.

        Raises ValueError for another suffix, OSError where the folder can't be written.
        """
        write_null(path, {name: getattr(self, name) for name in _ARRAYS}, self._facts())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Null:
        """Read what `save` wrote.

        Raises FileNotFoundError, or ValueError naming the file when it is not a null, is
        damaged, truncated or has another format version.
        """

        def make(arrays: dict[str, NDArray[Any]], facts: dict[str, Any]) -> Null:
            fields: dict[str, Any] = {n: arrays[n] for n in _ARRAYS}
            return cls(**fields, **{n: facts[n] for n in _FACTS})

        return read_null(path, make)


def trim_padding(largest: NDArray[np.float32]) -> NDArray[np.float32]:
    """`largest` (L,E,K) without the columns in which no expert has a score."""
    return largest[..., : int(np.isfinite(largest).sum(axis=2).max())]
