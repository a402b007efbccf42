"""The files of a run: each appears whole or not at all, and holds everything finished so far."""

import io
import json
import math
import os
from pathlib import Path

from ..files import write_whole

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


def results_frame(results):
    """A pandas table with a row for each result dict: COLUMNS first, then the other fields."""
    import pandas

    frame = pandas.DataFrame(results)
    return frame[[*COLUMNS, *(name for name in frame.columns if name not in COLUMNS)]]


class Store:
    """The folder that a run's files are written to; made and tried out when this is created.

    Raises OSError when the folder can't be made or written to.
    """

    def __init__(self, folder):
        folder = Path(folder)
        self.json = folder / "bh_routing_full_results.json"
        self.csv = folder / "bh_routing_summary.csv"
        self.report = folder / "bh_routing_report.md"
        self.figure = folder / "visualizations" / "bh_routing_analysis.png"
        try:
            self.figure.parent.mkdir(parents=True, exist_ok=True)
            for place in (folder, self.figure.parent):
                probe = place / f".{os.getpid()}.part"
                probe.write_bytes(b"")
                probe.unlink()
        except OSError as error:
            raise OSError(f"output folder {folder} can't be written: {error.strerror}") from error

    def save_results(self, run):
        """Write the JSON and the CSV. run: {…, "results": [result dicts]}."""
        text = json.dumps(finite(run), indent=1, ensure_ascii=False, allow_nan=False)
        write_whole(self.json, text.encode() + b"\n")
        table = results_frame(run["results"])[list(COLUMNS)]
        write_whole(self.csv, table.to_csv(index=False).encode())

    def save_report(self, text, figure):
        """Write the report (Markdown) and the figure (matplotlib) as a PNG."""
        image = io.BytesIO()
        figure.savefig(image, format="png")
        write_whole(self.figure, image.getvalue())
        write_whole(self.report, text.encode())


def finite(value):
    """`value` with None for every NaN and infinity, as JSON has no word for them."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
