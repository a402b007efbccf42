"""moeprof: look into, change and run the mixture-of-experts layers of Hugging Face models on a CPU.

``import moeprof`` needs NumPy only and gives the routers as functions. Whatever touches a
model (``moeprof.patch`` ...) is imported on first use, and with it torch and transformers.
"""

import ctypes
import importlib
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
from ._interface import register_experts_implementation  # noqa: E402
from .cpu import cpu_info, get_num_threads, set_num_threads  # noqa: E402
from .extra import missing  # noqa: E402
from .routers import EXPORTS as _ROUTERS  # noqa: E402
from .routers import benjamini_hochberg  # noqa: E402

globals().update(_ROUTERS)  # the classes, and the functions <name>_routing
register_experts_implementation()

__version__ = "0.1.0"

# name -> the module that defines it; imported when first asked for
_LAZY = {
    "BudgetError": "budget",
    "MoEProfiler": "profiler",
    "Null": "null",
    "OLMoERouterPatcher": "patching",
    "Profile": "profiler",
    "SimpleBenchmark": "benchmark",
    "experts_forward": "experts",
    "fit_null": "calibration",
    "layer_ablation": "profiler",
    "patch": "patching",
    "roofline": "profiler",
    "router_agreement": "profiler",
    "run_configuration": "experiment",
    "unpatch": "patching",
}

_MODULES = ("benchmark", "budget", "demo", "experiment", "null", "profiler")

__all__ = [
    *_LAZY,
    "benjamini_hochberg",
    "cpu_info",
    "get_num_threads",
    "set_num_threads",
]
__all__ += _ROUTERS
__all__.sort()


def __getattr__(name: str):
    if name not in _LAZY and name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f".{_LAZY.get(name, name)}", __name__)
    except ModuleNotFoundError as error:
        if not error.name or error.name.startswith("moeprof"):
            raise
        raise ImportError(missing(f"moeprof.{name} works on models and", error.name)) from error
    value = getattr(module, name) if name in _LAZY else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, *_MODULES, "routers"]
