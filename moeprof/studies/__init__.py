"""Questions about a model that take many runs: sweep, comparison, diagnosis, budget."""

from typing import TYPE_CHECKING

from ..late import exports

if TYPE_CHECKING:
    from .grid import Grid

__all__ = ["Grid"]

__getattr__ = exports(__name__, {"Grid": "grid"})


def __dir__() -> list[str]:
    return __all__
