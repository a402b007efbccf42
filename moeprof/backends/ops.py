"""The experts of a layer, by the backend of its table; in C as torch operators.

These are opaque to torch.compile, and counted by torch's FlopCounterMode: ``moeprof::experts``
runs a routing that is given, ``moeprof::moe`` routes and runs in one call, ``moeprof::route``
routes, ``moeprof::linear`` is a linear layer whose weight is quantised.
"""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .base import Backend, MoEOutput
from .c import C
from .spec import RouteSpec, max_k_of
from .tables import (
    Activation,
    Matrices,
    Storage,
    WeightTable,
    num_experts_of,
    sizes_of,
)
from .torch.backend import TORCH

BACKENDS: dict[str, Backend[Any]] = {"c": C, "torch": TORCH}


def unobserved(*tensors: Tensor) -> bool:
    """True if nobody but the caller has to see an operator run.

    Neither a compiler or tracer, nor a mode (FlopCounterMode, a default device), nor the
    profiler, nor autograd: then the function behind the operator can be called itself. The
    way through the dispatcher costs some 40 us, a decode step of a small layer 20.
    """
    c = torch._C
    return not (
        torch.compiler.is_compiling()
        or c._len_torch_dispatch_stack()
        or c._len_torch_function_stack()
        or c._get_tracing_state() is not None
        or c._functorch.peek_interpreter_stack() is not None
        or torch.autograd._profiler_enabled()  # type: ignore[attr-defined]  # of C++
        or torch.autograd.forward_ad._current_level >= 0
        or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    )


# ---- the operators: on tensors, since a dispatcher knows no tables ----


def _experts(
    hidden: Tensor,
    expert_ids: Tensor,
    routing_weights: Tensor,
    matrices: list[Tensor],
    activation: str,
    storage: str,
    name: str,
) -> Tensor:
    table = WeightTable(matrices, Activation.from_text(activation), Storage.from_text(storage))
    return _run_experts(hidden, expert_ids, routing_weights, table, name)


experts_op = torch.library.custom_op("moeprof::experts", _experts, mutates_args=())


@experts_op.register_fake
def _(
    hidden: Tensor,
    expert_ids: Tensor,
    routing_weights: Tensor,
    matrices: list[Tensor],
    activation: str,
    storage: str,
    name: str,
) -> Tensor:
    return torch.empty_like(hidden)


