"""A grid from its first model to its last: one model in memory at a time."""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

from ...checks import check_type
from ...models.blocks import experts_of
from ...show.console import make_console, progress
from ..engine.engine import Listener, announce_done, announce_store
from ..engine.serial import Serial
from ..source import Source, source_name
from ..store.store import Store
from .rows import rows_of
from .settings import Grid
from .work import GridWork

if TYPE_CHECKING:
    from rich.console import Console

    from ..engine.engine import Engine


def run_grid(
    grid: Grid,
    store: Store,
    engine: Callable[[Source], Engine] | None = None,
    console: Console | None = None,
    *,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> list[dict[str, Any]]:
    """Run a grid and return its rows, as `grid_frame` takes them.

    What is wrong with a file that the grid names is a ValueError or OSError before anything is
    run. Times are taken last and in this process, whatever the engine.

    Parameters
    ----------
    grid : Grid
    store : Store
        Where finished cells are kept, and found again.
    engine : function of a Source, optional
        Gives the engine that runs the cells of that model. This process when not given.
    console : rich.console.Console, optional
    device : str
        That the models run on, as torch names it.
    trust_remote_code : bool
        Whether Python code that comes with a model may be run.

    Returns
    -------
    list of dict
    """
    check_type("run_grid: grid", grid, Grid, "a Grid")
    check_type("run_grid: store", store, Store, "a Store")
    console = console or make_console()
    grid.check()
    announce_store(console, store)
    rows = []
    for place, model in enumerate(grid.models):
        for bits in grid.bits:
            source = Source(
                source_name(model),
                grid.dtype,
                None if isinstance(bits, str) else bits,
                device,
                trust_remote_code,
            )
            run = _Run(grid, store, Serial() if engine is None else engine(source), console)
            rows += run.of_model(source, place, {"model": model, "bits": bits})
            gc.collect()  # a model has circles
    return rows


class _Run(NamedTuple):
    """What a grid is run with; its methods are of one model, of one text and seed, of a Work."""

    grid: Grid
    store: Store
    engine: Engine
    console: Console

    def of_model(self, source: Source, place: int, setting: dict[str, Any]) -> list[dict[str, Any]]:
        try:
            model, tokenizer = source.load()
        except (ValueError, OSError) as error:
            kind = OSError if isinstance(error, OSError) else ValueError
            raise self.grid.error(["models", place], str(error), kind) from None
        for line in self.grid.configurations(*experts_of(model)).dropped:
            self.console.print(f"Left out: {line}")
        rows = []
        for text, seed in product(self.grid.texts, self.grid.seeds):
            work = GridWork.of(self.grid, model, tokenizer, text, seed)
            rows += self._rows(work, setting | {"text": text, "seed": seed})
        return rows

    def _rows(self, work: GridWork, setting: dict[str, Any]) -> list[dict[str, Any]]:
        said = ", ".join(f"{name} {value}" for name, value in setting.items())
        self.console.print(f"{self.grid.name}: {said}: {len(work.cells)} configurations")
        announce_done(self.console, self.store, work)
        found = self._cells(work, self.engine)
        speeds: dict[str, list[float]] = {}
        if self.grid.repeats:
            times = work.times(found, self.grid.repeats, setting["seed"])
            speeds = self._cells(times, self.engine)["times"]["tokens_per_s"]
        return rows_of(work, found, speeds, setting)

    def _cells(self, work: Any, engine: Engine) -> dict[str, dict[str, Any]]:
        """{cell: result} of all cells of a Work."""
        found: dict[str, dict[str, Any]] = {}
        steps = sum(map(work.steps, work.cells))
        with progress(self.console, steps, self.grid.name, "texts") as bar:
            listener = Listener(
                lambda cell: bar.note(cell.name),
                lambda cell, result, ran: found.update({cell.name: result}),
                bar.step,
                self.console.print,
            )
            engine.run(work, work.cells, self.store, listener)
        return found
