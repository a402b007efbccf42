"""The experiment: the model's own top-k against BH routing, in 21 configurations.

    results = [moeprof.run_configuration("topk_8_baseline", prompts, complexities)]
    results_frame(results); figure(results)

`sweep` runs all of them and writes the files; `moeprof sweep` calls it.
"""

from typing import TYPE_CHECKING

from ...late import exports

if TYPE_CHECKING:
    from .files import COLUMNS, SweepFiles, results_frame
    from .grid import Configuration, configurations, dropped_max_ks
    from .plots import figure
    from .run import sweep
    from .runner import Experiment, run_configuration

__all__ = [
    "COLUMNS",
    "Configuration",
    "Experiment",
    "SweepFiles",
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
        "COLUMNS": "files",
        "Configuration": "grid",
        "Experiment": "runner",
        "SweepFiles": "files",
        "configurations": "grid",
        "dropped_max_ks": "grid",
        "figure": "plots",
        "results_frame": "files",
        "run_configuration": "runner",
        "sweep": "run",
    },
)
