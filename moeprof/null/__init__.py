"""Null distributions of router scores: save, load, p-values (fitted in `moeprof.measure.fitting`).

A null is the distribution of the router's score of an expert that a token does not need.
`Null` holds one for each MoE layer of a model, as integer histograms per expert, so that two
nulls merge by adding. Letters: L MoE layers, E experts, T tokens.

Kinds, and what may be said under each:

efron      Efron's empirical null, the default of `diagnose`: a normal fitted to the bulk of the
           scores. The one under which BH's alpha may be called a false discovery rate, as far
           as its model of the scores holds. On pure noise BH rejects something in about a
           share alpha of the tokens, in fewer on `logprob`, where the softmax bounds how far a
           score can rise.
all        every score. The mixture of nulls and others, so BH rejects next to nothing; right
           where a quantile of the scores is wanted.
conformal  p = (1 + #{calibration scores >= s}) / (n + 1) of all scores: valid on average over
           calibrations, for one token per document.
trimmed    without each token's highest and lowest scores, the default of routing: a knob for
           compute, under which BH's usual alphas span a useful range of experts. On pure noise
           BH rejects nearly always.

Without a fit: `NORMAL`, the fallback, and `SOFTMAX`, to show that it is none (`TokenNull`).
"""

from .layers import NORMAL, SOFTMAX, LayerNull, TokenNull
from .model import COMPLETE_KINDS, KINDS, Null
from .resolve import NO_NULL, resolve_layer_null, resolve_null
from .scores import SCORES, normal_reference, softmax_reference

__all__ = [
    "COMPLETE_KINDS",
    "KINDS",
    "NORMAL",
    "NO_NULL",
    "SCORES",
    "SOFTMAX",
    "LayerNull",
    "Null",
    "TokenNull",
    "normal_reference",
    "resolve_layer_null",
    "resolve_null",
    "softmax_reference",
]
