"""What a profiler puts into a model, and what it counts there."""

import math
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import _C
from ..backends.tables import DTYPES, as_array
from ..models.entry import Entry, find_entries
from ..models.find import Site, find_layers
from ..models.layer import Layer
from ..models.names import layer_numbers
from ..models.phases import PHASES
from ..models.routing import Routing
from ..models.sizes import active_adapters, wrappers
from ..patching.observers import Routed, disregard, observe
from .flops import count_grouped_mm
from .hooks import EntryWatch, LayerWatch
from .records import RecordWriter
from .step import Step
from .tally import Counts
from .vocabulary import Vocabulary

_CALL = nn.Module._call_impl.__code__
MAX_EVENTS = 100_000  # of the trace: some 50 bytes each in its file

# Of a call: experts (T, k), logits (T, E), which tokens are real (T,), the experts of the layer
# before (T, k).
_Arrays = tuple[np.ndarray, np.ndarray | None, np.ndarray | None, np.ndarray | None]


class _Local(threading.local):
    """What each thread has for itself."""

    step: Step | None = None
    decoded: tuple[int, int] | None = None  # Entry.decoded of the last step


class _ByPhase(dict[str, list[Counts]]):
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
        self.model = model
        self.sites: list[Site] = []
        self.entries: list[tuple[nn.Module, list[int]]] = []
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
        self.wrappers = wrappers(self.model, [site.block for site in sites])
        self.adapters = active_adapters(self.wrappers)
        self.numbers = layer_numbers([site.layer.block for site in sites])  # in records
        self.entries = find_entries(self.model, [site.block for site in sites])

    def clear(self) -> None:
        """Everything at zero."""
        sizes = [site.layer.num_experts for site in self.sites]
        self.counts = _ByPhase(sizes, self.options.pairs)
        # Of steps of several phases: what each did as a "whole", and its "parts" as they count
        # in their phases.
        self.joint = _ByPhase(sizes, self.options.pairs)
        self.recency = [np.full(s.layer.num_experts, -1, np.int32) for s in self.sites]
        self.steps = self.counted_steps = self.events_dropped = 0
        self.events: deque[tuple[Any, ...]] = deque(maxlen=MAX_EVENTS)
        self.routers: list[list[str]] = [[] for _ in self.sites]
        # (router, null), to name each once:
        self.last_router: list[tuple[Any, Any]] = [(self, None)] * len(self.sites)
        self.vocabulary: Vocabulary | None = None
        self.switched = False  # other adapters than at the start were active in a step
        self.passed_over: set[int] = set()  # layers whose router ran without the block's hooks
        # Of experts in a list: was one of them called? Until then nothing counts as left out.
        self.rows_seen = [False] * len(self.sites)
        self.unseen: dict[tuple[str, int], np.ndarray] = {}
        # For each layer: rows that ran in experts other than the selected ones; calls in one
        # step; real tokens whose logits came, and those with weights only that are not finite.
        self.elsewhere, self.calls, self.with_logits, self.broken_weights = (
            [0] * len(self.sites) for _ in range(4)
        )

    def not_finite(self) -> list[int]:
        """By layer: real tokens, at least, that the router gave NaN or infinity.

        `_C.tally` counts no confidence of a token with NaN, or with -inf for every expert; one of
        +inf shows in the sums only, by which it isn't known how many there are.
        """
        found = []
        for i, given in enumerate(self.with_logits):
            counts = [of_phase[i] for of_phase in self.counts.values()]
            missing = given - sum(int(c.confidence.sum()) for c in counts)
            infinite = any(not math.isfinite(c.sums[2]) for c in counts)
            found.append(missing + infinite + self.broken_weights[i])
        return found

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
            self._undo.append(partial(disregard, site.block, layer))
            observe(site.block, layer)

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
            self._take_out_the_rest()

    def _take_out_the_rest(self) -> None:
        """Hooks that Ctrl-C has left: it came after one was put in, before that was noted."""
        for module in self.model.modules():
            own = vars(module)
            for kind in ("_forward_pre_hooks", "_forward_hooks"):
                for key, hook in [*own[kind].items()]:
                    watch = getattr(hook, "__self__", None)
                    if getattr(watch, "session", None) is self:
                        for name in (kind, f"{kind}_with_kwargs", f"{kind}_always_called"):
                            own.get(name, {}).pop(key, None)

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
            if counted and self.wrappers and active_adapters(self.wrappers) != self.adapters:
                self.switched = True
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
        step, self.local.step = self.step, None
        if step is not None:
            step.end()

    def warn_of_padding(self, entry: Entry) -> None:
        """Once, where a batch looks padded and nothing says so."""
        if self.mask is not None or entry.shape is None:
            return
        if (found := entry.looks_padded()) is None:
            return
        self.warned = True
        rows, token = found
        warnings.warn(
            f"moeprof: {rows} of {entry.shape[0]} rows begin or end in token {token}, repeated, "
            "and no attention mask says that they are padding: they count as text. If they are "
            f"padding, say so by MoEProfiler(model, pad_token_id={token}) or mask=",
            stacklevel=2,
        )

    # ---- what a layer did ----

    def add(self, index: int, step: Step, event: Routed) -> None:
        """Count one call of layer `index`."""
        choice, elapsed, skips = event.routing, event.span.nanoseconds, event.skips
        experts = choice.chosen.numpy()
        if experts.dtype not in (np.int32, np.int64) or not experts.flags.c_contiguous:
            experts = np.ascontiguousarray(experts, np.int64)
        said, logits, dtype = choice.logits, None, "float32"
        if said is not None:
            if said.dtype in DTYPES:
                dtype = DTYPES[said.dtype]
            else:
                said = said.float()
            logits = as_array(said)
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
        if isinstance(step.phases, str):
            counts, recency = self.counts[step.phases][index], self.recency[index]
            unique = self._tally(index, counts, recency, arrays, dtype, elapsed, skips)
        else:
            unique = self._tally_phases(index, step, arrays, dtype, elapsed, skips)
        experts = experts.astype(np.int32, copy=False)  # each of them is in range
        step.previous = index, experts
        step.calls[index] = calls = step.calls.get(index, 0) + 1
        self.calls[index] = max(self.calls[index], calls)
        if logits is not None:
            self.with_logits[index] += tokens if real is None else int(np.count_nonzero(real))
        else:
            self.broken_weights[index] += _broken(choice.weights, real)
        if self.options.extras:
            times = event.span.start, elapsed, tokens, unique
            self._add_extras(index, step, choice, experts, times)

    def _tally_phases(
        self, index: int, step: Step, arrays: _Arrays, dtype: str, nanoseconds: int, skips: bool
    ) -> int:
        """Count a step of several phases, in each its tokens and by their number its time.

        Beside that it counts in `joint`, without what only tokens tell; returns its number of
        distinct experts.
        """
        experts, _, real, _ = arrays
        if len(step.phases) != len(experts):
            raise ValueError(
                f"{self.sites[index].layer.name}: its block got {len(experts)} tokens, the model "
                f"{len(step.phases)}"
            )
        # After the step the experts were used in the order of the whole.
        recency = self.recency[index]
        by_part, again = recency.copy(), recency.copy()
        for phase, rows in step.parts():
            chosen, *others = arrays
            logits, real_part, previous = (None if a is None else a[rows] for a in others)
            part = chosen[rows], logits, real_part, previous
            share = nanoseconds * len(rows) // len(experts)
            for of_layers, last, of in (
                (self.counts[phase], by_part, part),
                (self.joint["parts"], again, (part[0], None, part[2], None)),
            ):
                self._tally(index, of_layers[index], last, of, dtype, share, skips)
        counts, whole = self.joint["whole"][index], (experts, None, real, None)
        return self._tally(index, counts, recency, whole, dtype, nanoseconds, skips)

    def _tally(
        self,
        index: int,
        counts: Counts,
        recency: np.ndarray,
        arrays: _Arrays,
        dtype: str,
        nanoseconds: int,
        skips: bool,
    ) -> int:
        """Count tokens of one call of a layer; returns their number of distinct experts."""
        experts, logits, real, previous = arrays
        try:
            return _C.tally(
                counts.ints,
                counts.floats,
                recency,
                experts,
                logits,
                dtype,
                real,
                previous,
                nanoseconds,
                skips,
            )
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
            if self.rows_seen[index]:
                fewer = int(left_out[:-1].clip(min=0).sum())
                more = int((-left_out[:-1]).clip(min=0).sum())
                self.elsewhere[index] += min(fewer, more)
            else:
                counts = self.unseen.setdefault((step.phase, index), np.zeros_like(counts))
            counts[int(step.real is not None)] += left_out

    def _follows(self, index: int, before: int, experts: np.ndarray, tokens: int) -> bool:
        """Did the same tokens pass as many experts in the layer just before?"""
        sizes = [self.sites[i].layer.num_experts for i in (before, index)]
        return before == index - 1 and len(experts) == tokens and sizes[0] == sizes[1]

    def _add_extras(
        self,
        index: int,
        step: Step,
        choice: Routing,
        experts: np.ndarray,
        times: tuple[int, int, int, int],
    ) -> None:
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
                layer=self.numbers[index],
                step=step.number,
                experts=experts,
                phase=phase if isinstance(phase, str) else [PHASES[p] for p in phase],
                weights=_floats(choice.weights),
                entropy=_entropy(choice.logits),
                real=step.real,
                input_ids=_ids(step),
            )

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


# ---- reading ----


def _ids(step: Step) -> np.ndarray | None:
    return None if step.input_ids is None else step.input_ids.reshape(-1).numpy(force=True)


def _floats(tensor: Tensor | None) -> np.ndarray | None:
    return None if tensor is None else tensor.detach().float().numpy()


def _broken(weights: Tensor | None, real: np.ndarray | None) -> int:
    """Real tokens with a weight that is NaN or infinite."""
    if weights is None or math.isfinite(weights.detach().sum()):
        return 0
    rows = (~weights.isfinite()).any(-1).numpy()
    return int((rows if real is None else rows[real]).sum())


def _entropy(logits: Tensor | None) -> np.ndarray | None:
    """(T,) nats, of the softmax over the logits (T, E)."""
    if logits is None:
        return None
    logp = torch.log_softmax(logits.detach().float(), -1)
    return torch.special.entr(logp.exp()).sum(-1).numpy()
