"""The command: everything measured, printed, and written where it belongs."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...checks import check_type
from ...show.console import WIDTH, progress
from .effects import QUANTIZED, ROUTER, STATIC
from .findings import findings
from .plots import figure
from .report import console_tables, report
from .runner import Comparison

if TYPE_CHECKING:
    from rich.console import Console

    from .files import ComparisonFiles
    from .runner import Comparison


def compare(
    comparison: Comparison, files: ComparisonFiles, facts: dict[str, Any], console: Console
) -> dict[str, Any]:
    """Run a Comparison and write the four `ComparisonFiles`.

    facts: a dict that goes into the JSON as it is. Returns the run, a dict as in the JSON. When
    it is interrupted, what is finished is written and KeyboardInterrupt goes on.
    """
    check_type("compare: comparison", comparison, Comparison, "a Comparison")
    comparison.check_text()
    begun = time.monotonic()

    def run() -> dict[str, Any]:
        seconds = time.monotonic() - begun
        return facts | comparison.describe() | {"seconds": round(seconds, 1)}

    total = comparison.steps()
    console.print(f"Cells: {total}")
    with progress(console, total, "compare") as bar:

        def after(cell: dict[str, Any]) -> None:
            bar.step()
            if cell["role"] in (ROUTER, STATIC, QUANTIZED):
                console.print(_line(cell))
            files.save_now_and_then(run)

        comparison.after = after
        try:
            comparison.run()
        except KeyboardInterrupt:
            done = len(comparison.static) + len(comparison.quantized) + len(comparison.cells)
            console.print(f"Interrupted: {done} of {total} cells are finished")
            if comparison.static:
                _finish(comparison, run, files, console)
            raise
    return _finish(comparison, run, files, console)


def _finish(
    comparison: Comparison,
    run: Callable[[], dict[str, Any]],
    files: ComparisonFiles,
    console: Console,
) -> dict[str, Any]:
    comparison.analyse()
    result = run()
    files.save(result)
    files.save_report(report(result), figure(result))
    for part in console_tables(result):
        if isinstance(part, str):
            part = textwrap.fill(part, WIDTH)
        console.print(part, width=min(WIDTH, console.width))
    if comparison.cells:
        for line in findings(result):
            console.print(textwrap.fill(f"- {line}", WIDTH, subsequent_indent="  "))
    for path in files.paths:
        console.print(f"Written: {path}")
    return result


def _line(cell: dict[str, Any]) -> str:
    """What the console says of a finished cell."""
    about = f"{cell['table']}: " if cell["table"] else ""
    about += f"{cell['contender']}, {cell['allocation']}, budget {cell['budget']}"
    return f"{about}: KL {cell['kl']:.4f}" if "kl" in cell else f"{about}: out of reach"
