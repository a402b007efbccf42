"""What a study will take, told before anything is run."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ...measure.machine import peak_memory
from ...show.console import printed
from ...show.tables import RIGHT, table
from ..engine.staged import Staged, recall
from .files import finished

if TYPE_CHECKING:
    from ..store.store import Store
    from .costs import Costs
    from .parts import Part


class PlannedPart(NamedTuple):
    """A part; cells and finished: how many; tokens, seconds: of those that aren't finished.

    failed : why it can't be run, or None
    """

    name: str
    cells: int = 0
    finished: int = 0
    tokens: float = 0
    seconds: float = 0
    peak_bytes: float = 0
    failed: str | None = None

    @property
    def is_done(self) -> bool:
        return self.failed is None and self.finished == self.cells


class StudyPlan(NamedTuple):
    """The parts in order; printed, it is a table."""

    parts: list[PlannedPart]

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts)

    def __str__(self) -> str:
        forms = {"cells": "{:d}", "finished": "{:d}", "tokens": "{:,.0f}", "time": RIGHT}
        columns = {"part": "{}", **forms, "peak memory": "{:.1f} GB"}
        known = [part for part in self.parts if part.failed is None]
        rows = [
            (p.name, p.cells, p.finished, p.tokens, in_words(p.seconds), p.peak_bytes / 1e9)
            for p in [*known, _whole(known)]
        ]
        failed = [f"{p.name} can't be run: {p.failed}" for p in self.parts if p.failed]
        return printed([table(columns, rows), *failed, NOTE])


NOTE = (
    "Times are of passes that were measured just now, on one window, in one process. Tokens are "
    "counted each time that they are read. A budget is taken to be found in 2 passes; it may take "
    "1 to 4."
)


def _whole(parts: list[PlannedPart]) -> PlannedPart:
    """All of them together."""
    return PlannedPart(
        "all",
        sum(part.cells for part in parts),
        sum(part.finished for part in parts),
        sum(part.tokens for part in parts),
        sum(part.seconds for part in parts),
        max((part.peak_bytes for part in parts), default=0),
    )


def plan_part(part: Part, costs: Costs, store: Store) -> PlannedPart:
    """A PlannedPart; what is in the store is finished."""
    work = part.work
    if isinstance(work, Staged):
        recall(work, store)
    cells = work.planned()
    named = {cell.name for cell in work.cells}  # of the others a result has to say more
    left = [c for c in cells if c.name not in named or store.find(c, work.subject) is None]
    if part.files is not None and finished(part.files, store) is None:
        left = list(cells)
    loads = [load for cell in left for load in work.load(cell)]
    return PlannedPart(
        part.name,
        len(cells),
        len(cells) - len(left),
        sum(map(costs.tokens, loads)),
        sum(map(costs.seconds, loads)),
        peak_memory() + work.kept_bytes,
    )


def in_words(seconds: float) -> str:
    """ "35 s", "12 min", "3 h 20 min"."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"
