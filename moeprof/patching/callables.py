"""Routers that a user wrote in Python: what they may return, read into slots."""

from typing import Any

import torch
from torch import Tensor

from ..models.reading import describe_output, read_gate
from ..routers import RoutingResult, RoutingStats


def read_routing(output: Any, logits: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """(weights (T, k), experts (T, k) with -1) of what a callable returned for logits (T, E).

    Accepted: dense weights (T, E), zero where an expert is not selected; (weights (T, k) or
    (T, E), experts (T, k)), for k = E by slot; a RoutingResult or RoutingStats.

    Raises
    ------
    ValueError
        "Router output format unexpected ...", naming the layer and what came.
    """
    if found := _wrong_kind(output):
        raise _refused(name, found)
    if isinstance(output, RoutingResult | RoutingStats):
        output = _by_slot(output.routing_weights, output.selected_experts, logits)
    tokens, num_experts = logits.shape
    if isinstance(output, Tensor) and output.shape == logits.shape and output.is_floating_point():
        weights, experts = _slots(output)
    elif isinstance(output, tuple | list) and len(output) == 2:
        read = read_gate(output, tokens, num_experts, name)
        assert read.weights is not None and read.expert_ids is not None  # of a pair both are read
        weights, experts = read.weights, read.expert_ids
        if experts.shape[1] > num_experts and not torch.compiler.is_compiling():
            most = int((experts >= 0).sum(1).max()) if len(experts) else 0
            if most > num_experts:  # not counted: slots that are empty
                raise _refused(name, f"{most} experts for a token, and there are {num_experts}")
    else:
        raise ValueError(
            f"Router output format unexpected: {name}: wanted of a router in Python, in tensors, "
            f"weights ({tokens}, {num_experts}) or (weights, experts ({tokens}, k)); got "
            f"{describe_output(output)}"
        )
    if not torch.compiler.is_compiling() and (found := _no_weights(weights, experts, logits)):
        raise _refused(name, found)
    return weights, experts


def _refused(name: str, found: str) -> ValueError:
    return ValueError(f"Router output format unexpected: {name}: the router returned {found}")


def _wrong_kind(output: Any) -> str | None:
    parts = output if isinstance(output, tuple | list) else (output,)
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if any(t.layout is not torch.strided for t in tensors):
        return "a sparse tensor; .to_dense() gives a dense one"
    if len(tensors) == 2 and tensors[1].is_floating_point() > tensors[0].is_floating_point():
        return "(experts, weights): expected (weights, experts)"
    if any(t.dim() and t.shape[-1] == 0 for t in tensors):
        return "no slot (k = 0): an expert of -1 leaves one empty"
    return None


def _no_weights(weights: Tensor, experts: Tensor, logits: Tensor) -> str | None:
    """What the values show to be no routing weights, in words; None where nothing does.

    NaN and infinity, unless the logits have them too: then the model itself is broken. Logits:
    they are what the gate said, all of them or some, or that with a number added in each row.
    """
    if experts.is_floating_point() or experts.shape != weights.shape:
        return None  # refused later
    # Of another device once, not in each of the questions: the host waits for it.
    weights, experts, logits = (t.detach().cpu() for t in (weights, experts, logits))
    num_experts = logits.shape[1]
    if bool(((experts == num_experts) & (weights != 0)).any()):
        return f"expert {num_experts}: they are numbered from 0, and -1 leaves a slot empty"
    used = (experts >= 0) & (experts < num_experts)
    if not bool(used.any()):
        return None
    if not bool(weights[used].isfinite().all()):
        if bool(logits.isfinite().all()):
            return "weights that are NaN or infinite; what is not selected has weight 0"
        return None
    inside = experts.clamp(0, logits.shape[1] - 1).long()
    said, given = logits.gather(1, inside).double(), weights.double()
    below = bool((given[used] < 0).any())
    if bool((given == said)[used].all()):
        found = below or (bool((given[used] > 1).any()) and not _is_relu(logits, inside, used))
    else:
        every = weights.shape == logits.shape and logits.shape[1] > 1 and bool(used.all())
        found = below and (every or _are_shifted(given, said, used, weights.dtype))
    if found:
        return "its logits, not weights: softmax them, and set what is not selected to 0"
    return None


def _is_relu(logits: Tensor, inside: Tensor, used: Tensor) -> bool:
    """Is every logit above 0 selected?"""
    left_out = torch.ones_like(logits, dtype=torch.bool)
    left_out.scatter_(1, torch.where(used, inside, inside[:, :1]), False)
    return not bool((logits[left_out] > 0).any())


def _are_shifted(given: Tensor, said: Tensor, used: Tensor, dtype: torch.dtype) -> bool:
    """Do weights differ from the logits by one number in each row, within rounding to `dtype`?

    A few numbers may do so by chance: at least 4 differences must agree.
    """
    if int((used.sum(1) - 1).clamp(min=0).sum()) < 4:
        return False
    shift = given - said
    highest = torch.where(used, shift, -torch.inf).amax(1)
    lowest = torch.where(used, shift, torch.inf).amin(1)
    exact = 4 * torch.finfo(dtype).eps * (said.abs().amax(1) + given.abs().amax(1))
    return bool((highest - lowest <= exact)[used.any(1)].all())


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
    if torch.compiler.is_compiling():  # how many are chosen isn't known yet
        k = dense.shape[1]
    else:
        k = max(int(chosen.sum(1).max()), 1) if len(dense) else 1
    # Unselected last, whatever the sign of a weight.
    ranked = torch.where(chosen, dense, -torch.inf).sort(dim=1, descending=True, stable=True)
    order = ranked.indices[:, :k]
    experts = torch.where(chosen.gather(1, order), order, -1)
    return dense.gather(1, order), experts
