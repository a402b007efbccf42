"""The experiment: the model's own top-k against BH routing, in 21 configurations.

    results = [moeprof.run_configuration("topk_8_baseline", prompts, complexities)]
    results_frame(results); figure(results)

`sweep` runs all of them and writes the files; `moeprof sweep` calls it.
"""

from .configurations import Configuration, configurations, dropped_max_ks
from .plots import figure
from .report import report
from .runner import COMPLEXITIES, Experiment, run_configuration
from .store import COLUMNS, Store, results_frame
from .sweep import sweep

__all__ = [
    "COLUMNS",
    "COMPLEXITIES",
    "Configuration",
    "Experiment",
    "Store",
    "configurations",
    "dropped_max_ks",
    "figure",
    "report",
    "results_frame",
    "run_configuration",
    "sweep",
]
