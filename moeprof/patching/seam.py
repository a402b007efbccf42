"""What runs where a patched block does more than to call its gate and its experts.

The block's own forward runs, and its gate and its experts are ours. Both know by `_HERE` which
call of their block they are in; outside one they are what they were.
"""

import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.ops import run_experts, run_route
from ..backends.tables import Matrices, ids_obstacle, routing_obstacle
from ..models.blocks import not_runnable
from ..models.families.rules import OTHER_FORM, is_choice
from ..models.reading import as_logits
from ..models.routing import Routing
from .forward import (
    choose_in_python,
    first_of,
    hidden_obstacle,
    input_obstacle,
    own_forward,
    ran,
    run_unpatched,
    tell,
)
from .install import run_stock
from .layer import PatchedLayer
from .observers import observers_of
from .span import Span
from .state import STATE, inside

OTHER_FORWARD = (
    "gradient checkpointing of a block with another forward than its class's, as accelerate's "
    "hooks put in: switch one of them off"
)


class _Call:
    """One call of a block."""

    def __init__(self, block: nn.Module, layer: PatchedLayer, table: Matrices):
        self.block, self.layer, self.table = block, layer, table
        self.gate, self.experts = layer.family.gate_of(block), layer.family.experts_of(block)
        self.said: Routing | None = None  # what the gate returned
        self.given: tuple[Tensor, Tensor] | None = None  # (weights, expert_ids) that ran

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the function returns; gate and experts are in this call meanwhile."""
        outer, _HERE.call = _HERE.call, self
        try:
            return function(*args, **kwargs)
        finally:
            _HERE.call = outer

    def is_ours(self, expert_ids: Tensor) -> bool:
        """Did a backend choose these?"""
        said = self.said
        return said is not None and said.expert_ids is expert_ids and said.counts is not None

    @property
    def is_stock(self) -> bool:
        """Does transformers choose?"""
        return self.layer.router is None and self.layer.family.has_stock_gate(self.block)

    def ran(self) -> Routing:
        """The routing that ran."""
        assert self.given is not None
        weights, expert_ids = self.given
        said = self.said
        if said is not None and self.is_ours(expert_ids):
            return said
        return ran(self.layer, weights, expert_ids, None if said is None else said.logits)


class _Here(threading.local):
    """Of this thread: the call that it is in, the innermost.

    Set for each thread: torch.compile guards what it found in the instance.
    """

    def __init__(self) -> None:
        self.call: _Call | None = None


_HERE = _Here()


def _call_of(module: nn.Module) -> _Call | None:
    """The call that this gate, or these experts, are in; None outside."""
    call = _HERE.call
    if call is not None and (call.gate is module or call.experts is module):
        return call
    return None


def seam_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The block's forward; bound to the block, so that a copy uses its own weights."""
    layer: PatchedLayer | None = vars(self).get(STATE)
    if layer is None:  # unpatched since this forward was looked up
        return run_stock(self, *args, **kwargs)
    hidden_states = first_of(args, kwargs)
    span = Span(hidden_states) if observers_of(self) else None
    table, reason = layer.table(self)
    if reason := reason or hidden_obstacle(table, hidden_states):
        return own_forward(self, layer, reason, args, kwargs)
    call = _Call(self, layer, table)
    with nullcontext() if torch.compiler.is_compiling() else inside(layer):
        if vars(self).get(STATE) is not layer:  # another thread unpatched the block meanwhile
            return run_unpatched(self, layer, *args, **kwargs)
        if reason := _replaced(call):
            return own_forward(self, layer, reason, args, kwargs)
        if vars(self).get("gradient_checkpointing"):
            if layer.unpatched[0][1] is not None:
                return own_forward(self, layer, OTHER_FORWARD, args, kwargs)
            output = call.run(type(self).forward, _entering(call), *args, **kwargs)
        else:
            output = call.run(run_unpatched, self, layer, *args, **kwargs)
    if layer.router is not None and call.said is None:
        raise ValueError(
            f"{layer.title}: its block chose experts without a call of its router, so no other "
            "router can take its place: patch without one, or install a newer transformers"
        )
    if (layer.callbacks or span) and call.given is not None:
        by_user = not layer.family.has_stock_gate(self)
        tell(self, layer, hidden_states, call.ran(), by_user, span)
    return output


