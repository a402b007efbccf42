"""A profile as a tidy table: one number a row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from .metrics import BY_EXPERT, SCALARS

if TYPE_CHECKING:
    import pandas

    from .metrics import LayerMetrics
    from .types import Label, Profiled


ALL = "all"  # the name of all phases together
COLUMNS = ["layer", "name", "block", "expert", "phase", "metric", "value"]
# Of all layers together, methods of Profile.
WHOLE = ("load_balance_loss", "load_balance_loss_by_layer", "z_loss")
# {key of a row of Profile.decode_by_batch: its metric}
BY_BATCH = {
    "steps": "steps",
    "k": "k_mean",
    "unique_experts": "unique_experts_mean",
    "latency_ms": "latency_ms_p50",
    "bytes": "bytes_per_step",
}


def to_frame(profile: Profiled) -> pandas.DataFrame:
    """See Profile.to_frame. value is a float; expert is pandas' Int64, so is
    layer where all labels are numbers."""
    import pandas

    rows = []
    for phase in (*profile.phases, ALL):
        rows += [(None, None, None, None, phase, m, getattr(profile, m)(phase)) for m in WHOLE]
        for label, metrics in zip(profile.labels, profile.each(phase), strict=True):
            rows += _of_layer(label, metrics, phase)
    if len(profile.decode_by_batch) > 1:
        rows += [
            (None, None, None, None, f"decode_batch_{row['batch']}", metric, row[key])
            for row in profile.decode_by_batch
            for key, metric in BY_BATCH.items()
        ]
    missing = profile.facts.get("not_counted") or []
    rows += [(u["label"], None, u["block"], None, ALL, "not_counted", 1) for u in missing]
    peak = profile.facts.get("memory_peak_mb")
    rows.append((None, None, None, None, ALL, "memory_peak_mb", peak))
    peaks = [row["memory_peak_mb"] for row in profile.facts.get("devices") or []]
    if peaks and None not in peaks:
        rows.append((None, None, None, None, ALL, "device_memory_peak_mb", sum(peaks)))
    frame = pandas.DataFrame(rows, columns=COLUMNS)
    labels = [*profile.labels, *(u["label"] for u in missing)]
    kinds = {
        "layer": label_kind(labels),
        "name": "string",
        "block": "string",
        "expert": "Int64",
        "value": float,
    }
    return frame.astype(kinds)


def label_kind(labels: Iterable[Label]) -> str:
    """The dtype of a column of layers' labels."""
    return "Int64" if all(isinstance(label, int) for label in labels) else "string"


def _of_layer(label: Label, metrics: LayerMetrics, phase: str) -> Iterator[tuple[Any, ...]]:
    place = label, metrics.layer.name, metrics.layer.block
    for name in SCALARS:
        yield *place, None, phase, name, getattr(metrics, name)
    for experts, tokens in enumerate(metrics.k_distribution):
        if tokens:
            yield *place, None, phase, f"k_distribution_{experts}", tokens
    for name in BY_EXPERT:
        for expert, value in enumerate(getattr(metrics, name)):
            yield *place, expert, phase, name, value
