"""What studies share whose cells are each measured by a function of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ..store.cells import Cell

Measure = Callable[[Callable[[], object]], dict[str, Any]]  # of `step`


class _Run(NamedTuple):
    """How a cell is run: a function of `step`, and how often it calls that."""

    measure: Measure
    steps: int


class Measured:
    """`steps` and `run` of a `Work` for cells that are made by `cell`; their names differ."""

    kind = ""  # of its cells

    def __init__(self) -> None:
        self._runs: dict[str, _Run] = {}

    def cell(self, name: str, measure: Measure, steps: int, **parameters: Any) -> Cell:
        """A cell that `measure` runs, which calls its `step` so often."""
        self._runs[name] = _Run(measure, steps)
        return Cell(self.kind, name, parameters)

    def steps(self, cell: Cell) -> int:
        return self._runs[cell.name].steps

    def run(self, cell: Cell, step: Callable[[], object]) -> dict[str, Any]:
        return self._runs[cell.name].measure(step)
