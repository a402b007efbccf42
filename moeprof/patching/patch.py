"""patch() and unpatch(): the forward of MoE blocks swapped for the C path, and put back."""

import sys
import types
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from inspect import cleandoc
from time import perf_counter_ns
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..backends.ops import routing_obstacle, run_experts, run_moe, tensor_obstacle
from ..checks import check_model
from ..models.families.base import Adapter, RouterOutput
from ..models.find import adapter_of, find_moe_blocks, not_runnable
from ..models.guards import explained
from ..models.names import gate_name, layer_keys, layer_labels, spans
from ..null import LayerNull, resolve_null
from ..routers import Router, TopK, make_router
from ..routers.base import warn_if_capped
from ..routers.table import all_lines, describe
from .callables import read_routing
from .linears import PatchedLinear, find_linears, linear_forward
from .observers import rehook, watches_of
from .state import STATE, Patched

NORMS = ("model", "none", "sum", "mass")
UNDO_ALL = "moeprof.unpatch(model) removes all"


class Routing(NamedTuple):
    """Which experts ran for T tokens; k_max slots each.

    weights : (T, k_max) float32
    experts : (T, k_max) int32, best first, padded with -1; with a user's own router in the
        user's order, -1 wherever that router skipped a slot
    counts : (T,) int32, experts of each token
    rejections : (T,) int32, the router's count before min_k and max_k; may be 0
    logits : (T, E), what the gate said; None where a user's gate gave weights only
    """

    weights: Tensor
    experts: Tensor
    counts: Tensor
    rejections: Tensor
    logits: Tensor | None


@dataclass(eq=False)
class PatchedLayer(Patched):
    """What a patched block carries: "model.layers.0.mlp"."""

    index: int  # among the model's MoE blocks
    num_experts: int
    adapter: type[Adapter]
    router: Router | Callable | None  # None: the model's own top-k
    null: LayerNull | None
    norm: str
    strict: bool
    on_routing: Callable[[int, Routing], None] | None = None
    fallback: str | None = None  # why the model's own forward runs, once it does
    cap: "CapWatch | None" = None  # of a router on a null whose max_k is None
    _spec: tuple | None = None  # the model's settings, and what `spec` made of them

    def spec(self, settings: tuple[int, bool]) -> tuple:
        """The routing arguments of `moe_op`.

        settings: (top_k, norm_topk_prob) of the model. They are read in every call, and the
        arguments made anew when they have changed.
        """
        if self._spec is None or self._spec[0] != settings:
            self._spec = settings, self._make_spec(*settings)
        return self._spec[1]

    def _make_spec(self, top_k: int, norm_topk_prob: bool) -> tuple:
        router = TopK(top_k) if self.router is None else self.router
        norm = self.norm
        if norm == "model":
            norm = "sum" if norm_topk_prob else "none"
        name, parameters, *rest, (form, score, p_table), table = router.spec(
            self.num_experts, norm=norm, norm_k=top_k, null=self.null
        )
        tables = (None if t is None else torch.from_numpy(t) for t in (p_table, table))
        return (name, list(parameters), *rest, form, score, *tables)


@dataclass(eq=False)
class CapWatch:
    """Of all layers of one patch: how often the cap that max_k=None is cut a token's experts."""

    cap: int
    num_experts: int
    tokens: int = 0
    capped: int = 0
    warned: bool = False

    def see(self, rejections: Tensor) -> None:
        """Count the tokens of one call, rejections (T,); warn once in the life of the patch."""
        if self.warned or torch.compiler.is_compiling() or type(rejections) is not Tensor:
            return
        self.tokens += len(rejections)
        capped = np.count_nonzero(rejections.numpy() > self.cap)
        if capped:  # rarely; a decode step goes by in some microseconds
            self.capped += capped
            self.warned = warn_if_capped(
                self.capped,
                self.tokens,
                self.num_experts,
                unit="tokens of all layers so far",
                stacklevel=3,
            )


