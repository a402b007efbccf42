"""The files of a comparison; each appears whole or not at all."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...files import as_csv, finite, write_whole
from ..store.folder import Folder

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


EVERY = 15  # seconds between two writes of the raw results
DIGITS = 6  # of sums over a document's tokens in the JSON
COLUMNS = (
    "table",
    "role",
    "contender",
    "allocation",
    "budget",
    "bits",
    "status",
    "reason",
    "note",
    "parameter",
    "set_k",
    "average_k",
    "at_floor",
    "at_ceiling",
    "bytes_per_token",
    "kl",
    "nats",
    "perplexity",
    "agreement",
    "tokens_per_s",
    "tokens_per_s_low",
    "tokens_per_s_high",
)
LISTS = ("static", "quantized", "cells")  # of the JSON; older files have no "quantized"
INTERVAL = ("estimate", "low", "high", "band_low", "band_high")


class ComparisonFiles(Folder):
    """The files of a comparison."""

    def __init__(
        self, folder: str | os.PathLike[str], store: str | os.PathLike[str] | None = None
    ) -> None:
        super().__init__(folder, store)
        self.json = self.folder / "comparison.json"
        self.csv = self.folder / "comparison.csv"
        self.report = self.folder / "comparison_report.md"
        self.figure = self.folder / "comparison.png"
        self._written = time.monotonic()

    @property
    def paths(self) -> tuple[Path, ...]:
        return self.json, self.csv, self.report, self.figure

    def save_now_and_then(self, run: Callable[[], dict[str, Any]]) -> None:
        """`save`, unless it was just done. run: a function that gives the run."""
        if time.monotonic() - self._written >= EVERY:
            self.save(run())

    def save(self, run: dict[str, Any]) -> None:
        """Write JSON and CSV of a run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(finite(rounded(run)), ensure_ascii=False, allow_nan=False)
        write_whole(self.json, text.replace('{"table"', '\n{"table"').encode() + b"\n")
        write_whole(self.csv, as_csv(frame(run)))
        self._written = time.monotonic()

    def save_report(self, text: str, figure: Figure) -> None:
        """Write the report (Markdown) and the figure (matplotlib) as a PNG."""
        image = io.BytesIO()
        figure.savefig(image, format="png")
        write_whole(self.figure, image.getvalue())
        write_whole(self.report, text.encode())


def rounded(run: dict[str, Any]) -> dict[str, Any]:
    """The run with the sums by document to six digits: they are most of the file."""

    def cell(values: dict[str, Any]) -> dict[str, Any]:
        if "by_document" not in values:
            return values
        sums = {
            name: [round(value, DIGITS) for value in column]
            for name, column in values["by_document"].items()
        }
        return values | {"by_document": sums}

    return run | {name: [cell(values) for values in run[name]] for name in LISTS if name in run}


def frame(run: dict[str, Any]) -> pandas.DataFrame:
    """A pandas table with a row for each cell, the intervals of the effects in columns."""
    import pandas

    rows = []
    for cell in [cell for name in LISTS for cell in run.get(name, ())]:
        row = {name: cell.get(name) for name in COLUMNS}
        effects = {f"effect_{name}": value for name, value in cell.get("effect", {}).items()}
        effects |= {f"kl_against_{name}": v for name, v in cell.get("against", {}).items()}
        for name, value in effects.items():
            row |= {f"{name}_{end}" if end != "estimate" else name: value[end] for end in INTERVAL}
        for name, value in cell.get("level", {}).items():
            row |= {f"{name}_{end}": value[end] for end in ("low", "high")}
        rows.append(row)
    return pandas.DataFrame(rows)
