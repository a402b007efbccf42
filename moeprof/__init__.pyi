"""What `import moeprof` gives. Made by tests/stub.py; a test compares the two."""

from . import demo as demo
from . import null as null
from . import profile as profile
from . import profiler as profiler
from . import routers as routers
from . import studies as studies
from .backends.cpu import cpu_info as cpu_info
from .backends.cpu import get_num_threads as get_num_threads
from .backends.cpu import set_num_threads as set_num_threads
from .measure.fitting import fit_null as fit_null
from .measure.roofline import roofline as roofline
from .models.inspection import inspect as inspect
from .models.routing import Routing as Routing
from .null import Null as Null
from .patching.experts_forward import experts_forward as experts_forward
from .patching.handle import Handle as Handle
from .patching.patch import OLMoERouterPatcher as OLMoERouterPatcher
from .patching.patch import patch as patch
from .patching.patch import unpatch as unpatch
from .profile.agreement import router_agreement as router_agreement
from .profile.profiler import MoEProfiler as MoEProfiler
from .profile.result import Profile as Profile
from .profiler.records import read_records as read_records
from .quantizing.load import load as load
from .quantizing.quantize import quantize as quantize
from .quantizing.report import QuantizeReport as QuantizeReport
from .quantizing.save import save_quantized as save_quantized
from .routers import BH as BH
from .routers import BY as BY
from .routers import EBH as EBH
from .routers import Entropy as Entropy
from .routers import ExpertThreshold as ExpertThreshold
from .routers import FixedP as FixedP
from .routers import GapRatio as GapRatio
from .routers import HigherCriticism as HigherCriticism
from .routers import Kneedle as Kneedle
from .routers import LocalFDR as LocalFDR
from .routers import MinP as MinP
from .routers import Router as Router
from .routers import StoreyBH as StoreyBH
from .routers import TopK as TopK
from .routers import TopP as TopP
from .routers import WeightedBH as WeightedBH
from .routers import benjamini_hochberg as benjamini_hochberg
from .routers import benjamini_hochberg_routing as benjamini_hochberg_routing
from .routers import bh_routing as bh_routing
from .routers import by_routing as by_routing
from .routers import ebh_routing as ebh_routing
from .routers import entropy_routing as entropy_routing
from .routers import expert_threshold_routing as expert_threshold_routing
from .routers import fixed_p_routing as fixed_p_routing
from .routers import gap_ratio_routing as gap_ratio_routing
from .routers import higher_criticism_routing as higher_criticism_routing
from .routers import kneedle_routing as kneedle_routing
from .routers import local_fdr_routing as local_fdr_routing
from .routers import min_p_routing as min_p_routing
from .routers import storey_bh_routing as storey_bh_routing
from .routers import top_p_routing as top_p_routing
from .routers import topk_routing as topk_routing
from .routers import weighted_bh_routing as weighted_bh_routing
from .studies.ablation import layer_ablation as layer_ablation
from .studies.benchmark import SimpleBenchmark as SimpleBenchmark
from .studies.budget import BudgetError as BudgetError
from .studies.evaluation import Evaluated as Evaluated
from .studies.evaluation import evaluate as evaluate
from .studies.sweep import run_configuration as run_configuration
from .version import __version__ as __version__

__all__ = [
    "BudgetError",
    "Evaluated",
    "Handle",
    "MoEProfiler",
    "Null",
    "OLMoERouterPatcher",
    "Profile",
    "QuantizeReport",
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
    "evaluate",
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
    "load",
    "local_fdr_routing",
    "min_p_routing",
    "patch",
    "quantize",
    "read_records",
    "roofline",
    "router_agreement",
    "run_configuration",
    "save_quantized",
    "set_num_threads",
    "storey_bh_routing",
    "top_p_routing",
    "topk_routing",
    "unpatch",
    "weighted_bh_routing",
]
