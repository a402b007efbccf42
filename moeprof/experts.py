"""The experts of a layer on the C path, as torch operators.

Two operators, both opaque to torch.compile and counted by torch's FlopCounterMode:
``moeprof::experts`` runs a routing that is given, ``moeprof::moe`` routes and runs in one call.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import _C
from .cpu import get_num_threads

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


# ---- torch memory as the kernels see it ----


def as_array(tensor: Tensor) -> np.ndarray:
    """A NumPy view of a CPU tensor, 16-bit floats as uint16; a copy only of one that is not
    contiguous, or whose sign is still to be turned (torch's negative bit)."""
    tensor = tensor.detach().resolve_neg().contiguous()
    return (tensor.view(torch.uint16) if tensor.element_size() == 2 else tensor).numpy()


def as_tensor(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    """What the kernels wrote, uint16 for 16-bit floats, as a tensor on the same memory."""
    return torch.from_numpy(array).view(dtype)


def layer_of(weights: Sequence[Tensor]) -> _C.Layer:
    """Where the matrices of each expert lie. It holds as long as the tensors do.

    Parameters
    ----------
    weights
        Either the packed pair ``[gate_up (E, 2I, H), down (E, H, I)]`` of transformers 5, or
        the list ``[gate_0, up_0, down_0, gate_1, ...]`` of transformers 4. Contiguous.
    """
    format = DTYPES[weights[0].dtype]
    if weights[0].dim() == 2:
        addresses = np.array([w.data_ptr() for w in weights], dtype=np.uint64)
        intermediate_size, hidden_size = weights[0].shape
        pointers = np.ascontiguousarray(addresses.reshape(-1, 3).T)
        return _C.Layer(pointers, format, hidden_size, intermediate_size)
    gate_up, down = weights
    return _packed_layer(gate_up.data_ptr(), down.data_ptr(), format, *down.shape)


@lru_cache(maxsize=1024)  # of the layers in use; a pure function of the addresses
def _packed_layer(
    gate_up: int, down: int, format: str, num_experts: int, hidden_size: int, intermediate_size: int
) -> _C.Layer:
    matrix_bytes = intermediate_size * hidden_size * (4 if format == "float32" else 2)
    experts = np.arange(num_experts, dtype=np.uint64) * np.uint64(matrix_bytes)
    gate = 2 * experts + np.uint64(gate_up)
    pointers = np.stack([gate, gate + np.uint64(matrix_bytes), experts + np.uint64(down)])
    return _C.Layer(pointers, format, hidden_size, intermediate_size)


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
        or torch.autograd._profiler_enabled()
        or torch.autograd.forward_ad._current_level >= 0
        or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    )


# ---- the operators ----


def _experts(
    hidden: Tensor, experts: Tensor, routing_weights: Tensor, weights: list[Tensor], name: str
) -> Tensor:
    layer = layer_of(weights)
    if experts.dtype not in (torch.int32, torch.int64):
        experts = experts.to(torch.int64)
    if routing_weights.dtype not in (torch.float32, hidden.dtype):
        routing_weights = routing_weights.to(torch.float32)
    try:
        out = _C.experts(
            as_array(hidden),
            as_array(experts),
            as_array(routing_weights),
            layer,
            get_num_threads(),
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return as_tensor(out, hidden.dtype)


experts_op = torch.library.custom_op("moeprof::experts", _experts, mutates_args=())


@experts_op.register_fake
def _(hidden, experts, routing_weights, weights, name):
    return torch.empty_like(hidden)


def _moe(
    hidden: Tensor,
    logits: Tensor,
    weights: list[Tensor],
    router: str,
    parameters: list[float],
    min_k: int,
    max_k: int,
    temperature: float,
    norm: str,
    norm_k: int,
    null: str,
    score: str,
    p_table: Tensor | None,
    table: Tensor | None,
    name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    layer = layer_of(weights)
    p_array, array = (None if t is None else t.numpy() for t in (p_table, table))
    spec = (
        router,
        tuple(parameters),
        min_k,
        max_k,
        temperature,
        norm,
        norm_k,
        (null, score, p_array),
        array,
    )
    try:
        spec = _C.RouteSpec(spec, DTYPES[hidden.dtype], logits.shape[1])
        out, *routing = _C.moe(as_array(hidden), as_array(logits), layer, spec, get_num_threads())
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return (as_tensor(out, hidden.dtype), *map(torch.from_numpy, routing))


moe_op = torch.library.custom_op("moeprof::moe", _moe, mutates_args=())


@moe_op.register_fake
def _(hidden, logits, weights, router, parameters, min_k, max_k, *rest):
    tokens = hidden.shape[0]
    slots = hidden.new_empty((tokens, max_k), dtype=torch.int32)
    counts = hidden.new_empty((tokens,), dtype=torch.int32)
    return (torch.empty_like(hidden), slots.float(), slots, counts, torch.empty_like(counts))


# ---- gradients: refused, never dropped ----


# What stands before the name of a class of experts that were called by themselves.
_BY_ITSELF = "experts_forward: "


def _instead(name: str) -> str:
    """What a user does who wants gradients from the experts of this name."""
    if name.startswith(_BY_ITSELF):
        return 'choose other experts for that, model.set_experts_implementation("grouped_mm")'
    return "unpatch the model for that"


def _remember_name(ctx, inputs, output) -> None:
    ctx.layer_name = inputs[-1]


def _refuse(ctx, *gradients):
    name = ctx.layer_name
    raise RuntimeError(f"{name}: the C path has no backward to train with; {_instead(name)}")


experts_op.register_autograd(_refuse, setup_context=_remember_name)
moe_op.register_autograd(_refuse, setup_context=_remember_name)


def run_experts(hidden, experts, routing_weights, weights, name) -> Tensor:
    """`experts_op`, around the dispatcher where nobody looks."""
    if unobserved(hidden, routing_weights, *weights):
        return _experts(hidden, experts, routing_weights, weights, name)
    _refuse_tangents(name, hidden, routing_weights, *weights)
    return experts_op(hidden, experts, routing_weights, weights, name)


def run_moe(hidden, logits, weights, *spec) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`moe_op`, around the dispatcher where nobody looks."""
    if unobserved(hidden, logits, *weights):
        return _moe(hidden, logits, weights, *spec)
    _refuse_tangents(spec[-1], hidden, logits, *weights)
    return moe_op(hidden, logits, weights, *spec)


def _refuse_tangents(name: str, *tensors: Tensor) -> None:
    """Forward-mode derivatives would be dropped by the operators."""
    if torch.autograd.forward_ad._current_level < 0 or torch.compiler.is_compiling():
        return
    if any(torch.autograd.forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError(f"{name}: the C path has no derivatives; {_instead(name)}")


# ---- FLOPs: 6 H I for each expert that a token was sent to ----


def _expert_flops(weights: Sequence[Tensor]) -> int:
    down = weights[-1]  # (E, H, I) or (H, I)
    return 6 * down.shape[-1] * down.shape[-2]


def _total(counts: Tensor, upper_bound: int) -> int:
    """The sum of a tensor that torch.compile's fake tensors do not have: then the bound."""
    is_fake = isinstance(counts, torch._subclasses.FakeTensor)
    return upper_bound if is_fake else int(counts.sum())


@register_flop_formula(torch.ops.moeprof.experts, get_raw=True)
def _(hidden, experts, routing_weights, weights, name, *, out_val=None, **kwargs) -> int:
    num_experts = len(weights[-1]) if weights[-1].dim() == 3 else len(weights) // 3
    ran = (experts >= 0) & (experts < num_experts)
    return _expert_flops(weights) * _total(ran, experts.numel())


@register_flop_formula(torch.ops.moeprof.moe, get_raw=True)
def _(hidden, logits, weights, *spec, out_val=None, **kwargs) -> int:
    _, _, experts, counts, _ = out_val
    return _expert_flops(weights) * _total(counts, experts.numel())


# ---- one layer's experts, on request ----


def experts_forward(
    experts: torch.nn.Module, hidden: Tensor, idx: Tensor, weights: Tensor
) -> Tensor:
    """Run the experts that a routing names, skipping the others and every empty slot.

    On transformers 5 this is also the experts implementation "moeprof":
    ``model.set_experts_implementation("moeprof")``, for every class on that interface with
    SwiGLU experts without bias.

    Parameters
    ----------
    experts : torch.nn.Module
        Holds ``gate_up_proj`` (E, 2I, H) and ``down_proj`` (E, H, I), float32, bfloat16 or
        float16, on the CPU.
    hidden : (T, H), dtype of the weights
    idx : (T, k) integer, expert ids; -1, or E as transformers writes it, for an empty slot
    weights : (T, k) floating point

    Returns
    -------
    (T, H) tensor, dtype of hidden

    Raises
    ------
    ValueError
        If the experts, or the shapes, are not of that form; it names what was expected.
    TypeError
        If experts is no module, or another argument no tensor.
    """
    if not isinstance(experts, torch.nn.Module):
        kind = type(experts).__name__
        raise TypeError(f"experts_forward: experts: expected a torch.nn.Module, got {kind}")
    for argument, value in (("hidden", hidden), ("idx", idx), ("weights", weights)):
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise TypeError(f"experts_forward: {argument}: expected a torch.Tensor, got {kind}")
    name = _BY_ITSELF + type(experts).__name__
    matrices, reason = read_packed(experts)
    if reason:
        raise ValueError(f"{name}: not on moeprof's path: {reason}")
    if hidden.dim() != 2 or hidden.shape[1] != matrices[1].shape[1]:
        raise ValueError(
            f"{name}: hidden: expected (T, {matrices[1].shape[1]}), got {tuple(hidden.shape)}"
        )
    if idx.is_floating_point() or idx.is_complex() or idx.dtype == torch.bool:
        raise ValueError(f"{name}: idx: expected integers, got {idx.dtype}")
    if idx.dim() != 2 or idx.shape != weights.shape or len(idx) != len(hidden):
        raise ValueError(
            f"{name}: idx and weights: expected ({len(hidden)}, k) both, "
            f"got {tuple(idx.shape)} and {tuple(weights.shape)}"
        )
    if reason := tensor_obstacle([*matrices, hidden]) or routing_obstacle(idx, weights):
        raise ValueError(f"{name}: {reason}")
    return run_experts(hidden, idx, weights, matrices, name)


def tensor_obstacle(tensors: Sequence[Tensor]) -> str | None:
    """Why the kernels can't read these tensors as one layer's, or None."""
    dtype = tensors[0].dtype
    if dtype not in DTYPES:
        return f"weights of dtype {dtype} (float32, bfloat16, float16 are supported)"
    # A tracer's tensors have a class of their own and no memory: what it makes of the operator
    # is asked again when that runs.
    traced = torch.compiler.is_compiling()
    for tensor in tensors:
        if not traced and type(tensor) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer):
            return f"a tensor of class {type(tensor).__name__}"
        if tensor.device.type != "cpu":
            return f"a tensor on device {tensor.device} (only cpu is supported)"
        if tensor.layout is not torch.strided or (not traced and tensor.is_neg()):
            return "a tensor that is not plain memory (its layout, or a lazy sign)"
        if tensor.dtype != dtype:
            return f"dtypes {dtype} and {tensor.dtype} in one layer"
    return None


def routing_obstacle(experts: Tensor, routing_weights: Tensor) -> str | None:
    """Why a routing that is given can't be read, or None."""
    for tensor in (experts, routing_weights):
        if tensor.device.type != "cpu":
            return f"a routing on device {tensor.device} (only cpu is supported)"
    return None


def is_silu(activation) -> bool:
    """True for torch's and transformers' SiLU."""
    return type(activation).__name__ in ("SiLU", "SiLUActivation")


def read_packed(experts: torch.nn.Module) -> tuple[list[Tensor], str | None]:
    """([gate_up_proj, down_proj], None) of packed experts of transformers 5, or ([], why not)."""
    own, kind = vars(experts), type(experts)

    def flag(name: str, default: bool) -> bool:
        # Not getattr: on a module, what is not there costs ten times what is.
        return own.get(name, getattr(kind, name, default))

    gate_up, down = getattr(experts, "gate_up_proj", None), getattr(experts, "down_proj", None)
    if not (isinstance(gate_up, Tensor) and isinstance(down, Tensor)):
        return [], "no tensors gate_up_proj and down_proj"
    if flag("has_bias", False):
        return [], "experts with a bias"
    if flag("is_transposed", False) or not flag("is_concatenated", True):
        return [], "transposed or interleaved expert weights"
    if flag("has_post_expert_norm", False):
        return [], "a norm after each expert"
    if flag("_is_expert_parallel", False):
        return [], "expert parallelism"
    apply_gate = getattr(kind, "_apply_gate", None)
    if apply_gate is not None and apply_gate.__name__ != "_default_apply_gate":
        return [], "a gating of its own (_apply_gate)"
    activation = getattr(experts, "act_fn", None)
    if not is_silu(activation):
        return [], f"activation {activation!r} (SiLU is supported)"
    if down.dim() != 3:
        return [], f"down_proj of shape {tuple(down.shape)} (expected (E, H, I))"
    num_experts, hidden_size, intermediate_size = down.shape
    if gate_up.shape != (num_experts, 2 * intermediate_size, hidden_size):
        return [], f"gate_up_proj {tuple(gate_up.shape)} beside down_proj {tuple(down.shape)}"
    if not (gate_up.is_contiguous() and down.is_contiguous()):
        return [], "expert weights that are not contiguous"
    return [gate_up, down], None
