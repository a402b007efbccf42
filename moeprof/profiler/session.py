"""What a profiler puts into a model, and what it counts there."""

import threading
from collections import deque
from collections.abc import Callable
from time import perf_counter_ns

import numpy as np
import torch
from torch import Tensor, nn

from .. import _C
from ..experts import DTYPES, as_array
from ..patching import PatchedLayer, Routing, RoutingWatch, is_patched
from .entry import Entry, find_entries
from .finding import ChoiceCheck, Site, find_sites
from .flops import count_grouped_mm
from .reading import Choice, read_choice, read_experts_call
from .tally import PHASES, Counts
from .vocabulary import Vocabulary

STOCK, OWN_IN_C = "the model's own, not patched", "the model's own top-k, patched"
MAX_EVENTS = 100_000  # of the trace: some 50 bytes each in its file


class Step:
    """One call of the model: what its layers have in common, and what passes between hooks."""

    __slots__ = ("number", "counted", "phase", "real", "input_ids", "entered", "start", "tokens",
                 "output", "call", "routing", "skips", "previous", "check")  # fmt: skip

    def __init__(self, number: int, counted: bool, entered: bool):
        self.number, self.counted, self.entered = number, counted, entered
        self.phase: str | None = None  # None: by the hidden states of the block
        self.real: np.ndarray | None = None
        self.input_ids: Tensor | None = None
        self.previous: np.ndarray | None = None  # experts in the MoE layer before
        self.check = None
        self.clear()

    def clear(self) -> None:
        """Forget what the hooks of one layer said."""
        self.output = self.call = self.routing = None
        self.skips = False


