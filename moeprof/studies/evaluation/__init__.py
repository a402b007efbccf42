"""How well a model predicts any text, as it is and under other routers: `moeprof evaluate`."""

from .result import Evaluated
from .run import evaluate

__all__ = ["Evaluated", "evaluate"]
