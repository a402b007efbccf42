"""What a profiler puts into a model, and what it counts there."""

import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from time import perf_counter_ns
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import _C
from ..experts import DTYPES, as_array
from ..names import layer_numbers
from ..patching import Routing
from ..watching import RoutingWatch, unwatch, watch
from .check import ExpertRows
from .entry import Entry, find_entries
from .finding import Layer, Site, find_layers
from .flops import count_grouped_mm
from .phases import PHASES, UNKNOWN
from .reading import Choice, read_choice, read_experts_call, read_logits, without_empty
from .records import RecordWriter
from .sizes import top_k_owner
from .tally import Counts
from .vocabulary import Vocabulary

STOCK, OWN_IN_C = "the model's own, not patched", "the model's own top-k, patched"
_CALL = nn.Module._call_impl.__code__
MAX_EVENTS = 100_000  # of the trace: some 50 bytes each in its file


class Step:
    """One call of the model: what its layers have in common, and what passes between hooks."""

    # Of all its tokens, or (T,) numbers in PHASES where they are of several
    phases: str | np.ndarray = UNKNOWN
    real: np.ndarray | None = None
    input_ids: Tensor | None = None
    previous: tuple[int, np.ndarray] | None = None  # the layer that ran last, its experts
    # of one layer, between its hooks:
    start = tokens = 0
    output = call = None
    hooked: object = None  # the LayerWatch's hooks that were in when the layer began
    rows: list[int] | None = None  # that the experts of a list got

    def __init__(self, number: int, counted: bool, entered: bool, run: object):
        self.number, self.counted, self.entered, self.run = number, counted, entered, run

    @property
    def phase(self) -> str:
        """Of most of its tokens."""
        if isinstance(self.phases, str):
            return self.phases
        return PHASES[np.bincount(self.phases).argmax()]

    def parts(self) -> Iterator[tuple[str, np.ndarray | None]]:
        """(phase, numbers of its tokens; None for all)."""
        if isinstance(self.phases, str):
            yield self.phases, None
            return
        for number in np.unique(self.phases):
            yield PHASES[number], np.flatnonzero(self.phases == number)


class _Local(threading.local):
    """What each thread has for itself."""

    step: Step | None = None


class _ByPhase(dict):
    """{phase: the Counts of each layer}; those of a phase are made when it first comes."""

    def __init__(self, sizes: list[int], pairs: bool):
        self._sizes, self._pairs = sizes, pairs

    def __missing__(self, phase: str) -> list[Counts]:
        # setdefault: two threads may be here at once, and both count in the same ones.
        return self.setdefault(phase, [Counts(size, self._pairs) for size in self._sizes])


