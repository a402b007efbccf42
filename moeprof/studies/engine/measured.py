"""What studies share whose cells are each measured by a function of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..store.cells import Cell
from .load import Load

Measure = Callable[[Callable[[], object]], dict[str, Any]]  # of `step`


class _Run(NamedTuple):
    """How a cell is run: a function of `step`, how often it calls that, what it takes."""

    measure: Measure
    steps: int
    load: Sequence[Load]


class Measured:
    """`steps`, `load` and `run` of a `Work` for cells that `cell` makes; their names differ."""

    kind = ""  # of its cells

    def __init__(self) -> None:
        self._runs: dict[str, _Run] = {}

    def cell(
        self,
        name: str,
        measure: Measure,
        steps: int,
        load: Sequence[Load] = (),
        *,
        alone: bool = False,
        **parameters: Any,
    ) -> Cell:
        """A cell that `measure` runs, which calls its `step` so often; load: what it takes."""
        self._runs[name] = _Run(measure, steps, load)
        return Cell(self.kind, name, parameters, alone)

    def steps(self, cell: Cell) -> int:
        return self._runs[cell.name].steps

    def load(self, cell: Cell) -> Sequence[Load]:
        return self._runs[cell.name].load

    def run(self, cell: Cell, step: Callable[[], object]) -> dict[str, Any]:
        return self._runs[cell.name].measure(step)