def _moe(
    hidden: Tensor,
    logits: Tensor,
    matrices: list[Tensor],
    activation: str,
    storage: str,
    spec: str,
    p_table: Tensor | None,
    table: Tensor | None,
    name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    arrays = (None if t is None else t.numpy() for t in (p_table, table))
    given = RouteSpec.from_operands(spec, *arrays)
    experts_table = WeightTable(
        matrices, Activation.from_text(activation), Storage.from_text(storage)
    )
    output, weights, experts, counts, rejections = _run_moe(
        hidden, logits, experts_table, given, name
    )
    return output, weights, experts, counts, rejections


moe_op = torch.library.custom_op("moeprof::moe", _moe, mutates_args=())


@moe_op.register_fake
def _(
    hidden: Tensor,
    logits: Tensor,
    matrices: list[Tensor],
    activation: str,
    storage: str,
    spec: str,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens = hidden.shape[0]
    slots = hidden.new_empty((tokens, max_k_of(spec)), dtype=torch.int32)
    counts = hidden.new_empty((tokens,), dtype=torch.int32)
    return (torch.empty_like(hidden), slots.float(), slots, counts, torch.empty_like(counts))


def _route(
    logits: Tensor,
    hidden: Tensor,
    spec: str,
    p_table: Tensor | None,
    table: Tensor | None,
    name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arrays = (None if t is None else t.numpy() for t in (p_table, table))
    return _run_route(logits, hidden, RouteSpec.from_operands(spec, *arrays), name)


route_op = torch.library.custom_op("moeprof::route", _route, mutates_args=())


@route_op.register_fake
def _(
    logits: Tensor, hidden: Tensor, spec: str, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens = logits.shape[0]
    slots = logits.new_empty((tokens, max_k_of(spec)), dtype=torch.int32)
    counts = logits.new_empty((tokens,), dtype=torch.int32)
    return slots.float(), slots, counts, torch.empty_like(counts)


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, features: int, format: str, name: str
) -> Tensor:
    return C.quantized_linear(x, weight, bias, features, format)


linear_op = torch.library.custom_op("moeprof::linear", _linear, mutates_args=())


@linear_op.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, features: int, format: str, name: str
) -> Tensor:
    return x.new_empty((x.shape[0], features))


def _run_experts(
    hidden: Tensor, expert_ids: Tensor, routing_weights: Tensor, table: Any, name: str
) -> Tensor:
    try:
        return BACKENDS[table.backend].experts(hidden, expert_ids, routing_weights, table)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _run_route(
    logits: Tensor, hidden: Tensor, spec: RouteSpec, name: str, backend: str = "c"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    try:
        return BACKENDS[backend].route(logits, spec, hidden.dtype)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _run_moe(hidden: Tensor, logits: Tensor, table: Any, spec: RouteSpec, name: str) -> MoEOutput:
    try:
        return BACKENDS[table.backend].moe(hidden, logits, table, spec)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


# ---- gradients: refused, never dropped ----


# What stands before the name of a class of experts that were called by themselves.
BY_ITSELF = "experts_forward: "


def _instead(name: str, tensors: Sequence[Any] = ()) -> str:
    """What a user does who wants gradients from the experts of this name."""
    if any(isinstance(t, Tensor) and t.dtype == torch.uint8 for t in tensors):
        return "its weights are quantised: train the model that they were made from"
    if name.startswith(BY_ITSELF):
        return 'choose other experts for that, model.set_experts_implementation("grouped_mm")'
    return 'unpatch the model for that, or patch it with backend="torch", which trains'


def _remember_name(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors = [t for given in inputs for t in (given if isinstance(given, list) else [given])]
    ctx.layer_name, ctx.instead = inputs[-1], _instead(inputs[-1], tensors)


def _refuse(ctx: Any, *gradients: Any) -> NoReturn:
    raise RuntimeError(f"{ctx.layer_name}: the C path has no backward to train with; {ctx.instead}")


experts_op.register_autograd(_refuse, setup_context=_remember_name)
moe_op.register_autograd(_refuse, setup_context=_remember_name)
route_op.register_autograd(_refuse, setup_context=_remember_name)
linear_op.register_autograd(_refuse, setup_context=_remember_name)


def run_experts(
    hidden: Tensor, expert_ids: Tensor, routing_weights: Tensor, table: Matrices, name: str
) -> Tensor:
    """`experts_op`, without the dispatcher where nothing observes."""
    matrices = [*table.matrices]
    if table.backend == "torch" or unobserved(hidden, routing_weights, *matrices):
        return _run_experts(hidden, expert_ids, routing_weights, table, name)
    _refuse_tangents(name, hidden, routing_weights, *matrices)
    how = table.activation.as_text(), table.storage.as_text()
    return experts_op(hidden, expert_ids, routing_weights, matrices, *how, name)


def run_moe(
    hidden: Tensor, logits: Tensor, table: Matrices, spec: RouteSpec, operands: Any, name: str
) -> MoEOutput:
    """`moe_op`, without the dispatcher where nothing observes; operands: `operands_of(spec)`."""
    matrices = [*table.matrices]
    if table.backend == "torch" or unobserved(hidden, logits, *matrices):
        return _run_moe(hidden, logits, table, spec, name)
    _refuse_tangents(name, hidden, logits, *matrices)
    how = table.activation.as_text(), table.storage.as_text()
    return MoEOutput(*moe_op(hidden, logits, matrices, *how, *operands, name))


def run_route(
    logits: Tensor, hidden: Tensor, spec: RouteSpec, operands: Any, name: str, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`route_op`, without the dispatcher where nothing observes; of the hidden states the dtype
    counts."""
    if backend == "torch" or unobserved(logits):
        return _run_route(logits, hidden, spec, name, backend)
    _refuse_tangents(name, logits)
    weights, expert_ids, counts, rejections = route_op(logits, hidden, *operands, name)
    return weights, expert_ids, counts, rejections


def run_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, features: int, format: str, name: str
) -> Tensor:
    """`linear_op`, without the dispatcher where nothing observes."""
    if unobserved(x, weight):
        return C.quantized_linear(x, weight, bias, features, format)
    _refuse_tangents(name, x, weight)
    return linear_op(x, weight, bias, features, format, name)


def operands_of(spec: RouteSpec) -> tuple[str, Tensor | None, Tensor | None]:
    """What `moe_op` is given of a spec."""
    text, *arrays = spec.operands()
    p_table, table = (None if a is None else torch.from_numpy(a) for a in arrays)
    return text, p_table, table


def prepare(spec: RouteSpec, device: torch.device) -> None:
    """Make what the backend in torch keeps of a spec on a device: a compiler can't trace that."""
    with torch.no_grad():
        TORCH.route(torch.zeros(1, spec.num_experts, device=device), spec, torch.float32)


def _refuse_tangents(name: str, *tensors: Tensor) -> None:
    """Forward-mode derivatives would be dropped by the operators."""
    if torch.autograd.forward_ad._current_level < 0 or torch.compiler.is_compiling():
        return
    if any(torch.autograd.forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError(f"{name}: the C path has no derivatives; {_instead(name, tensors)}")


# ---- FLOPs: 2 H I for each matrix of each expert that a token was sent to; 2 M N K ----


def _expert_flops(matrices: Sequence[Tensor], activation: str, storage: str) -> int:
    hidden_size, intermediate_size = sizes_of(matrices, Storage.from_text(storage))
    return 2 * Activation.from_text(activation).matrices * hidden_size * intermediate_size


def _total(counts: Tensor, upper_bound: int) -> int:
    """The sum of a tensor that torch.compile's fake tensors do not have: then the bound."""
    is_fake = isinstance(counts, torch._subclasses.FakeTensor)
    return upper_bound if is_fake else int(counts.sum())


@register_flop_formula(torch.ops.moeprof.experts, get_raw=True)
def _(
    hidden: Tensor,
    expert_ids: Tensor,
    routing_weights: Tensor,
    matrices: list[Tensor],
    activation: str,
    storage: str,
    name: str,
    *,
    out_val: Any = None,
    **kwargs: Any,
) -> int:
    num_experts = num_experts_of(matrices, Activation.from_text(activation))
    ran = (expert_ids >= 0) & (expert_ids < num_experts)
    return _expert_flops(matrices, activation, storage) * _total(ran, expert_ids.numel())


@register_flop_formula(torch.ops.moeprof.moe, get_raw=True)
def _(
    hidden: Tensor,
    logits: Tensor,
    matrices: list[Tensor],
    activation: str,
    storage: str,
    *spec: Any,
    out_val: Any = None,
    **kwargs: Any,
) -> int:
    _, _, expert_ids, counts, _ = out_val
    return _expert_flops(matrices, activation, storage) * _total(counts, expert_ids.numel())


@register_flop_formula(torch.ops.moeprof.linear, get_raw=True)
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    features: int,
    format: str,
    name: str,
    *,
    out_val: Any = None,
    **kwargs: Any,
) -> int:
    return 2 * x.numel() * features