class Session:
    """The hooks of one profiler in one model, and its counts. Knows nothing of the profiler, so
    that a profiler which is deleted takes its hooks along."""

    def __init__(self, model: nn.Module, options: "Options"):
        self.model, self.sites, self.entries = model, [], []
        self.options, self.mask, self.paused = options, options.mask, False
        self.warned = options.pad_token_id is not None  # of what looks like padding
        self._undo: list[Callable[[], None]] = []
        self.local = _Local()
        self.lock = threading.RLock()  # models run in several threads, started and stopped by any
        self.run = object()  # another one after each start
        self.look()

    def look(self) -> None:
        """Find the layers, as the model has them now.

        Raises
        ------
        ValueError
            If other ones were counted before.
        """
        sites, self.unread = find_layers(self.model)
        if _alike(sites) != _alike(self.sites):
            if self.sites and self.counted_steps:
                raise ValueError(
                    "the model's MoE layers are no longer those that were counted: reset the "
                    "profiler before its start, or make a new one"
                )
            self.sites = sites
            self.clear()
        self.sites = sites
        self.numbers = layer_numbers([site.layer.block for site in sites])  # in records
        self.entries = find_entries(self.model, [site.block for site in sites])

    def clear(self) -> None:
        """Everything at zero."""
        self.counts = _ByPhase([site.layer.num_experts for site in self.sites], self.options.pairs)
        self.recency = [np.full(s.layer.num_experts, -1, np.int32) for s in self.sites]
        self.steps = self.counted_steps = self.events_dropped = 0
        self.events: deque = deque(maxlen=MAX_EVENTS)
        self.routers: list[list[str]] = [[] for _ in self.sites]
        self.last_router: list[Any] = [self] * len(self.sites)  # to name each one once
        self.vocabulary = None
        self.passed_over: set[int] = set()  # layers whose router ran without the block's hooks
        # Of experts in a list: was one of them called? Until then nothing counts as left out.
        self.rows_seen = [False] * len(self.sites)
        self.unseen: dict[tuple[str, int], np.ndarray] = {}

    # ---- in the model ----

    @property
    def active(self) -> bool:
        return bool(self._undo)

    def attach(self) -> None:
        """Watch the model; all of it or, with an error, nothing. Without effect where it is."""
        with self.lock:
            if self.active:
                return
            self.look()
            self.run = object()
            try:
                self._put_in()
            except BaseException:
                self.detach()
                raise

    def _put_in(self) -> None:
        self._undo.append(count_grouped_mm())
        for module in self._entered():
            entry = EntryWatch(self)
            for register, hook, options in (
                (module.register_forward_pre_hook, entry.enter, {"with_kwargs": True}),
                (module.register_forward_hook, entry.leave, {"always_call": True}),
            ):
                self._undo.append(register(hook, **options).remove)
        for index, site in enumerate(self.sites):
            layer = LayerWatch(self, index, site)
            self._undo.append(partial(unwatch, site.block, layer))
            watch(site.block, layer)

    def _entered(self) -> list[nn.Module]:
        """The modules where a step begins; in a block alone each call is a step."""
        blocks = {site.block for site in self.sites}
        return [module for module, _ in self.entries if module not in blocks]

    def detach(self) -> None:
        """The model is as it was before."""
        self.local.step = None  # of a call that was interrupted
        with self.lock:
            while self._undo:
                self._undo.pop()()

    # ---- steps ----

    @property
    def step(self) -> Step | None:
        """The step that runs in this thread; none that a stop has interrupted."""
        step = self.local.step
        return step if step is not None and step.run is self.run else None

    def begin(self, entered: bool, known: bool = True) -> Step:
        """A step of this thread; known: its arguments are, else it can't be counted."""
        options = self.options
        with self.lock:
            number = self.steps
            since = number - options.warmup_steps
            sampled = since >= 0 and since % options.sampling_rate == 0
            counted = known and sampled and not self.paused
            if not self.paused:
                self.steps += 1
                self.counted_steps += counted
        self.local.step = step = Step(number, counted, entered, self.run)
        return step

    def began_before(self) -> bool:
        """Does a call of the model go on in this thread? Asked where no step runs: then it began
        before the start, and what is left of it is no step."""
        modules, frame = self._entered(), sys._getframe(1) if self._entered() else None
        while frame is not None:
            if frame.f_code is _CALL and any(frame.f_locals.get("self") is m for m in modules):
                return True
            frame = frame.f_back
        return False

    def end(self) -> None:
        self.local.step = None

    def warn_of_padding(self, entry: Entry) -> None:
        """Once, where a batch looks padded and nothing says so."""
        if self.mask is not None or (found := entry.looks_padded()) is None:
            return
        self.warned = True
        rows, token = found
        warnings.warn(
            f"moeprof: {rows} of {entry.shape[0]} rows begin or end in token {token}, repeated, "
            "and the model was called without an attention mask: they count as text. If they are "
            f"padding, say so by MoEProfiler(model, pad_token_id={token}) or mask=",
            stacklevel=2,
        )

    # ---- what a layer did ----

    def add(
        self, index: int, step: Step, choice: Choice | Routing, start: int, end: int, skips: bool
    ) -> None:
        """Count one call of layer `index`; start, end: perf_counter_ns."""
        experts = choice.experts.numpy()
        if experts.dtype not in (np.int32, np.int64) or not experts.flags.c_contiguous:
            experts = np.ascontiguousarray(experts, np.int64)
        logits, dtype = choice.logits, "float32"
        if logits is not None:
            dtype = DTYPES.get(logits.dtype)
            if dtype is None:
                logits, dtype = logits.float(), "float32"
            logits = as_array(logits)
        real, tokens = step.real, len(experts)
        if real is not None and len(real) != tokens:
            raise ValueError(
                f"{self.sites[index].layer.name}: its block got {tokens} tokens, the "
                f"model's mask is of {len(real)}"
            )
        previous = None
        if step.previous is not None and self._follows(index, *step.previous, tokens):
            previous = step.previous[1]
        arrays = experts, logits, real, previous
        unique = 0
        for phase, rows in step.parts():
            if rows is not None and len(step.phases) != tokens:
                raise ValueError(
                    f"{self.sites[index].layer.name}: its block got {tokens} tokens, the model "
                    f"{len(step.phases)}"
                )
            # The time of a step of several phases is divided by their tokens.
            part = arrays if rows is None else [None if a is None else a[rows] for a in arrays]
            share = end - start if rows is None else (end - start) * len(rows) // tokens
            unique = max(unique, self._tally(index, phase, *part, dtype, share, skips))
        experts = experts.astype(np.int32, copy=False)  # each of them is in range
        step.previous = index, experts
        if self.options.extras:
            times = start, end - start, tokens, unique
            self._add_extras(index, step, choice, experts, times)

    def _tally(
        self, index, phase, experts, logits, real, previous, dtype, nanoseconds, skips
    ) -> int:
        """Count the tokens of one phase; returns their number of distinct experts."""
        counts = self.counts[phase][index]
        try:
            return _C.tally(
                counts.ints, counts.floats, self.recency[index], experts, logits, dtype,
                real, previous, nanoseconds, skips,
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"{self.sites[index].layer.name}: {error}") from None

    def add_left_out(self, index: int, step: Step, left_out: np.ndarray | None) -> None:
        """Count the selections (E + 1,) that did not run, see `Counts.left_out`.

        Which tokens they are of isn't known: in a step of several phases they count in that of
        most tokens.
        """
        if left_out is None and not self.unseen:
            return
        with self.lock:
            if self.rows_seen[index]:
                for phase in [p for p, i in self.unseen if i == index]:
                    self.counts[phase][index].left_out += self.unseen.pop((phase, index))
            if left_out is None:
                return
            counts = self.counts[step.phase][index].left_out
            if not self.rows_seen[index]:
                counts = self.unseen.setdefault((step.phase, index), np.zeros_like(counts))
            counts[int(step.real is not None)] += left_out

    def _follows(self, index: int, before: int, experts: np.ndarray, tokens: int) -> bool:
        """Did the same tokens pass as many experts in the layer just before?"""
        sizes = [self.sites[i].layer.num_experts for i in (before, index)]
        return before == index - 1 and len(experts) == tokens and sizes[0] == sizes[1]

    def _add_extras(self, index, step, choice, experts, times) -> None:
        """What is kept on request only."""
        options = self.options
        if options.trace:
            self.events_dropped += len(self.events) == MAX_EVENTS
            self.events.append((index, step.phase, *times))
        if not options.vocabulary and options.records is None:
            return
        with self.lock:
            if options.vocabulary:
                self._add_vocabulary(index, step, experts)
            if options.records is None or not self.active:  # stopped by another thread
                return
            phase = step.phases
            options.records.add(
                layer=self.numbers[index], step=step.number, experts=experts,
                phase=phase if isinstance(phase, str) else [PHASES[p] for p in phase],
                weights=_floats(choice.weights), entropy=_entropy(choice.logits),
                real=step.real, input_ids=_ids(step),
            )  # fmt: skip

    def _add_vocabulary(self, index: int, step: Step, experts: np.ndarray) -> None:
        ids = _ids(step)
        if ids is None:
            raise ValueError(
                f"{self.sites[index].layer.name}: vocabulary=True needs the model's input_ids, "
                "and this call had none"
            )
        first = self.entries[0][1]
        if index not in first:  # the decoder behind an encoder: its tokens are others
            return
        if self.vocabulary is None:
            sizes = [site.layer.num_experts for site in self.sites]
            self.vocabulary = Vocabulary([n if i in first else 0 for i, n in enumerate(sizes)])
        self.vocabulary.add(index, ids, experts, step.real)


