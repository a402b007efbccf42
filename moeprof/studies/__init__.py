"""Questions about a model that take many runs: sweep, comparison, diagnosis, budget."""

from typing import TYPE_CHECKING

from ..late import exports

if TYPE_CHECKING:
    from .grid import Grid
    from .study.run import run_study

__all__ = ["Grid", "run_study"]

__getattr__ = exports(__name__, {"Grid": "grid", "run_study": "study.run"})


def __dir__() -> list[str]:
    return __all__