def _entering(call: _Call) -> nn.Module:
    """The call's block, for a class whose forward puts itself into a checkpoint.

    In transformers 5.24 a decoder layer does so, and in Gemma 4 that is the block. What backward
    computes again is the class's forward, without ours around it: here it enters a call first.
    """
    block = call.block
    checkpoint: Any = block._gradient_checkpointing_func
    again = partial(_again, block, call.layer, call.table)
    twin: nn.Module = object.__new__(type(block))
    vars(twin).update(vars(block))
    vars(twin)["_gradient_checkpointing_func"] = lambda function, *args: checkpoint(
        partial(again, function), *args
    )
    return twin


def _again(
    block: nn.Module, layer: PatchedLayer, table: Matrices, function: Callable[..., Any], *args: Any
) -> Any:
    """What a checkpoint runs: at once, in the call that made it, and again in backward."""
    if _HERE.call is not None and _HERE.call.block is block:
        return function(*args)
    with inside(layer):
        if vars(block).get(STATE) is not layer:
            raise RuntimeError(
                f"{layer.name}: patched or unpatched before backward(), which computes it again "
                "with gradient checkpointing: keep the patch until after backward()"
            )
        return _Call(block, layer, table).run(function, *args)


def _replaced(call: _Call) -> str | None:
    """What of the block is no longer what was patched, or None."""
    for part, forward in ((call.gate, gate_forward), (call.experts, experts_forward)):
        own = vars(part).get("forward")
        if getattr(own, "__func__", None) is not forward:
            return f"its {type(part).__name__} was put in after patch: unpatch, and patch again"
    return None


def gate_forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The gate's forward: it returns what it did, with our choice of experts."""
    call = _call_of(self)
    if call is None:
        return run_stock(self, hidden_states, *args, **kwargs)
    layer = call.layer
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    is_stock = layer.family.has_stock_gate(call.block)
    recorded: Any = None
    rest: tuple[Any, ...] = ()
    if layer.own_logits and is_stock:
        recorded = layer.family.reader.logits(self, x)
        said = Routing(None, None, logits=recorded)
    else:
        output = run_unpatched(self, layer, hidden_states, *args, **kwargs)
        if is_stock:
            if not is_choice(output):
                return _as_it_is(layer, output)
            said = _stock_choice(output, layer.num_experts)
        else:
            said = layer.family.read(output, len(x), layer.num_experts, layer.name)
        if layer.router is None:
            call.said = said
            return output
        if is_stock:
            recorded, rest = output[0], output[3:]
        elif said.logits is not None:
            recorded = said.logits
    call.said = _choose(call, said, x)
    return recorded, call.said.weights, call.said.expert_ids, *rest


def _as_it_is(layer: PatchedLayer, output: Any) -> Any:
    """What a router of transformers returns in a form that only its own block knows."""
    if layer.router is not None:
        raise ValueError(
            f"Router output format unexpected: {layer.title}: {OTHER_FORM}, so no other router can "
            "take its place: patch without one, or install a newer transformers (5.24 is known)"
        )
    return output


def _stock_choice(output: Any, num_experts: int) -> Routing:
    """What a router of transformers returns: logits or probabilities, weights, indices; what
    comes after them is for its block."""
    logits, weights, expert_ids = output[:3]
    # One of more columns has a choice that is no expert.
    known = logits.shape[-1] == num_experts
    return Routing(weights, expert_ids, logits=as_logits(logits) if known else None)


def _choose(call: _Call, said: Routing, x: Tensor) -> Routing:
    """The routing of hidden states x (T, H) of which the gate said `said`."""
    layer = call.layer
    chosen = choose_in_python(layer, said)
    if chosen is not None:
        return Routing(*chosen, logits=said.logits)
    assert said.logits is not None
    spec, operands = layer.spec(call.block)
    given = said.logits if said.logits.dtype == x.dtype else said.logits.float()
    routing = run_route(given, x, spec, operands, layer.name, call.table.backend)
    if layer.cap is not None:
        layer.cap.see(routing[3])
    return Routing(*routing, logits=said.logits)


def experts_forward(
    self: Any, hidden_states: Tensor, expert_ids: Tensor, routing_weights: Tensor
) -> Tensor:
    """The experts' forward: what the block gives them, whoever chose it."""
    call = _call_of(self)
    if call is None:
        out: Tensor = run_stock(self, hidden_states, expert_ids, routing_weights)
        return out
    name = call.layer.title
    reason = input_obstacle(call.table, hidden_states)
    reason = reason or routing_obstacle(expert_ids, routing_weights, call.table)
    if not (call.is_ours(expert_ids) or call.is_stock):
        reason = reason or ids_obstacle(expert_ids, call.table)
    if reason:
        raise RuntimeError(not_runnable(name, reason))
    call.given = routing_weights, expert_ids
    return run_experts(hidden_states, expert_ids, routing_weights, call.table, name)