class Handle:
    """A patch that is in place. As a context manager it unpatches at the end of the block."""

    def __init__(
        self,
        blocks: list[tuple[nn.Module, PatchedLayer]],
        linears: list[tuple[nn.Module, PatchedLinear]],
        skipped: dict[str, str],
    ):
        self._blocks = blocks
        self._linears = linears
        self._skipped = skipped

    @property
    def layers(self) -> list[PatchedLayer]:
        """The patched layers, in the order of the model."""
        return [layer for _, layer in self._blocks]

    @property
    def linears(self) -> list[str]:
        """The names of the linear layers that ``linears=True`` patched."""
        return [linear.name for _, linear in self._linears]

    @property
    def fallbacks(self) -> dict[str, str]:
        """{layer name: reason} of the layers that run the model's own forward."""
        ran = {layer.name: layer.fallback for layer in self.layers if layer.fallback}
        return self._skipped | ran

    @property
    def active(self) -> bool:
        """True while the patch is in place."""
        patched = [*self._blocks, *self._linears]
        return any(state in _chain(module) for module, state in patched)

    def on_routing(self, callback: Callable[[int, Routing], None] | None) -> None:
        """Call ``callback(layer_index, routing)`` after each layer's call; None ends it."""
        if callback is not None and not callable(callback):
            raise TypeError(f"on_routing: expected a function or None, got {callback!r}")
        for layer in self.layers:
            layer.on_routing = callback

    def unpatch(self) -> None:
        """Put the model back as it was; without effect where that was done already.

        Raises
        ------
        RuntimeError
            If the model was patched again since: the last patch has to go first. Nothing is
            changed then.
        """
        patched = [*self._blocks, *self._linears]
        mine = [(module, state) for module, state in patched if state in _chain(module)]
        if any(vars(module)[STATE] is not state for module, state in mine):
            raise RuntimeError(
                "unpatch: the model was patched again after this patch; unpatch that one first"
            )
        for module, _ in mine:
            _restore(module)

    def __enter__(self) -> "Handle":
        for _, state in [*self._blocks, *self._linears]:
            state.ends_by_itself = True
        return self

    def __exit__(self, *exception) -> None:
        self.unpatch()

    def __repr__(self) -> str:
        what = _in_words(self.layers)
        linears = f", {len(self._linears)} linears" if self._linears else ""
        return f"<moeprof.Handle: {what}{linears}, {self._state()}>"

    def _state(self) -> str:
        """Of this patch and of others on the same blocks, in words."""
        patched = [*self._blocks, *self._linears]
        if self.active:
            under = any(vars(m).get(STATE) is not s for m, s in patched if s in _chain(m))
            return "patched, but a later patch is the one that runs" if under else "patched"
        before = {id(earlier) for _, s in patched for earlier in _earlier(s)}
        others = {id(s): s for module, _ in patched for s in _chain(module)}
        if not others:
            return "not patched"
        which = "an earlier" if others.keys() & before else "a later"
        return f"not patched; the model is still patched by {which} patch, {UNDO_ALL}"


