"""Runs the study into a store and writes what it says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...show.console import fill, progress, width
from ..engine.engine import Engine, Listener, announce
from ..engine.serial import Serial
from .report import LEGEND, HarnessFiles, by_task, rows_of, table_of, title

if TYPE_CHECKING:
    from rich.console import Console

    from ...show.console import Bar
    from ..store.cells import Cell
    from ..store.store import Store
    from .work import HarnessWork


def run_harness(
    work: HarnessWork,
    store: Store,
    files: HarnessFiles,
    facts: Mapping[str, Any],
    console: Console,
    engine: Engine | None = None,
) -> list[dict[str, Any]]:
    """Run the cells that aren't in the store yet, then write the files and print the table.

    facts : what the files say of model, machine and command. Returns the rows, see `rows_of`.
    However it ends, what was finished is in the files.
    """
    results: dict[str, dict[str, Any]] = {}
    announce(console, store, work)
    total = sum(work.steps(cell) for cell in work.cells)
    try:
        with progress(console, total, "tasks", "requests") as bar:
            listener = _listener(results, bar, console)
            (engine or Serial()).run(work, work.cells, store, listener)
    finally:
        rows = rows_of(work, results)
        if rows:
            paths = files.save(facts, rows, results)
            for of_task in by_task(rows).values():
                console.print("")
                console.print(title(of_task))
                console.print(table_of(of_task), width=width(console))
            console.print(fill(LEGEND))
            for path in paths:
                console.print(f"Written: {path}")
    return rows


def _listener(results: dict[str, dict[str, Any]], bar: Bar, console: Console) -> Listener:
    def done(cell: Cell, result: dict[str, Any], ran: bool) -> None:
        results[cell.name] = result
        console.print(f"{'Finished' if ran else 'In the store'}: {cell.name}")

    return Listener(lambda cell: bar.note(cell.name), done, bar.step, console.print)
