"""Routers: how many experts each token gets, and which.

A router is a frozen dataclass whose parameters are those of its C twin
(``csrc/routers/<name>.c``). All selections go by evidence, best first: p-values ascending where
the router works on p-values, else logits descending; ties go to the higher logit, then to the
lower expert id. Each has a function too, ``moeprof.<name>_routing(logits, ...)``.
"""

from .base import REGISTRY, Router, Tokens, make_router
from .evidence import (
    BH,
    BY,
    EBH,
    ExpertThreshold,
    FixedP,
    HigherCriticism,
    LocalFDR,
    StoreyBH,
    WeightedBH,
)
from .functions import FUNCTIONS, RoutingResult, RoutingStats, benjamini_hochberg, is_tensor
from .logits import Entropy, GapRatio, Kneedle, MinP, TopK, TopP
from .table import document

for _router in REGISTRY.values():
    document(_router)

# What moeprof itself exports: the classes and the functions of the registry.
EXPORTS = {cls.__name__: cls for cls in REGISTRY.values()} | FUNCTIONS
globals().update(FUNCTIONS)

__all__ = [
    "BH",
    "BY",
    "EBH",
    "EXPORTS",
    "FUNCTIONS",
    "REGISTRY",
    "Entropy",
    "ExpertThreshold",
    "FixedP",
    "GapRatio",
    "HigherCriticism",
    "Kneedle",
    "LocalFDR",
    "MinP",
    "Router",
    "RoutingResult",
    "RoutingStats",
    "StoreyBH",
    "Tokens",
    "TopK",
    "TopP",
    "WeightedBH",
    "benjamini_hochberg",
    "is_tensor",
    "make_router",
    *FUNCTIONS,
]
