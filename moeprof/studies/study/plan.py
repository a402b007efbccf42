"""What a study will take, told before anything is run."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from ...measure.machine import peak_memory
from ...show.console import WIDTH, text_console
from ...show.tables import table
from ..engine.staged import Staged, recall

if TYPE_CHECKING:
    from ..store.store import Store
    from .costs import Costs
    from .parts import Part


class PlannedPart(NamedTuple):
    """A part; cells and finished: how many; tokens, seconds: of those that aren't finished."""

    name: str
    cells: int
    finished: int
    tokens: float
    seconds: float
    peak_bytes: float


class StudyPlan(NamedTuple):
    """The parts in order; printed, it is a table."""

    parts: list[PlannedPart]

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts)

    def __str__(self) -> str:
        forms = {"cells": "{}", "finished": "{}", "tokens": "{:,.0f}", "time": "{:>12}"}
        columns = {"part": "{}", **forms, "peak memory": "{:.1f} GB"}
        whole = PlannedPart(
            "all",
            sum(part.cells for part in self.parts),
            sum(part.finished for part in self.parts),
            sum(part.tokens for part in self.parts),
            self.seconds,
            max(part.peak_bytes for part in self.parts),
        )
        rows = [
            (p.name, p.cells, p.finished, p.tokens, in_words(p.seconds), p.peak_bytes / 1e9)
            for p in [*self.parts, whole]
        ]
        file = io.StringIO()
        text_console(file, WIDTH).print(table(columns, rows))
        lines = [line.rstrip() for line in file.getvalue().splitlines()]
        return "\n".join([*lines, "", NOTE])


NOTE = (
    "Times are of passes that were measured just now, on one window; tokens are counted once for "
    "each time that they are read. A budget is taken to be found in 2 passes; it may take 1 to 4."
)


def plan(parts: Iterable[Part], costs: Costs, store: Store) -> StudyPlan:
    """A StudyPlan of parts; what is in the store is finished."""
    return StudyPlan([_planned(part, costs, store) for part in parts])


def _planned(part: Part, costs: Costs, store: Store) -> PlannedPart:
    work = part.work
    if isinstance(work, Staged):
        recall(work, store)
    cells = work.planned()
    named = {cell.name for cell in work.cells}  # of the others a result has to say more
    left = [c for c in cells if c.name not in named or store.find(c, work.subject) is None]
    loads = [load for cell in left for load in work.load(cell)]
    return PlannedPart(
        part.name,
        len(cells),
        len(cells) - len(left),
        sum(load.tokens for load in loads),
        sum(map(costs.seconds, loads)),
        peak_memory() + work.kept_bytes,
    )


def in_words(seconds: float) -> str:
    """ "35 s", "12 min", "3 h 20 min"."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"
