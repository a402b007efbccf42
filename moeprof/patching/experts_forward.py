"""One layer's experts, on request: also the experts implementation of transformers."""

import torch
from torch import Tensor

from ..backends.ops import BY_ITSELF, run_experts
from ..backends.tables import (
    backend_of,
    ids_obstacle,
    routing_obstacle,
    table_of,
    tensor_obstacle,
)
from ..models.families.packed import read_packed


def experts_forward(
    experts: torch.nn.Module, hidden: Tensor, idx: Tensor, weights: Tensor
) -> Tensor:
    """Run the experts that a routing names, skipping the others and every empty slot.

    On transformers 5.12 and newer this is also the experts implementation "moeprof":
    ``model.set_experts_implementation("moeprof")``, for every class on that interface whose
    experts lie as below and compute with SiLU, GELU, ReLU or squared ReLU, with or without gate
    and limits.

    Parameters
    ----------
    experts : torch.nn.Module
        Holds ``gate_up_proj`` (E, 2I, H), or without gate ``up_proj`` (E, I, H), and
        ``down_proj`` (E, H, I), float32, bfloat16 or float16. On the CPU they run in C, on another
        device in torch. With a flag
        ``is_transposed`` each expert's matrix is the transpose of that; ``is_concatenated``
        False then says that gate and up stand by turns in its columns. With ``has_bias`` also
        ``gate_up_proj_bias`` (E, 2I), or ``up_proj_bias`` (E, I), and ``down_proj_bias`` (E, H).
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
    name = BY_ITSELF + type(experts).__name__
    read, reason = read_packed(experts)
    if reason:
        raise ValueError(f"{name}: not on moeprof's path: {reason}")
    width = read.hidden_size
    if hidden.dim() != 2 or hidden.shape[1] != width:
        raise ValueError(f"{name}: hidden: expected (T, {width}), got {tuple(hidden.shape)}")
    if idx.is_floating_point() or idx.is_complex() or idx.dtype == torch.bool:
        raise ValueError(f"{name}: idx: expected integers, got {idx.dtype}")
    if idx.dim() != 2 or idx.shape != weights.shape or len(idx) != len(hidden):
        raise ValueError(
            f"{name}: idx and weights: expected ({len(hidden)}, k) both, "
            f"got {tuple(idx.shape)} and {tuple(weights.shape)}"
        )
    read = read._replace(backend=backend_of(read.matrices))
    reason = tensor_obstacle([*read.matrices, hidden], read.storage, read.backend)
    reason = reason or routing_obstacle(idx, weights, read) or ids_obstacle(idx, read)
    if reason:
        raise ValueError(f"{name}: {reason}")
    return run_experts(hidden, idx, weights, table_of(read), name)
