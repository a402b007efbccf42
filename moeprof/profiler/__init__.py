"""What a mixture of experts does while it runs: counts, times, and what follows from them."""

from .ablation import layer_ablation
from .agreement import router_agreement
from .profiler import MoEProfiler
from .records import read_records
from .result.profile import Profile
from .roofline import Roofline, roofline

__all__ = [
    "MoEProfiler",
    "Profile",
    "Roofline",
    "layer_ablation",
    "read_records",
    "roofline",
    "router_agreement",
]
