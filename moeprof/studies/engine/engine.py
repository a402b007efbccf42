"""Which engine runs the cells of a study, and what it tells while it does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..store.cells import Subject

if TYPE_CHECKING:
    from rich.console import Console

    from ..store.cells import Cell
    from ..store.store import Store
    from .work import Work


@dataclass
class Listener:
    """What is done while cells are run; each does nothing unless it is given.

    begin : called before a cell is run
    done : with a cell, its result, and whether it was run now (or found in the store)
    step : as the cells are run, as often as `Work.steps` says in all
    lost : with a sentence, when a worker died and its cell goes to another
    """

    begin: Callable[[Cell], object] = lambda cell: None
    done: Callable[[Cell, dict[str, Any], bool], object] = lambda cell, result, ran: None
    step: Callable[[], object] = lambda: None
    lost: Callable[[str], object] = lambda sentence: None


def announce(console: Console, store: Store, work: Work) -> None:
    """What a person has to know of a store before anything is run."""
    announce_store(console, store)
    announce_done(console, store, work)
    for what, count in store.others(work.cells[0].kind, work.subject).items():
        cells = f"{count} cell{'s' if count > 1 else ''}"
        console.print(f"{store.path} also has {cells} of another {what}: kept, not used")


def announce_store(console: Console, store: Store) -> None:
    """Whether it was damaged."""
    if store.set_aside is not None:
        console.print(f"The store was damaged. It is kept as {store.set_aside}, a new one is begun")


def announce_done(console: Console, store: Store, work: Work) -> None:
    """How many of the cells are finished."""
    done = sum(store.find(cell, work.subject) is not None for cell in work.cells)
    if done:
        console.print(
            f"Of {len(work.cells)} cells {done} are finished, in {store.path}: give another "
            "--store to run them again"
        )


def apart(
    work: Work, cells: Sequence[Cell], store: Store
) -> tuple[list[Cell], list[Cell], list[Cell]]:
    """(finished, to be run side by side, to be run alone) of the cells."""
    found: list[Cell] = []
    shared: list[Cell] = []
    alone: list[Cell] = []
    for cell in cells:
        done = store.find(cell, work.subject) is not None
        (found if done else alone if cell.alone else shared).append(cell)
    return found, shared, alone


def check_same(here: Subject, wanted: Subject) -> None:
    """ValueError where a worker would measure something else than was asked for."""
    for what, a, b in zip(Subject._fields, here, wanted, strict=True):
        if a != b:
            raise ValueError(
                f"a worker has another {what} than the process that began the study, so its "
                f"results would be of something else ({a[:60]}, expected {b[:60]})"
            )


class Engine(Protocol):
    """Runs cells until each is finished."""

    def run(self, work: Work, cells: Sequence[Cell], store: Store, listener: Listener) -> None:
        """Each of `cells` exactly once in `store`; a cell that is there already isn't run."""
        ...
