"""The files of a run: each appears whole or not at all, and holds everything finished so far."""

from __future__ import annotations

import io
import json
import os
from typing import TYPE_CHECKING, Any

from ...files import as_csv, check_folder, finite, write_whole
from ..store.folder import Folder

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


COLUMNS = (
    "config",
    "routing_type",
    "alpha",
    "max_k",
    "avg_experts",
    "avg_experts_simple",
    "avg_experts_medium",
    "avg_experts_complex",
    "avg_experts_technical",
    "reduction_pct",
    "perplexity",
    "delta_perplexity",
    "bits_per_byte",
    "token_agreement",
    "tokens_per_s",
    "seconds",
)


def results_frame(results: list[dict[str, Any]]) -> pandas.DataFrame:
    """A pandas table with a row for each result dict: COLUMNS first, then the other fields."""
    import pandas

    frame = pandas.DataFrame(results)
    return frame[[*COLUMNS, *(name for name in frame.columns if name not in COLUMNS)]]


QUALITY = (
    "config",
    "avg_experts_heldout",
    "perplexity",
    "bits_per_byte",
    "bits_above_own",
    "bits_above_own_low",
    "bits_above_own_high",
    "bits_above_static",
    "bits_above_static_low",
    "bits_above_static_high",
)


class SweepFiles(Folder):
    """The files of a sweep."""

    def __init__(
        self, folder: str | os.PathLike[str], store: str | os.PathLike[str] | None = None
    ) -> None:
        super().__init__(folder, store)
        self.json = self.folder / "bh_routing_full_results.json"
        self.csv = self.folder / "bh_routing_summary.csv"
        self.quality = self.folder / "bh_routing_quality.csv"
        self.null = self.folder / "bh_routing_null.npz"  # only where the run fitted one
        self.report = self.folder / "bh_routing_report.md"
        self.figure = self.folder / "visualizations" / "bh_routing_analysis.png"
        check_folder(self.figure.parent)

    def save_results(self, run: dict[str, Any]) -> None:
        """Write the JSON and both tables. run: {…, "results": [result dicts]}."""
        self.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(finite(run), indent=1, ensure_ascii=False, allow_nan=False)
        write_whole(self.json, text.encode() + b"\n")
        table = results_frame(run["results"])[list(COLUMNS)]
        write_whole(self.csv, as_csv(table))
        write_whole(self.quality, as_csv(_quality(run)))

    def save_report(self, text: str, figure: Figure) -> None:
        """Write the report (Markdown) and the figure (matplotlib) as a PNG."""
        self.figure.parent.mkdir(parents=True, exist_ok=True)
        image = io.BytesIO()
        figure.savefig(image, format="png")
        write_whole(self.figure, image.getvalue())
        write_whole(self.report, text.encode())


def _quality(run: dict[str, Any]) -> pandas.DataFrame:
    """The held-out text alone: the grid, static top-k and what budgets set, a row each."""
    import pandas

    rows = [*run["results"], *run.get("static", ()), *run.get("budgets", ())]
    rows = [row for row in rows if "nats_by_document" in row]
    return pandas.DataFrame([{name: row.get(name) for name in QUALITY} for row in rows])
