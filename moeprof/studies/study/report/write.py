"""Writing the report of a study."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from ....files import check_folder, write_whole
from ....show.console import make_console, progress
from . import pareto, parts, ran, verdict
from .content import Report
from .markdown import as_markdown
from .page import as_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

    from .results import Results


FIGURES = "figures"


def write_report(results: Results, folder: Path, console: Console | None = None) -> list[Path]:
    """Write report.md, index.html and figures/*.png; returns their paths.

    folder : that of the study, with the parts' own folders, whose files are linked. Each file
    appears whole or not at all. console : where a bar is shown. OSError where the folder can't
    be written.
    """
    check_folder(folder / FIGURES)
    report = make_report(results, folder)
    paths = {drawn.key: f"{FIGURES}/{drawn.key}.png" for drawn in report.drawn()}
    files = {}
    with progress(console or make_console(), len(paths), "the report", "figures") as bar:
        for drawn in report.drawn():
            files[paths[drawn.key]] = _png(drawn.figure)
            bar.step(0.5)  # and once more on the page
        files["report.md"] = as_markdown(report, paths).encode()
        files["index.html"] = as_page(report, lambda: bar.step(0.5)).encode()
    (folder / FIGURES).mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_whole(folder / name, data)
    return [folder / name for name in files]


def make_report(results: Results, folder: Path) -> Report:
    """The Report over all parts; folder: where their files are."""
    sections = [
        verdict.section(results),
        *pareto.sections(results),
        *parts.sections(results, folder),
        *ran.sections(results),
    ]
    return Report(f"Study of {results.facts['model']}", sections)


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()
