"""MoEProfiler: hooks in a model, and the numbers of what ran."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from numbers import Integral
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from torch import nn

from ..checks import check_model
from ..measure.roofline import Roofline, known_roofline
from ..models.names import layer_labels, spans
from ..models.phases import PHASES
from ..profiler.records import RecordWriter
from ..profiler.session import Options, Session
from ..profiler.tally import Counts
from .metrics import LayerMetrics
from .result import Profile
from .wording import counted

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..models.find import Site


class MoEProfiler:
    """Counts and times what the MoE layers of a model do, patched or not.

    ``with moeprof.MoEProfiler(model) as profiler: model(**inputs)``, then
    ``profiler.print_summary()``. What was counted adds up until `reset`; stopping leaves the
    model as it was. Several profilers may watch one model, and a model may be patched and
    unpatched meanwhile. What `torch.compile` has compiled before the start may pass unseen:
    start first.

    A step is one call of the model. Its phase is read from the cache: "prefill" without tokens
    in it, "decode" with one new token a row behind them, "verify" for the drafts of assisted
    decoding and prompt lookup, "unknown" where neither cache nor caller tells. A step that mixes
    phases, as in continuous batching, counts in each with its own tokens, its time divided by
    their number, and as one step in all phases together. Tokens that the attention mask leaves
    out are padding: counted apart.

    Parameters
    ----------
    model : torch.nn.Module
        Any model with MoE layers, on any device; they are found by their structure.
    warmup_steps : int
        The first so many steps are not counted.
    sampling_rate : int
        Every so many-th step is counted.
    mask : (B, n) array, tensor or None
        Nonzero for real tokens, by position from the start of the sequence; in place of the
        attention mask, for instance to leave out what follows the end of a sequence. What is
        generated behind its end is real; a prompt that it doesn't cover is an error.
    pad_token_id : int or None
        In calls without any attention mask, the runs of this id at the start and at the end of
        a row are padding; `generate` of transformers 5 passes on no mask of ones only. So they
        are in decode steps with a mask, which `generate` fills with ones behind the end of a
        row. Where that id is also the end of a text (eos), the real one at the end of a row is
        taken for padding too. Without it, and without a mask, all tokens count, with one warning
        where rows of a prompt look padded.
    pairs : bool
        Also count which experts are selected together, and from layer to layer: two tables of
        8 E^2 bytes for each layer and phase.
    vocabulary : bool
        Also count the experts of each input token id: some 8 E bytes for each id that comes,
        and layer. In a model with encoder and decoder, of the one that comes first.
    trace : bool
        Also keep the time of each layer's last calls, for `Profile.save_trace`.
    records : str, path or None
        Write every token's experts, weights and entropy there, piece by piece: a ``.parquet``
        file, or a folder of ``.npz`` files. They are complete after `stop`.

    Raises
    ------
    ValueError
        "No routers found ..." for a model without MoE layers; weights on the device meta, which
        has no values; a parameter out of range. While it runs: "Router output format unexpected
        ...", naming the layer; a mask that does not fit the tokens; a skipped slot (-1) that
        would make the block compute garbage: one that runs neither patched nor moeprof's experts.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        warmup_steps: int = 0,
        sampling_rate: int = 1,
        mask: Any = None,
        pad_token_id: int | None = None,
        pairs: bool = True,
        vocabulary: bool = False,
        trace: bool = False,
        records: str | os.PathLike[str] | None = None,
    ) -> None:
        check_model("MoEProfiler", model)
        pad = pad_token_id
        self.model = model
        options = Options(
            warmup_steps=_integer("warmup_steps", warmup_steps, 0),
            sampling_rate=_integer("sampling_rate", sampling_rate, 1),
            mask=mask,
            pad_token_id=None if pad is None else _integer("pad_token_id", pad, 0),
            pairs=pairs,
            vocabulary=vocabulary,
            trace=trace,
        )
        self._session = Session(model, options)
        _check_device(self._session.sites)
        if records is not None:
            options.records = RecordWriter(records)
        self._started_here: list[bool] = []
        self._domains: list[tuple[str, NDArray[np.int64]]] = []
        self._by_domain: dict[str, NDArray[np.int64]] = {}
        self._finalizer = weakref.finalize(self, _detach, self._session, options)

    # ---- running ----

    @property
    def active(self) -> bool:
        """True between start and stop."""
        return self._session.active

    def start(self, *, mask: Any = None) -> MoEProfiler:
        """Put the hooks in; without effect where they are. mask: as at construction.

        Raises
        ------
        ValueError
            If the model's layers are no longer those that were counted; if records were to be
            written, which a stop has ended.
        """
        records = self._session.options.records
        if records is not None and records.closed:
            raise ValueError(
                f"records: {records.path} was closed by stop; make a new profiler with a new path"
            )
        if mask is not None:
            self._session.mask = mask
        if not self.active:
            self._session.attach()
        return self

    def stop(self) -> None:
        """Take the hooks out: the model is as it was. The counts stay."""
        _detach(self._session, self._session.options)

    def pause(self) -> None:
        """Don't count, nor number, steps until `resume`; the hooks stay."""
        self._session.paused = True

    def resume(self) -> None:
        """Count again."""
        self._session.paused = False

    def reset(self) -> None:
        """Everything at zero, the warm-up to come again; records that were written stay."""
        self._session.clear()
        self._by_domain.clear()
        self._domains = [(label, self._loads()) for label, _ in self._domains]

    def __enter__(self) -> MoEProfiler:
        self._started_here.append(not self.active)
        return self.start()

    def __exit__(self, *exception: object) -> None:
        if self._started_here.pop():
            self.stop()

    @property
    def mask(self) -> Any:
        """Set, (B, n) in place of the attention mask of the steps to come, or None. Called, the
        same for what runs inside: ``with profiler.mask(m): model(**inputs)``."""
        return self._masked

    @mask.setter
    def mask(self, mask: Any) -> Any:
        self._session.mask = mask

    @contextmanager
    def _masked(self, mask: Any) -> Iterator[MoEProfiler]:
        before, self._session.mask = self._session.mask, mask
        try:
            yield self
        finally:
            self._session.mask = before

    @contextmanager
    def domain(self, label: str) -> Iterator[MoEProfiler]:
        """What runs inside counts for a domain of texts, too: ``with profiler.domain("code"):``.

        Within another domain the inner one counts.
        """
        self._close_domain()
        self._domains.append((label, self._loads()))
        try:
            yield self
        finally:
            self._close_domain()
            self._domains.pop()
            if self._domains:
                self._domains[-1] = (self._domains[-1][0], self._loads())

    def _close_domain(self) -> None:
        """Add what the innermost domain has counted since it was opened, or opened again."""
        if self._domains:
            label, before = self._domains[-1]
            since = self._loads() - before
            self._by_domain[label] = self._by_domain.get(label, 0) + since
            self._domains[-1] = (label, before + since)

    def _loads(self) -> NDArray[np.int64]:
        """(L, E + 1): selections of the real tokens, and their number, of all phases."""
        sites = self._session.sites
        widest = max(site.layer.num_experts for site in sites)
        loads = np.zeros((len(sites), widest + 1), np.int64)
        for counts in list(self._session.counts.values()):
            for row, layer in zip(loads, counts, strict=True):
                row[: layer.num_experts] += layer.load[0]
                row[-1] += layer.tokens
        return loads

    # ---- what was counted ----

    def result(self, *, roofline: Roofline | None = None) -> Profile:
        """A Profile of what was counted so far: it changes no more.

        roofline: what `moeprof.roofline` gave; without it the one that was measured for this
        model in this process, if there is any.
        """
        session = self._session
        self._close_domain()
        counts = session.counts
        return Profile(
            [site.layer for site in session.sites],
            {phase: [c.copy() for c in counts[phase]] for phase in PHASES},
            self._facts(),
            joint=_less(session.joint["whole"], session.joint["parts"]) if session.joint else None,
            domains={label: loads.copy() for label, loads in self._by_domain.items()} or None,
            vocabulary=None if session.vocabulary is None else session.vocabulary.as_dict(),
            roofline=roofline or known_roofline(self.model),
            events=list(session.events) if session.options.trace else None,
        )

    def get_metrics(self, phase: str | None = None) -> dict[str, LayerMetrics]:
        """{name of the router: its metrics}, of all phases together or of one."""
        return self.result().metrics(phase)

    def print_summary(self) -> None:
        """Print the tables of `Profile.summary`."""
        self.result().print_summary()

    def save_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the tidy table of `Profile.to_frame` to a CSV file."""
        self.result().save_csv(path)

    def _facts(self) -> dict[str, Any]:
        from ..measure.machine import describe, devices_under, peak_memory

        session = self._session
        config: Any = getattr(self.model, "config", None)
        blocks = [site.layer.block for site in session.sites]
        name = getattr(config, "_name_or_path", "") or type(self.model).__name__
        return {
            "model": name,
            "model_class": type(self.model).__name__,
            "config": config.to_dict() if hasattr(config, "to_dict") else {},
            "machine": describe(),
            "router": _routers(session.routers, layer_labels(blocks)),
            "not_counted": self._not_counted(),
            "passed_over": [
                label for i, label in enumerate(layer_labels(blocks)) if i in session.passed_over
            ],
            "steps": session.counted_steps,
            "steps_left_out": session.steps - session.counted_steps,
            "warmup_steps": session.options.warmup_steps,
            "sampling_rate": session.options.sampling_rate,
            "memory_peak_mb": peak_memory() / 1e6,
            "devices": devices_under(self.model),
            "notes": self._notes(),
        }

    def _not_counted(self) -> list[dict[str, int | str]]:
        """What looks like an MoE layer and can't be counted: block, label, reason."""
        session = self._session
        blocks = [u.name for u in session.unread]
        labels = layer_labels([s.layer.block for s in session.sites] + blocks)[-len(blocks) :]
        return [
            {"block": u.name, "label": label, "reason": u.reason}
            for u, label in zip(session.unread, labels, strict=False)
        ]

    def _notes(self) -> list[str]:
        session, notes = self._session, []
        if session.events_dropped:
            notes.append(f"the trace lacks the first {session.events_dropped} calls of layers")
        if session.switched:
            notes.append(
                "Adapters of the model were switched, disabled or merged while the profiler "
                "counted: FLOPs and bytes are of those that were active at its start, and a layer "
                "that was replaced by another copy was not counted. Use a profiler for each."
            )
        if where := self._which(not_finite := session.not_finite()):
            notes.append(
                f"Not finite (NaN or infinite): what the router said in {where}, of at "
                f"least {counted(max(not_finite), 'token')} in one of them. Weights or hidden "
                "states are broken, and which experts these tokens selected means nothing."
            )
        if where := self._which([calls > 1 for calls in session.calls]):
            notes.append(
                f"Called up to {max(session.calls)} times in one step: {where}, one module that "
                "stands for several layers or is called in parts. Its tokens and FLOPs are of all "
                "calls; each call counts as a step, with its time and bytes."
            )
        if where := self._which(elsewhere := session.elsewhere):
            notes.append(
                f"Rows and routing don't agree by expert in {where}: {sum(elsewhere):,} selections "
                "did not run in their own expert, and others got as many rows that were not "
                "selected for them, as an expert that takes what others drop or one that is "
                "filled up. FLOPs are of the rows that ran, load of what was selected."
            )
        unseen = {index for _, index in session.unseen}
        if where := self._which([index in unseen for index in range(len(session.sites))]):
            notes.append(
                f"No call of an expert was seen in {where}: what was selected is taken for what "
                "ran."
            )
        return notes

    def _which(self, by_layer: Sequence[object]) -> str:
        """ "layers 0 to 3": those whose value isn't zero; "" for none."""
        labels = layer_labels([site.layer.block for site in self._session.sites])
        which = [label for label, value in zip(labels, by_layer, strict=True) if value]
        return f"layer{'s' * (len(which) > 1)} {spans(which)}" if which else ""

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "MoEProfiler: it belongs to its model and can't be copied or pickled: take what it has "
            "counted, profiler.result()"
        )

    def __repr__(self) -> str:
        state = "counting" if self.active else "stopped"
        layers, steps = len(self._session.sites), self._session.counted_steps
        return f"<moeprof.MoEProfiler: {layers} MoE layers, {steps} steps counted, {state}>"


