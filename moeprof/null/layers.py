"""The null of one layer, and the nulls that see nothing but the token itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, cast

import numpy as np

from .efron import EfronNull, local_fdr_table
from .scores import matrix_of, normal_reference, scores_of, softmax_reference
from .tables import conformal_p, table_p

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from .scores import Logits


# What the C functions take for a null: (form, score, table).
NullSpec = tuple[str, str, "NDArray[np.float64] | None"]
_REFERENCE = {"table": table_p, "conformal": conformal_p}


def _p_values(logits: Logits, spec: NullSpec) -> NDArray[np.float64]:
    from .. import _C

    return _C.p_values(matrix_of(logits), spec)


FIT_EFRON = (
    'fit it with moeprof.fit_null(model, tokenizer, texts, kind="efron") or `moeprof calibrate '
    '--kind efron`; the demo model has moeprof.demo.null("efron")'
)


@dataclass(frozen=True, eq=False)
class LayerNull:
    """The null of one layer, which p-values are computed from: `Null.layer` gives it.

    score : what of the logits the p-values are of, "logprob", "logit" or "centred"
    table : float64 (N,) for all experts, or (E,N) with one for each
    form : how the table is read, "table" or "conformal"
    efron : the fit of an efron null by layer, else None
    per_bin : (8192,) its histogram, else None
    words : what `describe` says: the null of all layers, in one line
    """

    score: str
    table: NDArray[np.float64] = field(repr=False)
    form: str = "table"
    efron: EfronNull | None = None
    per_bin: NDArray[np.uint64] | None = field(default=None, repr=False)
    words: str = field(default="a null of one's own", compare=False, repr=False)

    @property
    def spec(self) -> NullSpec:
        """The argument `null` of the C functions: (form, score, table)."""
        return self.form, self.score, self.table

    def describe(self) -> str:
        """What it is, in one line."""
        return self.words

    def reference(self, router_logits: Logits) -> NDArray[np.float64]:
        """p-values (T,E) in NumPy float64, by the definition; 0 < p <= 1.

        Raises ValueError for a row with a NaN or of -inf only, or for another E than the table's.
        """
        scores = scores_of(matrix_of(router_logits), self.score)
        rule = _REFERENCE[self.form]
        if self.table.ndim == 1:
            return rule(scores, self.table)
        if scores.shape[1] != len(self.table):
            raise ValueError(
                f"router_logits: expected {len(self.table)} experts, as the null has, "
                f"got {scores.shape[1]}"
            )
        columns = [rule(s, table) for s, table in zip(scores.T, self.table, strict=True)]
        return np.stack(columns, axis=1)

    def p_values(self, router_logits: Logits) -> NDArray[np.float64]:
        """p-values (T,E) float64 as `reference`, computed in C."""
        return _p_values(router_logits, self.spec)

    @property
    def pi0(self) -> float:
        """Efron's estimate of the share of nulls among all scores.

        Raises ValueError unless the null is `efron`, by layer.
        """
        return self._fit("pi0").pi0

    @cached_property
    def local_fdr(self) -> NDArray[np.float64]:
        """The local fdr at the 8193 edges, float64: linear between them, constant outside.

        Computed when first asked for, by statsmodels; see `moeprof.null.efron`. Raises
        ValueError unless the null is `efron`, by layer, or where nothing can be fitted.
        """
        fit = self._fit("local_fdr")
        return local_fdr_table(cast("NDArray[np.uint64]", self.per_bin), fit)

    def _fit(self, what: str) -> EfronNull:
        if self.efron is None:
            raise ValueError(f"{what}: needs a null of kind 'efron', one per layer: {FIT_EFRON}")
        return self.efron


@dataclass(frozen=True)
class TokenNull:
    """A null without a fit: each token against its own logits, "normal" or "softmax".

    normal: p = 1 - Phi((z - m) / (1.4826022 MAD)), see `normal_reference`; a fallback without
    calibration, whose error rates hold nowhere (under pure noise BH at alpha .05 rejects
    something for .109 of the tokens at E = 64, for .19 at E = 8). softmax: p = 1 - softmax,
    degenerate.
    """

    form: str
    score = "logit"  # of the spec, where nothing reads it
    table = None

    def describe(self) -> str:
        """What it is, in one line."""
        return f"{self.form}: each token's own logits, without a fit"

    @property
    def spec(self) -> NullSpec:
        """The argument `null` of the C functions."""
        return self.form, self.score, None

    def reference(self, router_logits: Logits) -> NDArray[np.float64]:
        """p-values (T,E) in NumPy float64; ValueError for a row with a NaN or of -inf only."""
        return {"normal": normal_reference, "softmax": softmax_reference}[self.form](router_logits)

    def p_values(self, router_logits: Logits) -> NDArray[np.float64]:
        """p-values (T,E) float64 as `reference`, computed in C."""
        return _p_values(router_logits, self.spec)

    def layer(self, index: int) -> TokenNull:
        """The same null, for every layer."""
        return self

    def check(self, model: nn.Module) -> None:
        """Nothing to check: it belongs to no model."""


NORMAL, SOFTMAX = TokenNull("normal"), TokenNull("softmax")
