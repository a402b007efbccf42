"""The command: everything measured, printed, and written where it belongs."""

import math
import textwrap
import time

from ..console import WIDTH, progress
from .effects import ROUTER, STATIC
from .findings import findings
from .plots import figure
from .report import console_tables, report


def compare(comparison, store, facts, console):
    """Run a Comparison and write the four files of a Store.

    facts: a dict that goes into the JSON as it is. Returns the run, a dict as in the JSON. When
    it is interrupted, what is finished is written and KeyboardInterrupt goes on.
    """
    begun = time.monotonic()

    def run():
        seconds = time.monotonic() - begun
        return facts | comparison.describe() | {"seconds": round(seconds, 1)}

    total = comparison.steps()
    console.print(f"Cells: {total}")
    with progress(console, total, "compare") as bar:
        shown = _Lines(console)

        def after(cell):
            bar.step()
            shown.add(cell)
            store.save_now_and_then(run)

        comparison.after = after
        try:
            comparison.run()
        except KeyboardInterrupt:
            done = len(comparison.static) + len(comparison.cells)
            console.print(f"Interrupted: {done} of {total} cells are finished")
            if comparison.static:
                _finish(comparison, run, store, console)
            raise
    return _finish(comparison, run, store, console)


def _finish(comparison, run, store, console):
    comparison.analyse()
    result = run()
    store.save(result)
    store.save_report(report(result), figure(result))
    for part in console_tables(result):
        if isinstance(part, str):
            part = textwrap.fill(part, WIDTH)
        console.print(part, width=min(WIDTH, console.width))
    if comparison.cells:
        for line in findings(result):
            console.print(textwrap.fill(f"- {line}", WIDTH, subsequent_indent="  "))
    for path in store.files:
        console.print(f"Written: {path}")
    return result


class _Lines:
    """A line on the console for each router and allocation: KL at its budgets."""

    def __init__(self, console):
        self.console, self.about, self.parts = console, None, []

    def add(self, cell):
        if cell["role"] not in (ROUTER, STATIC):
            return
        name = f"{cell['contender']}, {cell['allocation']}"
        about = f"{cell['table']}: {name}" if cell["table"] else name
        if about != self.about:
            self.flush()
            self.about = about
        value = cell.get("kl", math.nan)
        self.parts.append(f"{cell['budget']}: {value:.3f}" if "kl" in cell else
                          f"{cell['budget']}: out of reach")  # fmt: skip
        self.console.print(f"{about}, budget {self.parts[-1]}")

    def flush(self):
        self.parts = []