def patch(
    model: nn.Module,
    router: str | Router | Callable | list | dict | None = None,
    *,
    null=None,
    norm: str = "model",
    strict: bool = True,
    linears: bool = False,
    **router_parameters,
) -> Handle:
    """Run the model's MoE blocks in C, with the model's own router or another.

    Only the experts that a token is routed to are computed. Neither the original top-k nor
    the original forward runs.

    A model that is patched already gets this patch on top: it runs until its handle's
    ``unpatch()``, then the earlier one does again, and ``moeprof.unpatch(model)`` removes all.
    There is a warning then, since a notebook cell that runs twice does this, unless the
    earlier patch stands in a ``with`` block, which ends it.

    Parameters
    ----------
    model : torch.nn.Module
        Any model with ``OlmoeSparseMoeBlock`` in it, of transformers 4.57 or 5, on the CPU.
    router : str, Router, callable, list, dict or None
        None is the model's own top-k. A name takes its parameters as keywords:
        ``patch(model, "bh", alpha=0.3, max_k=8)``. A list has one of these for each layer; a
        dict has them by the layer's own number, its block's name or its gate's, and the layers
        that it leaves out keep the model's own. A callable takes the logits (T, E) and returns a
        routing: weights (T, E), zero where an expert is not selected; or (weights (T, k), experts
        (T, k)), -1 for an empty slot; or what moeprof's routing functions return. Its weights
        are used as they are, `norm` does not touch them. It is slower: for trying ideas.
    null : Null, str, path or None
        Where the p-values of the router come from: a fitted null, the path of a saved one, or
        "normal". None is "normal", with a warning.
    norm : {"model", "none", "sum", "mass"}
        The weights of the selected experts, from the softmax p over all: "none" p_e; "sum"
        p_e / sum p; "mass" scaled to the mass of the model's own top-k; "model" is "sum" where
        the model has norm_topk_prob and "none" elsewhere.
    strict : bool
        A layer that can't run in C raises; with False it runs its own forward, with one
        warning, and ``handle.fallbacks`` names it.
    linears : bool
        Also run the plain ``nn.Linear`` layers around the MoE blocks (the attention's
        projections, lm_head) in C wherever the input has at most 64 rows and no gradient is
        wanted, as in decoding: torch reads their weights at half the memory's speed. Small
        layers, where that does not pay, stay with torch, as do those that have a forward of
        their own.
        ``handle.linears`` names them. The results differ by the order of fp32 sums.

    Returns
    -------
    Handle
        ``handle.unpatch()``, or ``with moeprof.patch(model) as handle:``.

    Raises
    ------
    ValueError
        "No routers found ..." for a model without such a block; a layer that can't run in C;
        a parameter out of range; a null fitted to another model. The model is as it was.
    TypeError
        For what is no model, router or null.
    """
    if norm not in NORMS:
        raise ValueError(f"norm: expected one of {NORMS}, got {norm!r}")
    check_model("patch", model)
    blocks = find_moe_blocks(model)
    routers = routers_by_layer(router, [name for name, _ in blocks], router_parameters)
    nulls = _layer_nulls(model, routers, null)
    patched, skipped = [], {}
    for index, (name, block) in enumerate(blocks):
        adapter, name = adapter_of(block), name or type(block).__name__
        if reason := adapter.readable(block)[1]:
            reason = explained(reason, block)
            if strict:
                raise ValueError(not_runnable(name, reason))
            skipped[name] = reason
            continue
        num_experts = adapter.num_experts(block)
        layer = PatchedLayer(
            name, index, num_experts, adapter, routers[index], nulls[index], norm, strict
        )
        if layer.router is None or isinstance(layer.router, Router):
            layer.spec(adapter.settings(block))  # raises before anything is changed
        patched.append((block, layer))
    _watch_caps([layer for _, layer in patched])
    if left := _left_patched(blocks):
        _warn_nested(left)
    for name, reason in skipped.items():
        _warn_fallback(name, reason)
    around = find_linears(model, [block for _, block in blocks]) if linears else []
    dense = [(module, PatchedLinear(name)) for name, module in around]
    for block, layer in patched:
        _install(block, layer, _changes(block, layer))
    for module, linear in dense:
        _install(module, linear, [(module, linear_forward)])
    return Handle(patched, dense, skipped)


def unpatch(model: nn.Module) -> None:
    """Remove all patches from a model, also from a copy of a patched one.

    Raises
    ------
    TypeError
        For what is no torch.nn.Module.
    """
    check_model("unpatch", model)
    for module in list(model.modules()):
        while STATE in vars(module):
            _restore(module)


class OLMoERouterPatcher:
    """patch() under the names of the original notebook.

    moe_blocks : [(name, block)];  original_forwards : {name: forward};  patched : bool
    """

    def __init__(self, model: nn.Module):
        check_model("OLMoERouterPatcher", model)
        self.model = model
        self.moe_blocks = find_moe_blocks(model)
        self.original_forwards = {name: block.forward for name, block in self.moe_blocks}
        self._handles: list[Handle] = []

    @property
    def patched(self) -> bool:
        return any(handle.active for handle in self._handles)

    def patch(self, router: str | Router = "bh", **options) -> Handle:
        """As :func:`patch`; the last patch is the one that runs."""
        self._handles.append(patch(self.model, router, **options))
        return self._handles[-1]

    def unpatch(self) -> None:
        """Remove all patches of this patcher."""
        while self._handles:
            self._handles[-1].unpatch()
            self._handles.pop()


if patch.__doc__:  # python -OO leaves none
    patch.__doc__ = f"{cleandoc(patch.__doc__)}\n\nRouters\n-------\n{all_lines()}\n"


# ---- installing and restoring ----


def routers_by_layer(router, names: list[str], parameters: dict) -> list:
    """For each layer of `names` a Router with scalar parameters, a callable or None."""
    count = len(names)
    if isinstance(router, list | tuple | dict) and parameters:
        raise TypeError(f"patch: {sorted(parameters)} given beside a router for each layer")
    if isinstance(router, dict):
        numbers = layer_keys(names, [gate_name(name) for name in names])
        if unknown := [key for key in router if key not in numbers]:
            raise ValueError(
                f"router: expected layers {spans(layer_labels(names))} or the names of their "
                f"blocks {names} or gates, got {unknown}"
            )
        if len({numbers[key] for key in router}) < len(router):
            raise ValueError(f"router: a layer is named twice in {list(router)}")
        by_number = {numbers[key]: value for key, value in router.items()}
        router = [by_number.get(index) for index in range(count)]
    if isinstance(router, list | tuple):
        if len(router) != count:
            raise ValueError(f"router: expected one for each of {count} layers, got {len(router)}")
        return [_one_router(r, {}, i, count) for i, r in enumerate(router)]
    return [_one_router(router, parameters, index, count) for index in range(count)]


