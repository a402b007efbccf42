"""A grid: which routers are run, on which models and texts, as one object or one TOML file.

grid = Grid.read("bh-21")
print(grid.configurations(64, 8))
rows = run_grid(grid, store)
grid_frame(rows)
"""

from typing import TYPE_CHECKING

from ...late import exports

if TYPE_CHECKING:
    from .planned import Configuration, Planned
    from .rows import COLUMNS, grid_frame
    from .run import run_grid
    from .settings import Grid
    from .work import GridWork, TimesWork

__all__ = [
    "COLUMNS",
    "Configuration",
    "Grid",
    "GridWork",
    "Planned",
    "TimesWork",
    "grid_frame",
    "run_grid",
]

__getattr__ = exports(
    __name__,
    {
        "COLUMNS": "rows",
        "Configuration": "planned",
        "Grid": "settings",
        "GridWork": "work",
        "Planned": "planned",
        "TimesWork": "work",
        "grid_frame": "rows",
        "run_grid": "run",
    },
)


def __dir__() -> list[str]:
    return __all__
