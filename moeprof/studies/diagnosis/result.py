"""A diagnosis as it is handed over: numbers, tables in words, figures, files."""

from __future__ import annotations

import html
import io
import json
import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...files import as_csv, check_folder, finite, printable, write_whole
from .rows import COLUMNS

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


NAME = "diagnosis"


class Diagnosis:
    """What `diagnose` measured: tables, figures and findings.

    facts : dict of model, null, router, machine, versions and text
    """

    def __init__(self, rows: Iterable[dict[str, Any]], facts: dict[str, Any]) -> None:
        self._rows, self.facts = list(rows), facts

    def to_frame(self, table: str | None = None) -> pandas.DataFrame:
        """A pandas table with a row for each number and its interval.

        Columns
        -------
        table: "histogram", "pi0", "flatness", "quantiles", "cdf", "selection", "transfer", "fdp",
            "fdp curve", "joint"; routing: "stock", "patched", for transfer the domain of the
            null, for fdp and joint the router; layer: -1 is the mean of all, for "false of all"
            all together; quantity; at: the bin's left edge, lambda, probability, p, domain, delta
            or rank; estimate; error: of the bootstrap; low, high: pointwise 95 % interval;
            band_low, band_high: max-|t| band over the table's layer, for "selection", "fdp" and
            "fdp curve" over all layers. NaN where there is no interval.

        table: only that table's rows. ValueError if there is no such.
        """
        frame = self._frame
        if table is None:
            return frame.copy()
        if table not in self.tables:
            raise ValueError(f"table: expected one of {sorted(self.tables)}, got {table!r}")
        return frame[frame["table"] == table].drop(columns="table").reset_index(drop=True)

    @cached_property
    def _frame(self) -> pandas.DataFrame:
        import pandas

        return pandas.DataFrame(self._rows, columns=list(COLUMNS))

    @property
    def tables(self) -> list[str]:
        """The names that `to_frame` takes."""
        return list(dict.fromkeys(row["table"] for row in self._rows))

    @property
    def figures(self) -> list[str]:
        """The names that `figure` takes."""
        return ["p_values", "selection", *(["ablation"] if "fdp" in self.tables else [])]

    def figure(self, name: str = "p_values") -> Figure:
        """A matplotlib Figure: "p_values", "selection" or "ablation". ValueError otherwise."""
        from . import plots

        if name not in self.figures:
            raise ValueError(f"figure: expected one of {', '.join(self.figures)}, got {name!r}")
        return getattr(plots, name)(self)

    def summary(self) -> str:
        """The tables and the findings as text, at most 100 columns wide."""
        from .views import as_text

        return as_text(self)

    def __repr__(self) -> str:
        return f"<moeprof Diagnosis: {self.facts['router']} on {printable(self.facts['model'])}>"

    def _repr_html_(self) -> str:
        from .views import findings, views

        parts = [f"<p>{html.escape(line)}</p>" for line in findings(self)]
        for view in views(self):
            parts.append(f"<h4>{html.escape(view.title)}</h4><p>{html.escape(view.note)}</p>")
            parts.append(view.frame.to_html(index=False))
        return "\n".join(parts)

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write diagnosis.json, .csv, .md and a PNG for each figure; returns their paths.

        Each appears whole or not at all; a figure there that this one lacks is removed. OSError
        where the folder can't be written.
        """
        from .views import as_markdown

        folder = Path(folder)
        check_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        written = {}
        numbers = {"facts": self.facts, "rows": self._rows}
        text = json.dumps(finite(_plain(numbers)), indent=1, ensure_ascii=False, allow_nan=False)
        written[f"{NAME}.json"] = text.encode() + b"\n"
        written[f"{NAME}.csv"] = as_csv(self.to_frame())
        written[f"{NAME}.md"] = as_markdown(self).encode()
        for name in self.figures:
            image = io.BytesIO()
            self.figure(name).savefig(image, format="png")
            written[f"{NAME}_{name}.png"] = image.getvalue()
        for name, data in written.items():
            write_whole(folder / name, data)
        if "ablation" not in self.figures:  # that of another diagnosis, saved there before
            (folder / f"{NAME}_ablation.png").unlink(missing_ok=True)
        return [folder / name for name in written]


def _plain(value: Any) -> Any:
    """NumPy scalars as Python's own, which JSON knows."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.item() if hasattr(value, "item") else value