def _one_router(router, parameters: dict, index: int, count: int) -> Router | Callable | None:
    if router is None or (callable(router) and not isinstance(router, Router | type)):
        if parameters:
            raise TypeError(f"patch: {sorted(parameters)} given without a router")
        return router
    return make_router(router, **parameters).at(index, count)


def _layer_nulls(model, routers: list, null) -> list[LayerNull | None]:
    """What each layer's p-values come from; None where its router has none."""
    wanting = [r for r in routers if _on_null(r)]
    if not wanting:
        if null is not None:
            raise ValueError("null: given, but the router does not work on p-values")
        return [None] * len(routers)
    null = resolve_null(null, stacklevel=4)
    if isinstance(null, LayerNull):
        raise TypeError("null: expected a Null with all layers, got a LayerNull")
    null.check(model)
    adapted = {type(router): router.adapt(null) for router in wanting}
    return [adapted[type(r)].layer(i) if _on_null(r) else None for i, r in enumerate(routers)]


def _watch_caps(layers: list[PatchedLayer]) -> None:
    """One CapWatch for the layers whose router has a cap that nobody asked for."""
    watch = None
    for layer in layers:
        cap = layer.router.silent_cap(layer.num_experts) if _on_null(layer.router) else None
        if cap is not None:
            watch = watch or CapWatch(cap, layer.num_experts)
            layer.cap = watch


def _on_null(router) -> bool:
    return isinstance(router, Router) and router.wants_null


# ---- patches upon patches ----


def _left_patched(blocks: list[tuple[str, nn.Module]]) -> list[PatchedLayer]:
    """The layers with a patch that no ``with`` block will end."""
    states = [vars(block).get(STATE) for _, block in blocks]
    return [s for s in states if s is not None and not s.ends_by_itself]


def _warn_nested(left: list[PatchedLayer]) -> None:
    """Tell the user that the model was patched already.

    Not moeprof's own code, which patches in ``with`` blocks and leaves what the user has done.
    """
    caller = sys._getframe(2).f_globals.get("__name__", "")
    if caller.partition(".")[0] == __name__.partition(".")[0]:
        return
    warnings.warn(
        f"patch: the model is patched already ({_in_words(left)}): this patch runs until it is "
        f"unpatched, then that one does again; {UNDO_ALL}",
        stacklevel=3,
    )


def _in_words(layers: list[PatchedLayer]) -> str:
    """ "bh alpha=0.05 max_k=8 on 4 layers"."""
    count = f"{len(layers)} layer{'s' * (len(layers) != 1)}"
    return f"{describe([layer.router for layer in layers])} on {count}" if layers else count


def _changes(block: nn.Module, layer: PatchedLayer) -> list[tuple[nn.Module, Callable]]:
    """(module, its forward while patched), the block first."""
    changes = [(block, _forward)]
    if layer.adapter.gate_forward and layer.adapter.has_stock_gate(block):
        changes.append((block.gate, layer.adapter.gate_forward))
    return changes


def _install(
    patched: nn.Module,
    state: PatchedLayer | PatchedLinear,
    changes: list[tuple[nn.Module, Callable]],
) -> None:
    attributes = [{"forward": types.MethodType(forward, module)} for module, forward in changes]
    attributes[0][STATE] = state
    for (module, _), own in zip(changes, attributes, strict=True):
        state.saved.append((module, {n: vars(module).get(n, _Absent) for n in own}))
    # The block comes last, since another thread may run it from then on.
    for (module, _), own in reversed([*zip(changes, attributes, strict=True)]):
        vars(module).update(own)
    rehook(patched)


def _restore(patched: nn.Module) -> None:
    """Undo the last patch of a module."""
    for module, attributes in vars(patched)[STATE].saved:
        for name, value in attributes.items():
            if value is _Absent:
                vars(module).pop(name, None)
            else:
                vars(module)[name] = value
    rehook(patched)


class _Absent:
    """Stands for "there was no such attribute"; a class, so that copies keep its identity."""


def _chain(module: nn.Module) -> list[PatchedLayer | PatchedLinear]:
    """The patches of a module, the last one first."""
    state = vars(module).get(STATE)
    return [] if state is None else _earlier(state)