def _alike(sites: list[Site]) -> list[Layer]:
    """The layers without their k: calls with one k and with another may be counted together."""
    return [replace(site.layer, top_k=None) for site in sites]


@dataclass
class Options:
    """How a session counts; the arguments of MoEProfiler."""

    warmup_steps: int
    sampling_rate: int
    mask: Any
    pad_token_id: int | None
    pairs: bool
    vocabulary: bool
    trace: bool
    records: RecordWriter | None = None

    @property
    def extras(self) -> bool:
        return self.trace or self.vocabulary or self.records is not None


# ---- the hooks: bound methods, so that a copy of the model does not count here ----


# What torch.compile leaves to Python: it would trace the counting, and count what it traced.
_uncompiled = torch.compiler.disable


class _Watch:
    """Owner of hooks. A copied or pickled model gets one that does nothing."""

    session: Session | None = None

    def __deepcopy__(self, memo):
        return object.__new__(type(self))

    def __reduce__(self):
        return object.__new__, (type(self),)


class EntryWatch(_Watch):
    """Where the model is entered: a step begins and ends."""

    def __init__(self, session: Session):
        self.session = session

    @_uncompiled
    def enter(self, module, args, kwargs=None) -> None:
        session = self.session
        if session is None:
            return
        # Without kwargs it is called in a thread that runs while another one starts or stops.
        step = session.begin(entered=True, known=kwargs is not None)
        if not step.counted:
            return
        entry = Entry(module, args, kwargs)
        if entry.shape is not None:
            step.phases = entry.phases
            step.real = entry.real(session.mask, session.options.pad_token_id)
            step.input_ids = entry.input_ids
            if not session.warned:
                session.warn_of_padding(entry)

    @_uncompiled
    def leave(self, module, args, output) -> None:
        if self.session is not None:
            self.session.end()


