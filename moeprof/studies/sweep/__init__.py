"""The experiment: the model's own top-k against BH routing, in 21 configurations.

    results = [moeprof.run_configuration("topk_8_baseline", prompts, complexities)]
    results_frame(results); figure(results)

`sweep` runs all of them and writes the files; `moeprof sweep` calls it.
"""

from typing import TYPE_CHECKING

from ...late import exports

if TYPE_CHECKING:
    from .grid import Configuration, configurations, dropped_max_ks
    from .plots import figure
    from .run import sweep
    from .runner import Experiment, run_configuration
    from .store import COLUMNS, Store, results_frame

__all__ = [
    "COLUMNS",
    "Configuration",
    "Experiment",
    "Store",
    "configurations",
    "dropped_max_ks",
    "figure",
    "results_frame",
    "run_configuration",
    "sweep",
]

# Nothing is imported before it is asked for: the command line wants the defaults alone.
__getattr__ = exports(
    __name__,
    {
        "COLUMNS": "store",
        "Configuration": "grid",
        "Experiment": "runner",
        "Store": "store",
        "configurations": "grid",
        "dropped_max_ks": "grid",
        "figure": "plots",
        "results_frame": "store",
        "run_configuration": "runner",
        "sweep": "run",
    },
)