def _earlier(state: PatchedLayer | PatchedLinear) -> list[PatchedLayer | PatchedLinear]:
    """A patch and those that it was put upon, itself first."""
    states = []
    while state is not _Absent:
        states.append(state)
        state = state.saved[0][1][STATE]
    return states


# ---- what runs ----


def _forward(self, hidden_states: Tensor):
    """The forward of a patched block; bound to the block, so that a copy uses its own weights."""
    layer = vars(self).get(STATE)
    if layer is None:  # another thread unpatched the block since it looked this forward up
        return self.forward(hidden_states)
    watches = watches_of(self)
    start = perf_counter_ns() if watches else 0
    adapter = layer.adapter
    weights, reason = adapter.readable(self)
    if reason := reason or _input_obstacle(weights[0], hidden_states):
        return _own_forward(self, layer, reason, hidden_states)
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    router = adapter.route(self, x, layer.name)
    out, routing = _run(self, layer, x, router, weights)
    end = perf_counter_ns() if watches else 0
    if layer.on_routing is not None:
        layer.on_routing(layer.index, routing)
    for watch in watches:
        skips = layer.router is None and router.experts is not None
        watch.routed(layer, hidden_states, routing, skips, start, end)
    return adapter.output(out.reshape(hidden_states.shape), router)


def _run(
    block: nn.Module, layer: PatchedLayer, x: Tensor, router: RouterOutput, weights: list[Tensor]
) -> tuple[Tensor, Routing]:
    if layer.router is not None and router.logits is None:
        raise ValueError(
            f"Router output format unexpected: {layer.name}: the router {layer.router!r} works on "
            "logits, and the gate returned weights and indices only"
        )
    if layer.router is None and router.experts is not None:  # a user's gate has chosen
        chosen = router.weights, router.experts
    elif layer.router is None or isinstance(layer.router, Router):
        spec = layer.spec(layer.adapter.settings(block))
        logits = router.logits if router.logits.dtype == x.dtype else router.logits.float()
        out, *routing = run_moe(x, logits, weights, *spec, layer.name)
        if layer.cap is not None:
            layer.cap.see(routing[3])
        return out, Routing(*routing, router.logits)
    else:
        chosen = read_routing(layer.router(router.logits), router.logits, layer.name)
    return _run_chosen(layer, x, *chosen, weights, router.logits)


def _run_chosen(
    layer: PatchedLayer,
    x: Tensor,
    routing_weights: Tensor,
    experts: Tensor,
    weights: list[Tensor],
    logits: Tensor | None,
) -> tuple[Tensor, Routing]:
    if reason := routing_obstacle(experts, routing_weights):
        raise ValueError(f"{layer.name}: {reason}")
    out = run_experts(x, experts, routing_weights, weights, layer.name)
    experts = experts.to(torch.int32)
    experts = experts.masked_fill(experts == layer.num_experts, -1)  # an empty slot too
    counts = (experts >= 0).sum(1, dtype=torch.int32)
    return out, Routing(routing_weights.float(), experts, counts, counts, logits)


def _input_obstacle(weight: Tensor, hidden_states: Tensor) -> str | None:
    reason = tensor_obstacle([weight, hidden_states])
    hidden_size = weight.shape[-1]  # gate (I, H) or gate_up (E, 2I, H)
    if not reason and hidden_states.shape[-1] != hidden_size:
        reason = f"{hidden_states.shape[-1]} columns, the experts have {hidden_size}"
    return f"the hidden states: {reason}" if reason else None


def _own_forward(block: nn.Module, layer: PatchedLayer, reason: str, hidden_states: Tensor):
    """The forward that the model had before any patch, or an error where that is asked for."""
    if layer.strict:
        reason = explained(reason, block)
        raise RuntimeError(not_runnable(layer.name, reason))
    if layer.fallback is None:
        reason = explained(reason, block)
        _warn_fallback(layer.name, reason)
        layer.fallback = reason
    # From the layer on, not from the block: another thread may have unpatched that.
    forward = _earlier(layer)[-1].saved[0][1]["forward"]
    if forward is _Absent:
        forward = types.MethodType(type(block).forward, block)
    with ExitStack() as watched:
        for watch in watches_of(block):
            watched.enter_context(watch.stock(hidden_states))
        return forward(hidden_states)


def _warn_fallback(name: str, reason: str) -> None:
    warnings.warn(f"moeprof: {name} runs the model's own forward: {reason}", stacklevel=3)
