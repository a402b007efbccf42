"""The command: everything measured, printed, and written where it belongs."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from ...checks import check_type
from ...show.console import fill, progress, width
from ..engine.engine import Listener, announce
from ..engine.staged import recall, run_stages
from ..store.store import Store
from .effects import QUANTIZED, ROUTER, STATIC
from .findings import findings, foremost, in_digits
from .plots import figure
from .report import console_tables, report
from .work import Comparison

if TYPE_CHECKING:
    from rich.console import Console

    from ..engine.engine import Engine
    from ..store.cells import Cell
    from .files import ComparisonFiles

PRINTED = 4  # findings, at least: all of `foremost` are


def compare(
    comparison: Comparison,
    files: ComparisonFiles,
    facts: dict[str, Any],
    console: Console,
    *,
    store: Store | None = None,
    engine: Engine | None = None,
) -> dict[str, Any]:
    """Run a Comparison and write the `ComparisonFiles`.

    facts: a dict that goes into the JSON as it is; store: a Store, `files.store` when not given;
    engine: what runs the cells, this process when not given. Returns the run, a dict as in the
    JSON. When it is interrupted, what is finished is written, and stays in the store, where the
    same call finds it, and KeyboardInterrupt goes on.
    """
    check_type("compare: comparison", comparison, Comparison, "a Comparison")
    comparison.check_text()
    planned = comparison.planned()
    console.print(f"Cells: {len(planned)}")
    try:
        with (
            Store(files.store) if store is None else nullcontext(store) as store,
            progress(console, sum(map(comparison.steps, planned)), "compare", "texts") as bar,
        ):
            recall(comparison, store)
            announce(console, store, comparison)

            def done(cell: Cell, result: dict[str, Any], ran: bool) -> None:
                comparison.found[cell.name] = result
                for row in result.get("rows", ()):
                    if row["role"] in (ROUTER, STATIC, QUANTIZED):
                        console.print(_line(row))
                files.save_now_and_then(lambda: facts | comparison.describe())

            listener = Listener(lambda cell: bar.note(cell.name), done, bar.step, console.print)
            run_stages(comparison, store, listener, engine)
    except KeyboardInterrupt:
        console.print(f"Interrupted: {len(comparison.found)} of {len(planned)} cells are finished")
        if comparison.rows()["static"]:
            _finish(comparison, facts, files, console)
        raise
    return _finish(comparison, facts, files, console)


def _finish(
    comparison: Comparison, facts: dict[str, Any], files: ComparisonFiles, console: Console
) -> dict[str, Any]:
    result = facts | comparison.describe() | comparison.analysed()
    files.save(result)
    files.save_report(report(result), figure(result))
    for part in console_tables(result):
        if isinstance(part, str):
            part = fill(part)
        console.print(part, width=width(console))
    if result["cells"]:
        said = findings(result)
        printed = max(PRINTED, len(foremost(result)))
        for line in said[:printed]:
            console.print(fill(f"- {line}", rest="  "))
        if len(said) > printed:
            console.print(f"- {len(said) - printed} more: {files.report.name}")
    for path in files.paths:
        console.print(f"Written: {path}")
    return result


def _line(row: dict[str, Any]) -> str:
    """What the console says of a row."""
    about = f"{row['table']}: " if row["table"] else ""
    about += f"{row['contender']}, {row['allocation']}, budget {row['budget']}"
    return f"{about}: KL {in_digits(row['kl'])}" if "kl" in row else f"{about}: out of reach"
