"""Two profiles of models of the same shape, and where they differ."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from ..files import printable
from ..models.phases import PHASES
from ..show.tables import Table
from .frame import ALL, WHOLE, label_kind
from .metrics import SCALARS
from .wording import PLAIN, counted, number, percent, short

if TYPE_CHECKING:
    import pandas

    from .metrics import LayerMetrics
    from .types import Profiled


COLUMNS = ["layer", "name", "block", "phase", "metric", "first", "second", "difference", "relative"]
LOADS = "expert_load_distance"  # half the sum of |differences| of expert_load: 0 alike, 1 disjoint
# (heading, metric, text of both values' difference)
SHOWN = (
    ("k", "k_mean", "+.2f"),
    ("Gini", "expert_load_gini", "+.3f"),
    ("conf", "router_confidence", "+.3f"),
    ("uniq", "unique_experts_mean", "+.1f"),
)


class ProfileComparison:
    """What the second of two profiles has more, or less, than the first.

    first, second : the two `Profile`. ValueError unless their models have as many MoE layers
        with as many experts each; names and versions may differ.
    """

    def __init__(self, first: Profiled, second: Profiled) -> None:
        self.first, self.second = first, second
        shapes = [[layer.num_experts for layer in profile.layers] for profile in (first, second)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                "compare: expected profiles of models of the same shape, got "
                f"{_shape(shapes[0])} ({first.facts.get('model')}) and {_shape(shapes[1])} "
                f"({second.facts.get('model')})"
            )

    def to_frame(self) -> pandas.DataFrame:
        """A tidy pandas table: layer, name, block (the first's), phase, metric, first, second,
        difference (second − first), relative (difference / first).

        Every metric that is one number, and "expert_load_distance": half the sum of the absolute
        differences of the experts' loads, 0 if alike, 1 if no expert is used by both. nan where
        one of them was not measured. layer <NA>: of the whole profile.
        """
        import pandas

        rows = []
        met = [p for p in PHASES if p in self.first.phases or p in self.second.phases]
        for phase in (*met, ALL):
            for name in WHOLE:
                values = (getattr(p, name)(phase) for p in (self.first, self.second))
                rows.append((None, None, None, phase, name, *values))
            both = zip(self.first.each(phase), self.second.each(phase), strict=True)
            for label, (a, b) in zip(self.first.labels, both, strict=True):
                place = label, a.layer.name, a.layer.block, phase
                rows += [(*place, m, getattr(a, m), getattr(b, m)) for m in SCALARS]
                distance = _load_distance(a, b)
                rows.append((*place, LOADS, 0.0 if distance == distance else distance, distance))
        frame = pandas.DataFrame(rows, columns=COLUMNS[:-2])
        frame = frame.astype(
            {
                "layer": label_kind(self.first.labels),
                "name": "string",
                "block": "string",
                "first": float,
                "second": float,
            }
        )
        difference = frame["second"] - frame["first"]
        relative = (difference / frame["first"]).where(frame["first"] != 0)
        return frame.assign(difference=difference, relative=relative)

    def findings(self) -> list[str]:
        """Which is first, and the largest differences of each phase, in sentences."""
        found = [f"{place}: {_name(profile)}." for place, profile in self._both()]
        for phase in PHASES:
            missing = [place for place, p in self._both() if phase not in p.phases]
            if len(missing) == 1:
                found.append(f"{phase}: {missing[0].lower()} has none.")
            elif not missing:
                found += self._of_phase(phase)
        machines = [_conditions(profile) for profile in (self.first, self.second)]
        if machines[0] != machines[1]:
            found.append(
                f"Their times are not of the same conditions: {machines[0]}; {machines[1]}."
            )
        return found

    def _both(self) -> tuple[tuple[str, Profiled], tuple[str, Profiled]]:
        return (("First", self.first), ("Second", self.second))

    def _of_phase(self, phase: str) -> Iterator[str]:
        pairs = list(zip(self.first.each(phase), self.second.each(phase), strict=True))
        sides = list(zip(*pairs, strict=True))
        total = [sum(m.latency_ms_p50 for m in ms if m.steps) for ms in sides]
        line = (
            f"{phase}: {short(total[0])} and {short(total[1])} ms a step in MoE layers "
            f"(the sum of their medians; {_change(*total)})"
        )
        ks = [[m.k_mean for m in ms if m.tokens] for ms in sides]
        if all(ks):
            line += f", {np.mean(ks[0]):.2f} and {np.mean(ks[1]):.2f} experts a token"
        yield line + "."
        distances = [_load_distance(a, b) for a, b in pairs]
        if np.nan_to_num(distances).any():
            most = int(np.nanargmax(distances))
            yield (
                f"{phase}: the experts' loads differ most in layer {self.first.labels[most]}, "
                f"where {percent(distances[most])} of the selections are on other experts."
            )

    def table(self) -> Table:
        """A Table of the differences, a row for each layer; without rows if no phase is in both."""

        phases = [p for p in PHASES if p in self.first.phases and p in self.second.phases]
        each = {p: list(zip(self.first.each(p), self.second.each(p), strict=True)) for p in phases}
        rows = [
            [str(label), *(text for phase in phases for text in _differences(*each[phase][i]))]
            for i, label in enumerate(self.first.labels if phases else ())
        ]
        names = [*(name for name, _, _ in SHOWN), "load", "p50"]
        columns = [("", "layer"), *((phase, name) for phase in phases for name in names)]
        note = (
            "Second less first: experts per token, Gini of the load, confidence, distinct experts "
            "a step. load: % of the selections on other experts. p50: change of the median time."
        )
        return Table("By layer", note, columns, rows)

    def summary(self) -> str:
        """Findings and the table as text of at most 100 columns."""
        from .text import comparison_as_text

        return comparison_as_text(self)

    def __str__(self) -> str:
        return self.summary()

    def print_summary(self) -> None:
        from ..show.console import make_console

        make_console().print(self.summary())

    def __repr__(self) -> str:
        both = f"{_name(self.first)}; {_name(self.second)}"
        return f"<moeprof ProfileComparison: {printable(both)}>"

    def _repr_html_(self) -> str:
        from ..show.page import html_table
        from .page import SCOPED

        lines = "".join(f"<li>{escape(line)}</li>" for line in self.findings())
        table = self.table()
        shown = f'<p class="note">{escape(table.note)}</p>\n{html_table(table)}'
        return (
            f'<div class="moeprof-profile"><style>{SCOPED}</style>\n<ul>{lines}</ul>\n'
            f"{shown if table.rows else ''}</div>"
        )


def _shape(experts: list[int]) -> str:
    sizes = sorted(set(experts))
    return f"{len(experts)} MoE layers of {' or '.join(map(str, sizes))} experts"


def _name(profile: Profiled) -> str:
    facts = profile.facts
    return f"{facts.get('model') or PLAIN}, router: {facts.get('router') or PLAIN}"


def _conditions(profile: Profiled) -> str:
    """What times depend on beside the model's routing: CPU, threads, devices, dtype where it is
    known."""
    machine = profile.facts.get("machine") or {}
    threads = machine.get("threads")
    said = (
        machine.get("cpu"),
        None if threads is None else counted(threads, "thread"),
        *dict.fromkeys(row["name"] for row in profile.facts.get("devices") or []),
        profile.roofline and profile.roofline.dtype,
    )
    return ", ".join(part for part in said if part) or PLAIN


def _load_distance(first: LayerMetrics, second: LayerMetrics) -> float:
    return float(np.abs(np.subtract(first.expert_load, second.expert_load)).sum() / 2)


def _change(first: float, second: float) -> str:
    """ "+12 %"; a dash where there is nothing to compare."""
    return f"{100 * (second / first - 1):+.0f} %" if first and first == first else PLAIN


def _differences(first: LayerMetrics, second: LayerMetrics) -> Iterator[str]:
    for _, name, form in SHOWN:
        yield number(getattr(second, name) - getattr(first, name), form)
    yield number(100 * _load_distance(first, second), ".0f")
    yield _change(first.latency_ms_p50, second.latency_ms_p50)