class Session:
    """The hooks of one profiler in one model, and its counts. Knows nothing of the profiler, so
    that a profiler which is deleted takes its hooks along."""

    def __init__(self, model: nn.Module, options: "Options"):
        self.sites = find_sites(model)
        self.entries = find_entries(model, [site.block for site in self.sites])
        self.options, self.mask, self.paused = options, options.mask, False
        self._handles: list = []
        self._undo_formula: Callable[[], None] | None = None
        self._local = threading.local()
        self.clear()

    def clear(self) -> None:
        """Everything at zero."""
        made = {phase: [] for phase in PHASES}
        for site in self.sites:
            for counts in made.values():
                counts.append(Counts(site.layer.num_experts, self.options.pairs))
        self.counts: dict[str, list[Counts]] = made
        self.recency = [np.full(s.layer.num_experts, -1, np.int32) for s in self.sites]
        self.steps = self.counted_steps = self.events_dropped = 0
        self.events: deque = deque(maxlen=MAX_EVENTS)
        self.routers: list[list[str]] = [[] for _ in self.sites]
        self.vocabulary = None
        self.checked = [False] * len(self.sites)

    # ---- hooks in the model ----

    @property
    def active(self) -> bool:
        return bool(self._handles)

    def attach(self) -> None:
        """Put the hooks into the model; all of them or none."""
        try:
            self._undo_formula = count_grouped_mm()
            for module, _ in self.entries:
                watch = EntryWatch(self)
                self._handles += [
                    module.register_forward_pre_hook(watch.enter, with_kwargs=True),
                    module.register_forward_hook(watch.leave, always_call=True),
                ]
            for index, site in enumerate(self.sites):
                self._handles += LayerWatch(self, index, site).attach()
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        if self._undo_formula is not None:
            self._undo_formula()
            self._undo_formula = None

    # ---- steps ----

    def begin(self, entered: bool) -> Step:
        options, number = self.options, self.steps
        since = number - options.warmup_steps
        counted = not self.paused and since >= 0 and since % options.sampling_rate == 0
        if not self.paused:
            self.steps += 1
            self.counted_steps += counted
        self._local.step = step = Step(number, counted, entered)
        return step

    @property
    def step(self) -> Step | None:
        return getattr(self._local, "step", None)

    def end(self) -> None:
        self._local.step = None

    # ---- what a layer did ----

    def add(self, index: int, step: Step, choice: Choice, nanoseconds: int, start: int) -> None:
        """Count one call of layer `index`."""
        experts = choice.experts.numpy()
        if experts.dtype != np.int32:
            experts = experts.astype(np.int32)
        experts = np.ascontiguousarray(experts)
        tokens, name = len(experts), self.sites[index].layer.name
        if step.real is not None and len(step.real) != tokens:
            raise ValueError(
                f"{name}: its block got {tokens} tokens, the model's mask is of {len(step.real)}"
            )
        logits = choice.logits
        known = logits is not None
        if known and logits.dtype not in DTYPES:
            logits = logits.float()
        previous = step.previous
        counts = self.counts[step.phase][index]
        try:
            unique = _C.tally(
                counts.ints, counts.floats, self.recency[index], experts,
                as_array(logits) if known else None, DTYPES[logits.dtype] if known else "float32",
                step.real, previous if previous is not None and len(previous) == tokens else None,
                nanoseconds, step.skips,
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        step.previous = experts
        self._add_extras(index, step, choice, experts, (start, nanoseconds, tokens, unique))

    def _add_extras(self, index, step, choice, experts, times) -> None:
        """What is kept on request only."""
        options = self.options
        if options.trace:
            self.events_dropped += len(self.events) == MAX_EVENTS
            self.events.append((index, step.phase, *times))
        if options.vocabulary:
            self._add_vocabulary(index, step, experts)
        if options.records is not None:
            options.records.add(
                layer=index, step=step.number, phase=step.phase, experts=experts,
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
        if self.vocabulary is None:
            self.vocabulary = Vocabulary([site.layer.num_experts for site in self.sites])
        self.vocabulary.add(index, ids, experts, step.real)


class Options:
    """How a session counts."""

    def __init__(self, *, warmup_steps, sampling_rate, mask, pairs, vocabulary, trace, records):
        self.warmup_steps, self.sampling_rate, self.mask = warmup_steps, sampling_rate, mask
        self.pairs, self.vocabulary, self.trace = pairs, vocabulary, trace
        self.records = records


# ---- the hooks: bound methods, so that a copy of the model does not count here ----


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

    def enter(self, module, args, kwargs) -> None:
        session = self.session
        if session is None:
            return
        step = session.begin(entered=True)
        if not step.counted:
            return
        entry = Entry(module, args, kwargs)
        if entry.shape is not None:
            step.phase = PHASES[entry.shape[1] == 1]
            step.real = entry.real(session.mask)
            step.input_ids = entry.input_ids

    def leave(self, module, args, output) -> None:
        if self.session is not None:
            self.session.end()


class LayerWatch(_Watch, RoutingWatch):
    """Around one block: its time, and what its router chose."""

    def __init__(self, session: Session, index: int, site: Site):
        self.session, self.index, self.site = session, index, site
        self._last: object = self  # the router that ran last, to name each one once

    def attach(self) -> list:
        site = self.site
        handles = [
            site.block.register_forward_pre_hook(self.before, with_kwargs=True),
            site.block.register_forward_hook(self.after),
            site.router.register_forward_hook(self.heard),
        ]
        if site.chooses == "experts":
            handles.append(site.experts.register_forward_pre_hook(self.called, with_kwargs=True))
        return handles

    def before(self, module, args, kwargs) -> None:
        session = self.session
        if session is None:
            return
        step = session.step
        if step is None or not step.entered:  # the block is called by itself
            step = session.begin(entered=False)
        if not step.counted:
            return
        step.clear()
        hidden = args[0] if args else next(iter(kwargs.values()))
        step.tokens = hidden.numel() // hidden.shape[-1]
        if step.phase is None:
            step.phase = PHASES[hidden.dim() == 3 and hidden.shape[1] == 1]
        if not session.checked[self.index] and not is_patched(module):
            step.check = ChoiceCheck(self.site)
        step.start = perf_counter_ns()

    def heard(self, module, args, output) -> None:
        """The router has spoken."""
        step = None if self.session is None else self.session.step
        if step is None or not step.counted:
            return
        step.output = output
        if isinstance(output, tuple | list) and not is_patched(self.site.block):
            self._refuse_skips(output)

    def called(self, module, args, kwargs) -> None:
        """The experts get their tokens."""
        step = None if self.session is None else self.session.step
        if step is not None and step.counted:
            step.call = args, kwargs

    def routed(self, layer: PatchedLayer, routing: Routing, skips: bool) -> None:
        step = None if self.session is None else self.session.step
        if step is None or not step.counted:
            return
        step.routing, step.skips = routing, skips
        if layer.router is not self._last:
            self._last = layer.router
            self._name(OWN_IN_C if layer.router is None else repr(layer.router))

    def after(self, module, args, output) -> None:
        end = perf_counter_ns()
        session = self.session
        step = None if session is None else session.step
        if step is None or not step.counted:
            return
        try:
            choice = self._choice(step)
            if step.check is not None:
                step.check.verify(choice)
                session.checked[self.index] = True
            session.add(self.index, step, choice, end - step.start, step.start)
        finally:
            step.clear()
            if not step.entered:
                session.end()

    def _choice(self, step: Step) -> Choice:
        if step.routing is not None:
            routing = step.routing
            return Choice(routing.experts, routing.weights, routing.logits)
        if self._last is not STOCK:
            self._last = STOCK
            self._name(STOCK)
        layer = self.site.layer
        if step.call is not None:
            return read_experts_call(*step.call, step.tokens, layer)
        if step.output is None:
            raise ValueError(f"{layer.name}: the block ran without calling this router")
        return read_choice(step.output, step.tokens, layer)

    def _name(self, name: str) -> None:
        names = self.session.routers[self.index]
        if name not in names:
            names.append(name)

    def _refuse_skips(self, output) -> None:
        for part in output:
            if isinstance(part, Tensor) and not part.is_floating_point():
                if part.dtype != torch.bool and part.numel() and int(part.min()) < 0:
                    raise ValueError(
                        f"{self.site.layer.name}: the router skipped a slot (-1), and the block "
                        "as transformers wrote it can't: it would fail or compute garbage; "
                        "patch the model first, moeprof.patch(model)"
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