class ExpertWatch(_Watch):
    """Of one expert in a list: the rows that it gets."""

    def __init__(self, session: Session, slot: int):
        self.session, self.slot = session, slot

    @_uncompiled
    def called(self, module, args, kwargs=None) -> None:
        step = None if self.session is None else self.session.step
        if step is None or step.rows is None:
            return
        given = args[0] if args else next(iter((kwargs or {}).values()), None)
        if isinstance(given, Tensor):
            step.rows[self.slot] += len(given) if given.dim() == 2 else given.shape[:-1].numel()


class LayerWatch(_Watch, RoutingWatch):
    """Of one block: its time, and what its router chose."""

    def __init__(self, session: Session, index: int, site: Site):
        self.session, self.index, self.site = session, index, site
        self._handles: list = []
        path = site.layer.name.removeprefix(site.layer.block).lstrip(".")
        self._router_of = attrgetter(path)
        self._heard: nn.Module | None = None  # the router that has the hook
        self._top_k = top_k_owner(site.router, site.block, site.layer.top_k)
        self._rows, self._bias_looked_for = ExpertRows(site), False
        self._hooked: object = None  # another object each time that hooks were put in

    # ---- a patched block ----

    @_uncompiled
    def routed(self, layer, hidden, routing, skips, start, end) -> None:
        step = None if self.session is None else self.session.step
        if step is None or not step.entered:
            step = self._step(hidden)
        if step is None or not step.counted:
            return
        if layer.router is not self.session.last_router[self.index]:
            name = OWN_IN_C if layer.router is None else repr(layer.router)
            self._name(layer.router, name)
        self.session.add(self.index, step, routing, start, end, skips)
        if not step.entered:
            self.session.end()

    @contextmanager
    def stock(self, hidden):
        if self.session is None:
            yield
            return
        inside = list(self._hook_inside())
        self._hooked = object()
        try:
            self.before(self.site.block, (hidden,), {})
            yield
            self.after(self.site.block, (hidden,), None)
        finally:
            for handle in inside:
                handle.remove()

    # ---- a block with hooks ----

    def hook(self, active: bool) -> None:
        if self.session is None:
            return
        # A forward that is inside the block in another thread sees by this that it isn't whole.
        self._hooked = None
        # Handles that were removed are kept: what puts a model back whole, as SimpleBenchmark
        # does, may bring their hooks back, and to remove one twice does no harm.
        for handle in self._handles:
            handle.remove()
        if active:
            self._handles = [*self._hook_inside()]
            block = self.site.block
            self._handles.append(block.register_forward_pre_hook(self.before, with_kwargs=True))
            self._handles.append(block.register_forward_hook(self.after))
            self._hooked = object()

    def _hook_inside(self) -> Iterator:
        site = self.site
        self._heard = self._router_of(site.block)
        yield self._heard.register_forward_hook(self.heard)
        if site.chooses == "experts" or self._rows.stacked is not None:
            yield site.experts.register_forward_pre_hook(self.called, with_kwargs=True)
        for expert, slot in self._rows.modules:
            hook = ExpertWatch(self.session, slot).called
            yield expert.register_forward_pre_hook(hook, with_kwargs=True)

    @_uncompiled
    def before(self, module, args, kwargs=None) -> None:
        hidden = args[0] if args else next(iter((kwargs or {}).values()), None)
        step = self._step(hidden)
        if step is None or hidden is None:
            return
        if self._router_of(module) is not self._heard:  # wrapped or replaced since the start
            with self.session.lock:
                if self._hooked is not None:  # else another thread has stopped it
                    self.hook(True)
        step.tokens = hidden.numel() // hidden.shape[-1]
        if not self._bias_looked_for:
            self._rows.refuse_bias()
            self._bias_looked_for = True
        step.rows = [0] * self.site.layer.num_experts if self._rows.listed else None
        step.hooked = self._hooked
        step.start = perf_counter_ns()

    @_uncompiled
    def heard(self, module, args, output) -> None:
        """The router has spoken."""
        step = self._step()
        if step is None or not step.start:
            self._pass_over(step)
            return
        step.output = output
        if isinstance(output, tuple | list):
            self._refuse_skips(output)

    def _pass_over(self, step: Step | None) -> None:
        """The router of a block runs whose own hooks did not: was its .forward() called?"""
        session = self.session
        if session is None or session.paused or self.index in session.passed_over:
            return
        if step is not None or (session.step is None and not session.began_before()):
            session.passed_over.add(self.index)

    @_uncompiled
    def called(self, module, args, kwargs=None) -> None:
        """The experts get their tokens."""
        if (step := self._step()) is not None:
            step.call = args, kwargs or {}

    @_uncompiled
    def after(self, module, args, output) -> None:
        end = perf_counter_ns()
        step = self._step()
        if step is None or not step.start:  # hooked by another thread since the block began
            return
        # or since then, or when it began, hooks were being put in or taken out
        if step.hooked is None or step.hooked is not self._hooked:
            step.start, step.output, step.call, step.rows = 0, None, None, None
            return
        if self.session.last_router[self.index] is not STOCK:
            self._name(STOCK, STOCK)
        choice, skips = without_empty(self._choice(step), self.site.layer.num_experts)
        skips = skips or self._may_skip()
        left_out = self._left_out(step, choice)
        start, step.start = step.start, 0
        step.output = step.call = step.rows = None
        self.session.add(self.index, step, choice, start, end, skips)
        self.session.add_left_out(self.index, step, left_out)
        if not step.entered:
            self.session.end()

    def _left_out(self, step: Step, choice: Choice) -> np.ndarray | None:
        """The selections (E + 1,) of each expert that did not run; None: all ran."""
        seen = self.session.rows_seen
        if step.rows is None:
            seen[self.index] = True
            if step.call is None or self._rows.stacked is None:
                return None
            return self._rows.left_out_of_call(*step.call, choice)
        if not seen[self.index] and any(step.rows):
            self._rows.verify(step.rows, choice)
            seen[self.index] = True
        return self._rows.left_out(step.rows, choice)

    # ---- both ----

    def _step(self, hidden: Tensor | None = None) -> Step | None:
        """The step that runs, if it counts; one of its own for a block that is called with
        `hidden` by itself."""
        session = self.session
        if session is None:
            return None
        step = session.step
        if hidden is not None and (step is None or not step.entered):
            if torch._C._current_graph_task_id() != -1:
                return None  # a backward pass computes again what a checkpoint did not keep
            if session.began_before():
                return None
            step = session.begin(entered=False)
        return step if step is not None and step.counted else None

    def _choice(self, step: Step) -> Choice:
        layer = self._layer()
        if step.call is not None and self.site.chooses == "experts":
            choice = read_experts_call(*step.call, step.tokens, layer)
            return choice._replace(logits=read_logits(step.output, step.tokens, layer))
        if step.output is None:
            raise ValueError(f"{layer.name}: the block ran without calling this router")
        return read_choice(step.output, step.tokens, layer)

    def _layer(self) -> Layer:
        """With the k that router or block have now: a user may change it."""
        layer = self.site.layer
        if self._top_k is None or (k := self._top_k[0].get(self._top_k[1])) == layer.top_k:
            return layer
        return replace(layer, top_k=k)

    def _name(self, router, name: str) -> None:
        self.session.last_router[self.index] = router
        names = self.session.routers[self.index]
        if name not in names:
            names.append(name)

    def _may_skip(self) -> bool:
        """Are its experts moeprof's, which leave a slot of -1 out? The model's own can't."""
        return self._implementation() == "moeprof"

    def _implementation(self) -> str | None:
        """Of transformers 5 the name of its experts' implementation."""
        config = getattr(self.site.experts, "config", None)
        return getattr(config, "_experts_implementation", None)

    def _refuse_skips(self, output) -> None:
        if self._may_skip():
            return
        for part in output:
            if isinstance(part, Tensor) and not part.is_floating_point():
                if part.dtype != torch.bool and part.numel() and int(part.min()) < 0:
                    instead = "patch the model first, moeprof.patch(model)"
                    if self._implementation() is not None:
                        instead += ', or model.set_experts_implementation("moeprof")'
                    raise ValueError(
                        f"{self.site.layer.name}: the router skipped a slot (-1), and the block "
                        "as transformers wrote it can't: it would fail or compute garbage; "
                        + instead
                    )


# ---- reading ----


def _ids(step: Step) -> np.ndarray | None:
    return None if step.input_ids is None else step.input_ids.reshape(-1).numpy()


def _floats(tensor: Tensor | None) -> np.ndarray | None:
    return None if tensor is None else tensor.detach().float().numpy()


def _entropy(logits: Tensor | None) -> np.ndarray | None:
    """(T,) nats, of the softmax over the logits (T, E)."""
    if logits is None:
        return None
    logp = torch.log_softmax(logits.detach().float(), -1)
    return torch.special.entr(logp.exp()).sum(-1).numpy()
