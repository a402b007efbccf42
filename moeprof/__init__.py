"""moeprof: look into, change and run the mixture-of-experts layers of Hugging Face models.

``import moeprof`` needs NumPy only and gives the routers as functions. Whatever touches a
model (``moeprof.patch`` ...) is imported on first use, and with it torch and transformers.
"""

import ctypes
import importlib.util
from pathlib import Path

import numpy  # noqa: F401  # before _C, which would hide what stops it, such as Ctrl-C


def _load_openblas() -> None:
    """Load the wheel's OpenBLAS for the extension alone.

    Not by ``import scipy_openblas32``: that loads it with global symbols, to which SciPy's
    own linear algebra would then bind. A build with MOEPROF_BLAS=system needs none of this.
    """
    spec = importlib.util.find_spec("scipy_openblas32")
    if spec is not None and spec.origin is not None:
        for library in (Path(spec.origin).parent / "lib").glob("libscipy_openblas.*"):
            ctypes.CDLL(str(library), mode=ctypes.RTLD_LOCAL)


_load_openblas()

try:
    from . import _C  # noqa: F401  # its import chooses the kernels, by MOEPROF_CPU
except ImportError as error:
    raise ImportError(
        f"moeprof's C extension can't be loaded ({error}). In a source checkout, build it with "
        "'pip install -e .', or leave the folder to use an installed moeprof."
    ) from error
from .backends.cpu import cpu_info, get_num_threads, set_num_threads  # noqa: E402
from .checks import missing  # noqa: E402
from .late import bind, exports  # noqa: E402
from .patching.interface import register_experts_implementation  # noqa: E402
from .routers import EXPORTS as _ROUTERS  # noqa: E402
from .routers import FUNCTIONS as _FUNCTIONS  # noqa: E402
from .routers import Router, benjamini_hochberg  # noqa: E402
from .version import __version__  # noqa: E402

globals().update(_ROUTERS)  # the classes, and the functions <name>_routing
register_experts_implementation()
bind("with_budget", "moeprof.studies.budget")
bind("diagnose", "moeprof.studies.diagnosis")

# name -> the module that defines it; imported when first asked for. What type checkers see of
# all this is in __init__.pyi.
_LAZY = {
    "BudgetError": "studies.budget",
    "Evaluated": "studies.evaluation",
    "Handle": "patching.handle",
    "MoEProfiler": "profile.profiler",
    "Null": "null",
    "OLMoERouterPatcher": "patching.patch",
    "Profile": "profile.result",
    "QuantizeReport": "quantizing.report",
    "Routing": "models.routing",
    "SimpleBenchmark": "studies.benchmark",
    "evaluate": "studies.evaluation",
    "experts_forward": "patching.experts_forward",
    "fit_null": "measure.fitting",
    "inspect": "models.inspection",
    "layer_ablation": "studies.ablation",
    "load": "quantizing.load",
    "patch": "patching.patch",
    "quantize": "quantizing.quantize",
    "read_records": "profiler.records",
    "roofline": "measure.roofline",
    "router_agreement": "profile.agreement",
    "run_configuration": "studies.sweep",
    "save_quantized": "quantizing.save",
    "unpatch": "patching.patch",
}

_MODULES = ("demo", "null", "profile", "profiler", "routers", "studies")
_find = exports(__name__, _LAZY, _MODULES)

__all__ = [
    *_LAZY,
    *_FUNCTIONS,
    "Router",
    "__version__",
    "benjamini_hochberg",
    "cpu_info",
    "get_num_threads",
    "set_num_threads",
]
__all__.sort()


def __getattr__(name: str) -> object:
    try:
        value = globals()[name] = _find(name)
    except ModuleNotFoundError as error:
        if not error.name or error.name.startswith("moeprof"):
            raise
        raise ImportError(missing(f"moeprof.{name} works on models and", error.name)) from error
    return value


def __dir__() -> list[str]:
    return [*__all__, *_ROUTERS, *_MODULES]
