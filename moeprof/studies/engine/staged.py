"""Studies in stages: what cells of the first gave says what cells come after them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from .serial import Serial
from .work import Work

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..store.cells import Cell
    from ..store.store import Store
    from .engine import Engine, Listener


@runtime_checkable
class Staged(Work, Protocol):
    """Work whose `cells` are those that can be named with what is `found` so far.

    A result that a cell of a later stage needs stands among its parameters, so that `run` needs
    nothing of what is found: it runs on work that was made anew.
    """

    found: dict[str, dict[str, Any]]  # {name of a cell: its result}


def recall(work: Staged, store: Store) -> None:
    """Take over what is stored, so that `work.cells` are all that can be named."""
    while new := [cell for cell in work.cells if cell.name not in work.found]:
        results = {cell.name: store.find(cell, work.subject) for cell in new}
        stored = {name: result for name, result in results.items() if result is not None}
        work.found |= stored
        if not stored:
            return


def run_stages(
    work: Staged, store: Store | None, listener: Listener, engine: Engine | None = None
) -> None:
    """Every cell, stage by stage; `listener.done` has to write into `work.found`.

    store: None to keep nothing; the cells are then run in this process. engine: what runs them,
    this process when not given.
    """
    asked: set[str] = set()
    while cells := [cell for cell in work.cells if cell.name not in asked]:
        if store is None:
            _run(work, cells, listener)
        else:
            (engine or Serial()).run(work, cells, store, listener)
        asked |= {cell.name for cell in cells}


def _run(work: Work, cells: Sequence[Cell], listener: Listener) -> None:
    for cell in cells:
        listener.begin(cell)
        listener.done(cell, work.run(cell, listener.step), True)
