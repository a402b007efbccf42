"""The hooks that a profiler puts into a model: bound methods, so that a copy of the model does
not count here."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..models.entry import Entry
from ..models.find import Site, calls_one_by_one
from ..models.layer import Layer
from ..models.quantized import QuantizedExperts
from ..models.reading import read_choice, read_experts_call, read_logits, without_empty
from ..models.routing import Routing
from ..models.sizes import top_k_owner
from ..patching.observers import STOCK, Observer, Routed
from ..patching.span import Span
from ..patching.state import STATE
from .check import ExpertRows
from .step import Step

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

OWN_IN_C = "the model's own top-k, patched"

# What torch.compile leaves to Python: it would trace the counting, and count what it traced.
_Hook = TypeVar("_Hook", bound=Callable[..., None])
_uncompiled: Callable[[_Hook], _Hook] = torch.compiler.disable


class _Watch:
    """Owner of hooks. A copied or pickled model gets one that does nothing."""

    session: Any = None  # the session.Session that has put it in

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return object.__new__(type(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return object.__new__, (type(self),)


class EntryWatch(_Watch):
    """Where the model is entered: a step begins and ends."""

    def __init__(self, session: Any):
        self.session = session

    @_uncompiled
    def enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> None:
        session = self.session
        if session is None:
            return
        # Without kwargs it is called in a thread that runs while another one starts or stops.
        step = session.begin(entered=True, known=kwargs is not None)
        if kwargs is None or not step.counted:
            return
        entry = Entry(module, args, kwargs, session.local.decoded)
        if entry.shape is not None:
            step.phases, session.local.decoded = entry.phases, entry.decoded
            step.real = entry.real(session.mask, session.options.pad_token_id)
            step.input_ids = entry.input_ids
            if not session.warned:
                session.warn_of_padding(entry)

    @_uncompiled
    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.session is not None:
            self.session.end()


class ExpertWatch(_Watch):
    """Of one expert in a list: the rows that it gets from one block, of several that have it."""

    def __init__(self, session: Any, hooked: object, slot: int):
        self.session, self.hooked, self.slot = session, hooked, slot

    @_uncompiled
    def called(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> None:
        step = None if self.session is None else self.session.step
        if step is None or step.rows is None or step.hooked is not self.hooked:
            return
        given = args[0] if args else next(iter((kwargs or {}).values()), None)
        if isinstance(given, Tensor):
            step.rows[self.slot] += len(given) if given.dim() == 2 else given.shape[:-1].numel()
            if step.filled is not None:
                step.filled[self.slot] += int((given.detach() != 0).any(-1).sum())


class Ran(NamedTuple):
    """What the experts of a layer got in one call, see `Step`."""

    rows: list[int] | None
    filled: list[int] | None
    call: tuple[tuple[Any, ...], dict[str, Any]] | None
    output: Any  # of the router, where nobody has looked at it yet


def _is_on_host(output: Any) -> bool:
    parts = output if isinstance(output, tuple | list) else [output]
    return all(part.is_cpu for part in parts if isinstance(part, Tensor))


def _without_values(tensor: Tensor) -> Tensor:
    """Its shape alone, of numbers that are no indices."""
    return tensor.to("meta") if tensor.is_floating_point() else tensor


class LayerWatch(_Watch, Observer):
    """Of one block: its time, and what its router chose."""

    def __init__(self, session: Any, index: int, site: Site):
        self.session, self.index, self.site = session, index, site
        self._handles: list[RemovableHandle] = []
        path = site.layer.name.removeprefix(site.layer.block).lstrip(".")
        self._router_of = attrgetter(path)
        self._heard: nn.Module | None = None  # the router that has the hook
        self._top_k = top_k_owner(site.router, site.block, site.layer.top_k)
        self._rows, self._bias_looked_for = ExpertRows(site), False
        quantized = isinstance(site.experts, QuantizedExperts)
        self._in_c = quantized and not calls_one_by_one(site.block, site.experts)
        self._hooked: object = None  # another object each time that hooks were put in

    # ---- a patched block ----

    @_uncompiled
    def routed(self, event: Routed) -> None:
        step = None if self.session is None else self.session.step
        if step is None or not step.entered:
            step = self._step(event.hidden)
        if step is None or not step.counted:
            return
        event = event._replace(hidden=None)  # it isn't kept until the end of the step
        step.count(event.routing, partial(self._count, step, event))
        if not step.entered:
            self.session.end()

    def _count(self, step: Step, event: Routed) -> None:
        """Of a block that is patched, and of one that is not."""
        event = event._replace(routing=event.routing.on_host())
        null = getattr(vars(self.site.block).get(STATE), "null", None)
        last = self.session.last_router[self.index]
        if event.router is not last[0] or null is not last[1]:
            self._name(event.router, null)
        self.session.add(self.index, step, event)

    @contextmanager
    def stock(self, hidden: Tensor) -> Iterator[None]:
        if self.session is None:
            yield
            return
        hooked = object()
        inside = list(self._hook_inside(hooked))
        self._hooked = hooked
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
            hooked = object()
            self._handles = [*self._hook_inside(hooked)]
            block = self.site.block
            self._handles.append(block.register_forward_pre_hook(self.before, with_kwargs=True))
            self._handles.append(block.register_forward_hook(self.after))
            self._hooked = hooked

    def _hook_inside(self, hooked: object) -> Iterator["RemovableHandle"]:
        site = self.site
        self._heard = heard = self._router_of(site.block)
        yield heard.register_forward_hook(self.heard)
        called = site.chooses == "experts" or self._rows.stacked is not None
        if site.experts is not None and called:
            yield site.experts.register_forward_pre_hook(self.called, with_kwargs=True)
        for expert, slot in self._rows.modules:
            hook = ExpertWatch(self.session, hooked, slot).called
            yield expert.register_forward_pre_hook(hook, with_kwargs=True)

    @_uncompiled
    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> None:
        hidden = args[0] if args else next(iter((kwargs or {}).values()), None)
        step = self._step(hidden)
        if step is None or hidden is None:
            return
        if self._router_of(module) is not self._heard:  # wrapped or replaced since the start
            with self.session.lock:
                if self._hooked is not None:  # else another thread has stopped it
                    self.hook(True)
        step.hidden, step.tokens = hidden, hidden.numel() // hidden.shape[-1]
        if not self._bias_looked_for:
            self._rows.refuse_bias()
            self._bias_looked_for = True
        size, first = self.site.layer.num_experts, not self.session.rows_seen[self.index]
        step.rows = [0] * size if self._rows.listed else None
        step.filled = [0] * size if self._rows.listed and first else None
        step.hooked = self._hooked
        step.span = Span(hidden)

    @_uncompiled
    def heard(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The router has spoken."""
        step = self._step()
        if step is None or step.span is None:
            self._pass_over(step)
            return
        step.output = output
        if _is_on_host(output):  # else the host would wait within the time of the layer
            self._refuse_skips(output)

    def _pass_over(self, step: Step | None) -> None:
        """The router of a block runs whose own hooks did not: was its .forward() called?"""
        session = self.session
        if session is None or session.paused or self.index in session.passed_over:
            return
        if step is not None or (session.step is None and not session.began_before()):
            session.passed_over.add(self.index)

    @_uncompiled
    def called(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> None:
        """The experts get their tokens."""
        if (step := self._step()) is not None:
            step.call = args, kwargs or {}

    @_uncompiled
    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        step = self._step()
        if step is None or step.span is None:  # hooked by another thread since the block began
            return
        # or since then, or when it began, hooks were being put in or taken out
        if step.hooked is None or step.hooked is not self._hooked:
            step.end_layer()
            return
        span, choice = step.span.stop(), self._choice(step)
        output = step.output
        if _is_on_host(output):
            ran = Ran(step.rows, step.filled, step.call, None)
        else:  # what is counted later keeps no hidden states
            call = None if step.call is None else tree_map_only(Tensor, _without_values, step.call)
            ran = Ran(step.rows, step.filled, call, output)
        step.end_layer()
        step.count(choice, partial(self._count_stock, step, choice, span, ran))
        if not step.entered:
            self.session.end()

    def _count_stock(self, step: Step, choice: Routing, span: Span, ran: "Ran") -> None:
        """Of a block that is not patched."""
        self._refuse_skips(ran.output)
        choice, skips = without_empty(choice, self.site.layer.num_experts)
        skips = skips or self._may_skip()
        left_out = self._left_out(ran, choice)
        self._count(step, Routed(STOCK, None, choice, skips, span))
        self.session.add_left_out(self.index, step, left_out)

    def _left_out(self, ran: "Ran", choice: Routing) -> np.ndarray | None:
        """The selections (E + 1,) of each expert that did not run; None: all ran."""
        seen = self.session.rows_seen
        if ran.rows is None:
            seen[self.index] = True
            if ran.call is None or self._rows.stacked is None:
                return None
            return self._rows.left_out_of_call(*ran.call, choice)
        if not seen[self.index] and any(ran.rows):
            self._rows.verify(ran.rows, choice, ran.filled)
            seen[self.index] = True
        return self._rows.left_out(ran.rows, choice)

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

    @torch.no_grad()  # a checkpoint would count the tensors that a graph of it keeps
    def _choice(self, step: Step) -> Routing:
        layer = self._layer()
        if step.call is not None and self.site.chooses == "experts":
            choice = read_experts_call(*step.call, step.tokens, layer)
            return choice._replace(logits=read_logits(step.output, step.tokens, layer))
        if step.output is None:
            raise ValueError(
                f"{layer.name}: the block ran without calling this router. Where torch.compile "
                "had compiled it before, start the profiler first and compile it then"
            )
        return read_choice(step.output, step.tokens, layer)

    def _layer(self) -> Layer:
        """With the k that router or block have now: a user may change it."""
        layer = self.site.layer
        if self._top_k is None or (k := self._top_k[0].get(self._top_k[1])) == layer.top_k:
            return layer
        return replace(layer, top_k=k)

    def _name(self, router: Any, null: Any) -> None:
        self.session.last_router[self.index] = router, null
        name = OWN_IN_C if router is None else router if router is STOCK else repr(router)
        if null is not None and router is not STOCK:
            name += f" on this null: {null.describe()}"
        names = self.session.routers[self.index]
        if name not in names:
            names.append(name)

    def _may_skip(self) -> bool:
        """Are its experts moeprof's, which leave a slot of -1 out? The model's own can't."""
        return self._in_c or self._implementation() == "moeprof"

    def _implementation(self) -> str | None:
        """Of transformers 5 the name of its experts' implementation."""
        config = getattr(self.site.experts, "config", None)
        return getattr(config, "_experts_implementation", None)

    def _runs_empty(self) -> bool:
        """Do its experts leave out a slot of E? transformers' grouped ones do on several ranks."""
        alone = getattr(self.site.experts, "_is_expert_parallel", True) is False
        return not alone or self._implementation() in (None, "eager")

    def _refuse_skips(self, output: Any) -> None:
        if self._may_skip() or not isinstance(output, tuple | list):
            return
        num_experts = self.site.layer.num_experts
        for part in output:
            if isinstance(part, Tensor) and not part.is_floating_point():
                if part.dtype == torch.bool or not part.numel():
                    continue
                if int(part.min()) < 0:
                    slot = "-1"
                elif not self._runs_empty() and int(part.max()) == num_experts:
                    slot = f"{num_experts}, the number of experts"
                else:
                    continue
                instead = "patch the model first, moeprof.patch(model)"
                if self._implementation() is not None:
                    instead += ', or model.set_experts_implementation("moeprof")'
                raise ValueError(
                    f"{self.site.layer.name}: the router skipped a slot ({slot}), and the block "
                    "as transformers wrote it can't: it would fail or compute garbage; " + instead
                )
