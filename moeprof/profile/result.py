"""What a profiler counted, as one object: numbers, tables, figures, files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import cached_property, reduce
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checks import check_type
from ..files import as_csv, as_json, check_folder, printable, write_whole
from ..models.names import layer_keys, layer_labels
from ..models.phases import PHASES
from .frame import ALL
from .metrics import LayerMetrics, load_balance_loss, load_balance_loss_by_layer, z_loss

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from ..measure.roofline import Roofline
    from ..models.layer import Layer
    from ..profiler.tally import Counts
    from .compare import ProfileComparison
    from .page import Section
    from .types import Event, Label


class Profile:
    """Counts of a model's MoE layers by phase, and what they were counted on.

    `MoEProfiler.result` and `Profile.load` make one.

    Attributes
    ----------
    layers
        What the MoE layers are, a record each.
    counts
        {phase: [counts of each layer]}.
    facts
        A dict of model, model_class, config, machine, router, not_counted, passed_over, steps,
        steps_left_out, warmup_steps, sampling_rate, memory_peak_mb, devices (a dict
        each of device, name and memory_peak_mb; none for the CPU), notes, and of
        ``moeprof profile`` decode_by_batch; kept as JSON would.
    joint
        Counts of each layer, or None: of steps of several phases, what they did as a whole less
        what counts in their phases; all phases together are the sum of the phases and this.
    domains
        {label: (L, E + 1) int64}: selections of real tokens, and in the last column their number,
        of all phases; or None.
    vocabulary
        {"tokens": ids, "layers": indices, "counts": (layers, tokens, E), "seen": (tokens,),
        "text": [str] or None}, or None.
    roofline
        What `moeprof.roofline` gave, or None.
    events
        [(layer index, phase, start ns, duration ns, tokens, distinct experts)] or None.
    """

    def __init__(
        self,
        layers: Iterable[Layer],
        counts: Mapping[str, Iterable[Counts]],
        facts: Mapping[str, Any],
        *,
        joint: list[Counts] | None = None,
        domains: Mapping[str, NDArray[np.int64]] | None = None,
        vocabulary: dict[str, Any] | None = None,
        roofline: Roofline | None = None,
        events: Iterable[Event] | None = None,
    ) -> None:
        self.layers, self.counts = list(layers), {name: list(counts[name]) for name in PHASES}
        self.facts, self.joint = as_json(facts), joint
        named = {str(name): table for name, table in (domains or {}).items()}
        self.domains: dict[str, NDArray[np.int64]] | None = named or None
        self.vocabulary: dict[str, Any] | None = vocabulary or None
        self.roofline = roofline
        self.events: list[Any] | None = None if events is None else list(map(tuple, events))

    # ---- numbers ----

    @cached_property
    def labels(self) -> list[int | str]:
        """What each layer is called: its own number in the model, or its block's name."""
        return layer_labels([layer.block for layer in self.layers])

    def place_of(self, layer: Label) -> int:
        """Where in `layers` one stands that is called by its number or label, the name of its
        block or of its gate. KeyError for another."""
        blocks, gates = zip(*((layer.block, layer.name) for layer in self.layers), strict=True)
        return layer_keys(blocks, gates)[layer]

    @cached_property
    def phases(self) -> list[str]:
        """Those in which a step was counted."""
        return [name for name in PHASES if any(c.steps for c in self.counts[name])]

    @property
    def decode_by_batch(self) -> list[dict[str, Any]]:
        """Of `moeprof profile`: what the decode steps of each batch size did; nan for what was
        not measured."""
        rows = self.facts.get("decode_by_batch") or []
        return [{n: float("nan") if v is None else v for n, v in row.items()} for row in rows]

    @cached_property
    def _totals(self) -> dict[str, list[Counts]]:
        joint = [] if self.joint is None else [self.joint]
        by_layer = zip(*(self.counts[name] for name in PHASES), *joint, strict=True)
        whole = [reduce(add, of_phases) for of_phases in by_layer]
        return {**self.counts, ALL: whole}

    def counts_of(self, phase: str | None = None) -> list[Counts]:
        """Counts of each layer in one of PHASES, or (None or "all") in all together.

        Raises ValueError for another phase.
        """
        phase = phase or ALL
        if phase not in self._totals:
            known = ", ".join(map(repr, self._totals))
            raise ValueError(f"phase: expected one of {known}, got {phase!r}")
        return self._totals[phase]

    def metrics(self, phase: str | None = None) -> dict[str, LayerMetrics]:
        """{router's name: its LayerMetrics}, of a phase as in `counts_of`."""
        return {layer.name: m for layer, m in zip(self.layers, self.each(phase), strict=True)}

    def each(self, phase: str | None = None) -> list[LayerMetrics]:
        """The metrics of each layer, in model order."""
        counts = self.counts_of(phase)
        return [
            LayerMetrics(layer, own, roofline=self.roofline, before=before)
            for layer, own, before in zip(self.layers, counts, [None, *counts], strict=False)
        ]

    def load_balance_loss(self, phase: str | None = None) -> float:
        """E Σ f_e P_e, the tokens of all layers pooled, as transformers'
        load_balancing_loss_func."""
        return load_balance_loss(self.counts_of(phase))

    def load_balance_loss_by_layer(self, phase: str | None = None) -> float:
        """The mean of the layers' own load-balance losses, which pooling can hide."""
        return load_balance_loss_by_layer(self.counts_of(phase))

    def z_loss(self, phase: str | None = None) -> float:
        """Mean of logsumexp(z)² over the tokens of all layers."""
        return z_loss(self.counts_of(phase))

    def domain_specialisation(self) -> pandas.DataFrame:
        """A pandas table: which experts the tokens of a domain select.

        share and others: of the domain's tokens, and of all other domains', those that select the
        expert; p: of a two-sided binomial test that they are alike, which takes tokens as
        independent; baseline: k/E, an even choice; times: share / baseline.

        ValueError where the texts had no domain labels.
        """
        from .specialisation import by_domain

        return by_domain(self)

    def vocabulary_specialisation(self, minimum: int = 8, top: int = 10) -> pandas.DataFrame:
        """A pandas table: the input tokens that select an expert.

        minimum : occurrences below which a token is left out
        top : tokens of each expert

        ValueError where input tokens were not recorded.
        """
        from .specialisation import by_token

        return by_token(self, minimum, top)

    def to_frame(self) -> pandas.DataFrame:
        """A tidy pandas table: layer, name, block, expert, phase, metric, value.

        layer: the model's own number of the layer, see `labels`; name: its gate's, as in
        `metrics`; <NA>: of the whole profile. expert is <NA> where a number is not of one
        expert. A layer that could not be counted has one row, of the metric "not_counted".
        phase: one of `phases`, "all", or where `moeprof profile` decoded with several batch
        sizes "decode_batch_4" and so on, with layer <NA>.
        """
        from .frame import to_frame

        return to_frame(self)

    # ---- to look at ----

    def summary(self) -> str:
        """Findings and a table with a row for each layer, at most 100 columns wide."""
        from .text import as_text

        return as_text(self)

    def print_summary(self) -> None:
        from ..show.console import make_console

        make_console().print(self.summary())

    @property
    def figures(self) -> list[str]:
        """The names that `plot` takes: of what was measured."""
        from .plots import available

        return available(self)

    def plot(self, name: str = "load", **options: Any) -> Figure:
        """A matplotlib Figure, one of `figures`. "coactivation" and "moves" take a layer=, its
        number, its block's name or its gate's.

        Raises ValueError for a name that is not in `figures`, or a layer that is none.
        """
        from .plots import plot

        return plot(self, name, **options)

    def to_html(self, sections: Iterable[Section] = ()) -> str:
        """A page with everything in it: no script, nothing loaded from elsewhere.

        sections : more of them, shown behind what the profile itself has
        """
        from .page import page

        return page(self, sections)

    def _repr_html_(self) -> str:
        from .page import fragment

        return fragment(self)

    def __repr__(self) -> str:
        tokens = max((m.tokens for m in self.each()), default=0)
        model = printable(str(self.facts.get("model")))
        count = len(self.layers)
        return f"<moeprof Profile of {model}: {count} MoE layers, {tokens:,} tokens>"

    def compare(self, other: Profile) -> ProfileComparison:
        """This profile, the first, beside another of a model of the same shape.

        Raises ValueError where the layers or their numbers of experts differ.
        """
        from .compare import ProfileComparison

        check_type("compare: other", other, Profile, "a Profile (Profile.load reads a folder)")
        return ProfileComparison(self, other)

    # ---- files ----

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write profile.json, counts.npz and metrics.csv; their paths.

        Beside them glossary.csv, which says what each number is and its unit, and, where input
        tokens were recorded, vocabulary.csv: `vocabulary_specialisation` of every layer.
        Over an older profile: whatever happens on the way, `load` gives the older one or this
        one, whole. OSError where the folder can't be written.
        """
        from .storage import pack, write

        folder = Path(folder)
        check_folder(folder)
        files = pack(self)
        folder.mkdir(parents=True, exist_ok=True)
        write(folder, files)
        return [folder / name for name in files]

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Profile:
        """The Profile that `save` wrote.

        Raises FileNotFoundError where a file is missing, ValueError naming the folder where it
        holds no profile, one of another format version, or files that don't belong together.
        """
        from .storage import unpack

        check_type("Profile.load: folder", folder, (str, os.PathLike), "the path of a folder")
        return unpack(cls, Path(folder))

    def save_csv(self, path: str | os.PathLike[str]) -> None:
        """`to_frame` as CSV, control characters in names replaced by "\ufffd" as in the summary;
        OSError where it can't be written."""
        write_whole(path, as_csv(self.to_frame()))

    def save_trace(self, path: str | os.PathLike[str]) -> None:
        """The layers' steps for chrome://tracing or ui.perfetto.dev.

        ValueError unless the profiler recorded events.
        """
        from .trace import trace

        write_whole(path, trace(self).encode())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Profile):
            return NotImplemented
        return (
            (self.layers, self.counts, self.joint, self.facts, self.roofline, self.events)
            == (other.layers, other.counts, other.joint, other.facts, other.roofline, other.events)
            and _same(self.domains, other.domains)
            and _same(self.vocabulary, other.vocabulary)
        )

    __hash__ = None  # type: ignore[assignment]  # equal by value and changeable: no key


def _same(first: Mapping[str, Any] | None, second: Mapping[str, Any] | None) -> bool:
    """Equality of dicts whose values are arrays or lists, or of None."""
    if first is None or second is None:
        return first is second
    return first.keys() == second.keys() and all(
        np.array_equal(first[key], second[key]) for key in first
    )
