"""What runs in place of the forward of a patched block that is *fused*: one call of a backend.

A block is fused that does nothing but to call its gate and its experts; the others are in seam.py.
"""

import warnings
from contextlib import ExitStack
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.ops import run_experts, run_moe
from ..backends.tables import (
    Matrices,
    WeightTable,
    ids_obstacle,
    routing_obstacle,
    tensor_obstacle,
)
from ..models.blocks import not_runnable
from ..models.guards import explained
from ..models.routing import Routing
from ..routers import Router
from .callables import read_routing
from .install import run_stock
from .layer import PatchedLayer
from .observers import Routed, observers_of
from .span import Span
from .state import STATE


def block_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of a fused block; bound to the block, so that a copy uses its own weights."""
    layer: PatchedLayer | None = vars(self).get(STATE)
    if layer is None:  # unpatched since this forward was looked up
        return run_stock(self, *args, **kwargs)
    hidden_states = _only(self, args, kwargs)
    observers = observers_of(self)
    span = Span(hidden_states) if observers else None
    family = layer.family
    table, reason = layer.table(self)
    if reason := reason or input_obstacle(table, hidden_states):
        return own_forward(self, layer, reason, (hidden_states,), {})
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    said = family.route(self, x, layer.name)
    out, routing = _run(self, layer, x, said, table)
    tell(self, layer, hidden_states, routing, said.expert_ids is not None, span)
    return family.output(self, hidden_states, out.reshape(hidden_states.shape), said)


def _only(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The one argument of a fused block, also by the name that its class has for it."""
    if len(args) == 1 and not kwargs:
        return args[0]
    given = signature(type(block).forward).bind(block, *args, **kwargs).args
    return given[1]


def tell(
    block: nn.Module,
    layer: PatchedLayer,
    hidden_states: Tensor,
    routing: Routing,
    chosen: bool,
    span: Span | None,
) -> None:
    """Tell callbacks and observers what ran. chosen: by a gate of a user; span: of the call, where
    one was observed."""
    if span is not None:
        span.stop()
    elif not layer.callbacks:
        return
    routing = routing.detached()
    for callback in layer.callbacks:
        # It may write there: the logits are the model's too, and observers read all of it.
        callback(layer.index, routing.copied(logits_only=span is None))
    if span is not None:
        skips = layer.router is None and chosen
        event = Routed(layer.router, hidden_states, routing, skips, span)
        for observer in observers_of(block):
            observer.routed(event)


def _run(
    block: nn.Module, layer: PatchedLayer, x: Tensor, said: Routing, table: Matrices
) -> tuple[Tensor, Routing]:
    """(the output (T, H), the routing that ran) of x (T, H), after what the gate said of it."""
    chosen = choose_in_python(layer, said)
    if chosen is not None:
        return _run_chosen(layer, x, *chosen, table, said.logits)
    assert said.logits is not None
    spec, operands = layer.spec(block)
    given = said.logits if said.logits.dtype == x.dtype else said.logits.float()
    out, weights, experts, counts, rejections = run_moe(x, given, table, spec, operands, layer.name)
    if layer.cap is not None:
        layer.cap.see(rejections)
    return out, Routing(weights, experts, counts, rejections, said.logits)


def choose_in_python(layer: PatchedLayer, said: Routing) -> tuple[Tensor | None, Tensor] | None:
    """(weights, expert_ids) where a user's gate or a callable chooses; None where a
    backend does."""
    router = layer.router
    if router is None and said.expert_ids is not None:  # a user's gate has chosen
        return said.weights, said.expert_ids
    if said.logits is None:
        raise ValueError(
            f"Router output format unexpected: {layer.name}: the router {router!r} works on "
            "logits, and the gate returned weights and indices only"
        )
    if router is not None and not isinstance(router, Router):
        return read_routing(router(said.logits), said.logits, layer.title)
    return None


def _run_chosen(
    layer: PatchedLayer,
    x: Tensor,
    routing_weights: Any,
    expert_ids: Tensor,
    table: Matrices,
    logits: Tensor | None,
) -> tuple[Tensor, Routing]:
    reason = routing_obstacle(expert_ids, routing_weights, table)
    if reason := reason or ids_obstacle(expert_ids, table):
        raise ValueError(f"{layer.title}: {reason}")
    out = run_experts(x, expert_ids, routing_weights, table, layer.title)
    return out, ran(layer, routing_weights, expert_ids, logits)


def ran(
    layer: PatchedLayer, routing_weights: Tensor, expert_ids: Tensor, logits: Tensor | None
) -> Routing:
    """The routing of experts that ran, which was given."""
    ids = expert_ids.to(dtype=torch.int32)
    ids = ids.masked_fill(ids == layer.num_experts, -1)  # an empty slot too
    counts = (ids >= 0).sum(1, dtype=torch.int32)
    return Routing(routing_weights.float(), ids, counts, counts, logits)


def input_obstacle(table: Matrices, hidden_states: Tensor) -> str | None:
    if isinstance(table, WeightTable):
        if (
            type(hidden_states) is Tensor
            and hidden_states.dtype is table.dtype
            and hidden_states.shape[-1] == table.hidden_size
            and hidden_states.is_cpu
            and hidden_states.layout is torch.strided
            and not hidden_states.is_neg()
        ):
            return None
    reason = hidden_obstacle(table, hidden_states)
    if not reason and hidden_states.shape[-1] != table.hidden_size:
        width = hidden_states.shape[-1]
        reason = f"the hidden states: {width} columns, the experts have {table.hidden_size}"
    return reason


def hidden_obstacle(table: Matrices, hidden_states: Tensor) -> str | None:
    """Why hidden states don't go with a layer's experts, or None; their width is not looked
    at."""
    tensors = [table.matrices[0], hidden_states]
    reason = tensor_obstacle(tensors, table.storage, table.backend)
    return f"the hidden states: {reason}" if reason else None


def own_forward(
    block: nn.Module,
    layer: PatchedLayer,
    reason: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """The forward that the model had before any patch, or an error where that is asked for."""
    if layer.strict:
        raise RuntimeError(not_runnable(layer.name, explained(reason, block)))
    if layer.fallback is None:
        reason = explained(reason, block)
        warn_fallback(layer.name, reason)
        layer.fallback = reason
    hidden_states = first_of(args, kwargs)
    with ExitStack() as observed:
        for observer in observers_of(block):
            observed.enter_context(observer.stock(hidden_states))
        return run_unpatched(block, layer, *args, **kwargs)


def first_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The hidden states that a block is called with: the first argument, or the keyword."""
    return args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))


def run_unpatched(module: nn.Module, layer: PatchedLayer, *args: Any, **kwargs: Any) -> Any:
    """Call the forward that a module of this layer had before any patch.

    From the layer on, not from the module: another thread may have unpatched that.
    """
    for changed, forward in layer.unpatched:
        if changed is module and forward is not None:
            return forward(*args, **kwargs)
    return type(module).forward(module, *args, **kwargs)


def warn_fallback(name: str, reason: str) -> None:
    """Say that a layer does not run on moeprof's path."""
    warnings.warn(f"moeprof: {name} runs the model's own forward: {reason}", stacklevel=3)
