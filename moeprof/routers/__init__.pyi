"""The routers, and their functions. Made by tests/stub.py; a test compares the two."""

import os
from typing import Any

from ..null.resolve import AnyNull
from ..null.scores import Logits
from .base import REGISTRY as REGISTRY
from .base import Router as Router
from .base import Tokens as Tokens
from .base import make_router as make_router
from .evidence import BH as BH
from .evidence import BY as BY
from .evidence import EBH as EBH
from .evidence import ExpertThreshold as ExpertThreshold
from .evidence import FixedP as FixedP
from .evidence import HigherCriticism as HigherCriticism
from .evidence import LocalFDR as LocalFDR
from .evidence import StoreyBH as StoreyBH
from .evidence import WeightedBH as WeightedBH
from .functions import FUNCTIONS as FUNCTIONS
from .functions import RoutingResult as RoutingResult
from .functions import RoutingStats as RoutingStats
from .functions import benjamini_hochberg as benjamini_hochberg
from .functions import benjamini_hochberg_routing as benjamini_hochberg_routing
from .functions import is_tensor as is_tensor
from .functions import topk_routing as topk_routing
from .logits import Entropy as Entropy
from .logits import GapRatio as GapRatio
from .logits import Kneedle as Kneedle
from .logits import MinP as MinP
from .logits import TopK as TopK
from .logits import TopP as TopP

EXPORTS: dict[str, Any]

def bh_routing(
    router_logits: Logits,
    alpha: float = ...,
    *,
    min_k: int = ...,
    max_k: int | None = ...,
    temperature: float = ...,
    null: AnyNull | str | os.PathLike[str] | None = ...,
    return_stats: bool = ...,
    norm: str = ...,
) -> RoutingResult | RoutingStats: ...
def by_routing(
    router_logits: Logits,
    alpha: float = ...,
    *,
    min_k: int = ...,
    max_k: int | None = ...,
    temperature: float = ...,
    null: AnyNull | str | os.PathLike[str] | None = ...,
    return_stats: bool = ...,
    norm: str = ...,
) -> RoutingResult | RoutingStats: ...
def ebh_routing(
    router_logits: Logits,
    alpha: float = ...,
    e: str = ...,
    *,
    min_k: int = ...,
    max_k: int | None = ...,
    temperature: float = ...,
    null: AnyNull | str | os.PathLike[str] | None = ...,
    return_stats: bool = ...,
    norm: str = ...,
) -> RoutingResult | RoutingStats: ...
def entropy_routing(
    router_logits: Logits,
    c: float = ...,
    *,
    min_k: int = ...,
    max_k: int | None = ...,
    temperature: float = ...,
    null: AnyNull | str | os.PathLike[str] | None = ...,
    return_stats: bool = ...,
    norm: str = ...,
) -> RoutingResult | RoutingStats: ...
def expert_threshold_routing(
    router_logits: Logits,
    rho: float = ...,
    *,
    min_k: int = ...,
    max_k: int | None = ...,
    temperature: float = ...,
    null: AnyNull | str | os.PathLike[str] | None = ...,
    return_stats: bool = ...,
    norm: str = ...,
) -> RoutingResult | RoutingStats: ...
def fixed_p_routing(
    router_logits: Logits,
    t: float = ...,
    *,
    min_k: int = ...,
    max_k: int | None = ...,
    temperature: float = ...,
    null: AnyNull | str | os.PathLike[str] | None = ...,
    return_stats: bool = ...,
    norm: str = ...,
) -> RoutingResult | RoutingStats: ...
def gap_ratio_routing(
    router_logits: Logits,
    c: float = ...,
    *,
    min_k: int = ...,
    max_k: int | None = ...,
    temperature: float = ...,
    null: AnyNull | str | os.PathLike[str] | None = ...,
    return_stats: bool = ...,
    norm: str = ...,
) -> RoutingResult | RoutingStats: ...
def higher_criticism_routing(
    router_logits: Logits,
    beta: float | str = ...,
    denominator: str = ...,
    c: float = ...,
    *,
    min_k: int = ...,
    max_k: int | None = ...,
    temperature: float = ...,
    null: AnyNull | str | os.PathLike[str] | None = ...,
    return_stats: bool = ...,
    norm: str = ...,
) -> RoutingResult | RoutingStats: ...
def kneedle_routing(
    router_logits: Logits,
    on: str = ...,
    c: float = ...,
    *,
    min_k: int = ...,
    max_k: int | None = ...,
    temperature: float = ...,
    null: AnyNull | str | os.PathLike[str] | None = ...,
    return_stats: bool = ...,
    norm: str = ...,
) -> RoutingResult | RoutingStats: ...
def local_fdr_routing(
    router_logits: Logits,
    q: float = ...,
    *,
    min_k: int = ...,
    max_k: int | None = ...,
    temperature: float = ...,
    null: AnyNull | str | os.PathLike[str] | None = ...,
    return_stats: bool = ...,
    norm: str = ...,
) -> RoutingResult | RoutingStats: ...
def min_p_routing(
    router_logits: Logits,
    t: float = ...,
    *,
    min_k: int = ...,
    max_k: int | None = ...,
    temperature: float = ...,
    null: AnyNull | str | os.PathLike[str] | None = ...,
    return_stats: bool = ...,
    norm: str = ...,
) -> RoutingResult | RoutingStats: ...
def storey_bh_routing(
    router_logits: Logits,
    alpha: float = ...,
    lam: float = ...,
    pi0: float | None = ...,
    *,
    min_k: int = ...,
    max_k: int | None = ...,
    temperature: float = ...,
    null: AnyNull | str | os.PathLike[str] | None = ...,
    return_stats: bool = ...,
    norm: str = ...,
) -> RoutingResult | RoutingStats: ...
def top_p_routing(
    router_logits: Logits,
    P: float = ...,
    *,
    min_k: int = ...,
    max_k: int | None = ...,
    temperature: float = ...,
    null: AnyNull | str | os.PathLike[str] | None = ...,
    return_stats: bool = ...,
    norm: str = ...,
) -> RoutingResult | RoutingStats: ...
def weighted_bh_routing(
    router_logits: Logits,
    alpha: float = ...,
    u: Any = ...,
    v: Any = ...,
    *,
    min_k: int = ...,
    max_k: int | None = ...,
    temperature: float = ...,
    null: AnyNull | str | os.PathLike[str] | None = ...,
    return_stats: bool = ...,
    norm: str = ...,
) -> RoutingResult | RoutingStats: ...
