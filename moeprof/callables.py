"""Routers that a user wrote in Python: what they may return, read into slots."""

from typing import Any

import torch
from torch import Tensor

from .adapters.base import describe_output, read_router_output
from .routers import RoutingResult, RoutingStats


def read_routing(output: Any, logits: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """(weights (T, k), experts (T, k) with -1) of what a callable returned for logits (T, E).

    Accepted: dense weights (T, E), zero where an expert is not selected; (weights (T, k) or
    (T, E), experts (T, k)), for k = E by slot; a RoutingResult or RoutingStats.

    Raises
    ------
    ValueError
        "Router output format unexpected ...", naming the layer and what came.
    """
    _check_kind(output, logits, name)
    if isinstance(output, RoutingResult | RoutingStats):
        output = _by_slot(output.routing_weights, output.selected_experts, logits)
    if isinstance(output, Tensor):
        if output.shape == logits.shape and output.is_floating_point():
            return _slots(output)
    elif isinstance(output, tuple | list) and len(output) == 2:
        read = read_router_output(output, *logits.shape, name)
        return read.weights, read.experts
    tokens, num_experts = logits.shape
    raise ValueError(
        f"Router output format unexpected: {name}: wanted of a router in Python weights "
        f"({tokens}, {num_experts}) or (weights, experts ({tokens}, k)); got "
        f"{describe_output(output)}"
    )


def _check_kind(output: Any, logits: Tensor, name: str) -> None:
    """ValueError for sparse tensors, for no slot at all, and for logits in place of weights."""
    parts = output if isinstance(output, tuple | list) else (output,)
    tensors = [part for part in parts if isinstance(part, Tensor)]
    found = None
    if any(t.layout is not torch.strided for t in tensors):
        found = "a sparse tensor; .to_dense() gives a dense one"
    elif any(t.dim() and t.shape[-1] == 0 for t in tensors):
        found = "no slot (k = 0): an expert of -1 leaves one empty"
    elif isinstance(output, Tensor) and _are_logits(output, logits):
        found = "its logits, not weights: softmax them, and set what is not selected to 0"
    if found:
        raise ValueError(f"Router output format unexpected: {name}: the router returned {found}")


def _are_logits(dense: Tensor, logits: Tensor) -> bool:
    """The very logits, or some function of them that selects every expert, a few with weights
    below 0: no routing looks like that."""
    if dense.shape != logits.shape or not dense.is_floating_point() or not dense.numel():
        return False
    if torch.equal(dense, logits) and bool(dense.any()):
        return True
    return dense.shape[1] > 1 and bool((dense != 0).all()) and bool((dense < 0).any())


def _by_slot(dense: Any, experts: Any, logits: Tensor) -> tuple[Any, Any]:
    """A RoutingResult's weights, one for each expert, in the order of its slots.

    With max_k = E both are (T, E), and only the type says that the weights are no slots'.
    """
    tensors = isinstance(dense, Tensor) and isinstance(experts, Tensor)
    if tensors and dense.shape == logits.shape and experts.dtype == torch.int64:
        if experts.dim() == 2 and len(experts) == len(dense):
            dense = dense.gather(1, experts.clamp(0, logits.shape[1] - 1))
    return dense, experts


def _slots(dense: Tensor) -> tuple[Tensor, Tensor]:
    """Dense weights (T, E) as slots, the largest weight first; a NaN counts as selected."""
    chosen = dense != 0
    k = max(int(chosen.sum(1).max()), 1) if len(dense) else 1
    # Unselected last, whatever the sign of a weight.
    ranked = torch.where(chosen, dense, -torch.inf).sort(dim=1, descending=True, stable=True)
    order = ranked.indices[:, :k]
    experts = torch.where(chosen.gather(1, order), order, -1)
    return dense.gather(1, order), experts
