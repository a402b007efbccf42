"""What `import moeprof` gives. Made by tests/stub.py; a test compares the two."""

from typing import Any

from . import demo as demo
from . import null as null
from . import profile as profile
from . import profiler as profiler
from . import routers as routers
from . import studies as studies
from .backends.cpu import cpu_info as cpu_info
from .backends.cpu import get_num_threads as get_num_threads
from .backends.cpu import set_num_threads as set_num_threads
from .measure.roofline import roofline as roofline
from .models.inspection import inspect as inspect
from .models.routing import Routing as Routing
from .null import Null as Null
from .null.fitting import fit_null as fit_null
from .patching.experts_forward import experts_forward as experts_forward
from .patching.handle import Handle as Handle
from .patching.patch import OLMoERouterPatcher as OLMoERouterPatcher
from .patching.patch import patch as patch
from .patching.patch import unpatch as unpatch
from .profile.agreement import router_agreement as router_agreement
from .profile.profiler import MoEProfiler as MoEProfiler
from .profile.result import Profile as Profile
from .profiler.records import read_records as read_records
from .routers.base import Router as Router
from .routers.evidence import BH as BH
from .routers.evidence import BY as BY
from .routers.evidence import EBH as EBH
from .routers.evidence import ExpertThreshold as ExpertThreshold
from .routers.evidence import FixedP as FixedP
from .routers.evidence import HigherCriticism as HigherCriticism
from .routers.evidence import LocalFDR as LocalFDR
from .routers.evidence import StoreyBH as StoreyBH
from .routers.evidence import WeightedBH as WeightedBH
from .routers.functions import RoutingResult as RoutingResult
from .routers.functions import RoutingStats as RoutingStats
from .routers.functions import benjamini_hochberg as benjamini_hochberg
from .routers.functions import benjamini_hochberg_routing as benjamini_hochberg_routing
from .routers.functions import topk_routing as topk_routing
from .routers.logits import Entropy as Entropy
from .routers.logits import GapRatio as GapRatio
from .routers.logits import Kneedle as Kneedle
from .routers.logits import MinP as MinP
from .routers.logits import TopK as TopK
from .routers.logits import TopP as TopP
from .studies.ablation import layer_ablation as layer_ablation
from .studies.benchmark import SimpleBenchmark as SimpleBenchmark
from .studies.budget import BudgetError as BudgetError
from .studies.sweep import run_configuration as run_configuration
from .version import __version__ as __version__

def bh_routing(
    router_logits: Any,
    alpha: float = ...,
    *,
    min_k: int = ...,
    max_k: int | None = ...,
    temperature: float = ...,
    null: Any = ...,
    return_stats: bool = ...,
) -> RoutingResult | RoutingStats: ...
def by_routing(
    router_logits: Any,
    alpha: float = ...,
    *,
    min_k: int = ...,
    max_k: int | None = ...,
    temperature: float = ...,
    null: Any = ...,
    return_stats: bool = ...,
) -> RoutingResult | RoutingStats: ...
def ebh_routing(
    router_logits: Any,
    alpha: float = ...,
    e: str = ...,
    *,
    min_k: int = ...,
    max_k: int | None = ...,
    temperature: float = ...,
    null: Any = ...,
    return_stats: bool = ...,
) -> RoutingResult | RoutingStats: ...
def entropy_routing(
    router_logits: Any,
    c: float = ...,
    *,
    min_k: int = ...,
    max_k: int | None = ...,
    temperature: float = ...,
    null: Any = ...,
    return_stats: bool = ...,
) -> RoutingResult | RoutingStats: ...
def expert_threshold_routing(
    router_logits: Any,
    rho: float = ...,
    *,
    min_k: int = ...,
    max_k: int | None = ...,
    temperature: float = ...,
    null: Any = ...,
    return_stats: bool = ...,
) -> RoutingResult | RoutingStats: ...
def fixed_p_routing(
    router_logits: Any,
    t: float = ...,
    *,
    min_k: int = ...,
    max_k: int | None = ...,
    temperature: float = ...,
    null: Any = ...,
    return_stats: bool = ...,
) -> RoutingResult | RoutingStats: ...
def gap_ratio_routing(
    router_logits: Any,
    c: float = ...,
    *,
    min_k: int = ...,
    max_k: int | None = ...,
    temperature: float = ...,
    null: Any = ...,
    return_stats: bool = ...,
) -> RoutingResult | RoutingStats: ...
def higher_criticism_routing(
    router_logits: Any,
    beta: float | str = ...,
    denominator: str = ...,
    c: float = ...,
    *,
    min_k: int = ...,
    max_k: int | None = ...,
    temperature: float = ...,
    null: Any = ...,
    return_stats: bool = ...,
) -> RoutingResult | RoutingStats: ...
def kneedle_routing(
    router_logits: Any,
    on: str = ...,
    c: float = ...,
    *,
    min_k: int = ...,
    max_k: int | None = ...,
    temperature: float = ...,
    null: Any = ...,
    return_stats: bool = ...,
) -> RoutingResult | RoutingStats: ...
def local_fdr_routing(
    router_logits: Any,
    q: float = ...,
    *,
    min_k: int = ...,
    max_k: int | None = ...,
    temperature: float = ...,
    null: Any = ...,
    return_stats: bool = ...,
) -> RoutingResult | RoutingStats: ...
def min_p_routing(
    router_logits: Any,
    t: float = ...,
    *,
    min_k: int = ...,
    max_k: int | None = ...,
    temperature: float = ...,
    null: Any = ...,
    return_stats: bool = ...,
) -> RoutingResult | RoutingStats: ...
def storey_bh_routing(
    router_logits: Any,
    alpha: float = ...,
    lam: float = ...,
    pi0: float | None = ...,
    *,
    min_k: int = ...,
    max_k: int | None = ...,
    temperature: float = ...,
    null: Any = ...,
    return_stats: bool = ...,
) -> RoutingResult | RoutingStats: ...
def top_p_routing(
    router_logits: Any,
    P: float = ...,
    *,
    min_k: int = ...,
    max_k: int | None = ...,
    temperature: float = ...,
    null: Any = ...,
    return_stats: bool = ...,
) -> RoutingResult | RoutingStats: ...
def weighted_bh_routing(
    router_logits: Any,
    alpha: float = ...,
    u: Any = ...,
    v: Any = ...,
    *,
    min_k: int = ...,
    max_k: int | None = ...,
    temperature: float = ...,
    null: Any = ...,
    return_stats: bool = ...,
) -> RoutingResult | RoutingStats: ...

__all__ = [
    "BudgetError",
    "Handle",
    "MoEProfiler",
    "Null",
    "OLMoERouterPatcher",
    "Profile",
    "Router",
    "Routing",
    "SimpleBenchmark",
    "__version__",
    "benjamini_hochberg",
    "benjamini_hochberg_routing",
    "bh_routing",
    "by_routing",
    "cpu_info",
    "ebh_routing",
    "entropy_routing",
    "expert_threshold_routing",
    "experts_forward",
    "fit_null",
    "fixed_p_routing",
    "gap_ratio_routing",
    "get_num_threads",
    "higher_criticism_routing",
    "inspect",
    "kneedle_routing",
    "layer_ablation",
    "local_fdr_routing",
    "min_p_routing",
    "patch",
    "read_records",
    "roofline",
    "router_agreement",
    "run_configuration",
    "set_num_threads",
    "storey_bh_routing",
    "top_p_routing",
    "topk_routing",
    "unpatch",
    "weighted_bh_routing",
]