def _detach(session: Session, options: Options) -> None:
    with session.lock:  # what another thread counts is written before, or not at all
        session.detach()
        if options.records is not None:
            options.records.close()


def _less(whole: list[Counts], parts: list[Counts]) -> list[Counts]:
    return [a - b for a, b in zip(whole, parts, strict=True)]


def _routers(by_layer: list[list[str]], labels: Sequence[int | str]) -> str:
    """What routed, in words; "layers 1 to 3: ..." where it was not the same in all."""
    texts = [" and ".join(names) for names in by_layer]
    if len(set(texts)) == 1:
        return texts[0]
    runs = [
        (text, [label for _, label in run])
        for text, run in groupby(zip(texts, labels, strict=True), key=itemgetter(0))
    ]
    return "; ".join(
        f"layer{'s' * (len(run) > 1)} {spans(run)}: {text or 'not counted'}" for text, run in runs
    )


def _integer(name: str, value: object, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if value < low:
        raise ValueError(f"{name}: expected at least {low}, got {value}")
    return int(value)


def _check_device(sites: Iterable[Site]) -> None:
    for site in sites:
        if any(hasattr(module, "_hf_hook") for module in site.block.modules()):
            continue  # accelerate brings the weights when they are needed
        for parameter in site.block.parameters():
            if parameter.is_meta:
                raise ValueError(
                    f"{site.layer.block}: its weights are on the device meta, which has no values: "
                    "load the model with its weights"
                )
