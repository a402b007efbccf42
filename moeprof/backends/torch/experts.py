"""The experts of a layer in torch: only those that were selected run, on any device.

The pairs of a token and one of its experts are sorted by expert, and each expert's rows are one
matrix product: all experts at once by `torch.nn.functional.grouped_mm` where the device has it,
else one after the other, without those that have no row.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..tables import Activation, LayerMatrices, is_packed

# So many pairs are computed with the empty slots among them: to leave these out, the host has to
# wait for their number, which in a decode step takes longer.
FEW_PAIRS = 1024


def run_experts(
    hidden: Tensor, expert_ids: Tensor, routing_weights: Tensor, read: LayerMatrices
) -> Tensor:
    """(T, H) of hidden (T, H): the experts (T, k) with their weights (T, k); -1 or E is no expert.

    Products are in the dtype of the hidden states, as in transformers; their weighted sums in
    float32, or float64 of that, in the order of the slots.
    """
    tokens, slots = expert_ids.shape
    pairs = _sorted(expert_ids, read.num_experts)
    run = _grouped if _has_grouped_mm(hidden, read) else _one_by_one
    order, out = run(hidden, pairs, slots, read)
    exact = torch.promote_types(out.dtype, torch.float32)
    is_empty = (expert_ids < 0) | (expert_ids >= read.num_experts)
    weights = routing_weights.masked_fill(is_empty, 0).reshape(-1)[order]
    weighted = out.to(exact) * weights[:, None].to(exact)
    return _by_token(weighted, order, tokens, slots).to(hidden.dtype)


def _by_token(weighted: Tensor, order: Tensor, tokens: int, slots: int) -> Tensor:
    """(T, H): the sums of (P, H) over the slots of each token, in their order."""
    width = weighted.shape[1]
    if len(order) == tokens * slots:
        by_slot = weighted.new_zeros((tokens * slots, width)).index_copy_(0, order, weighted)
        return by_slot.view(tokens, slots, width).sum(1)
    token = order // slots
    if weighted.device.type == "mps":  # has no sums of segments, and one order of additions
        return weighted.new_zeros((tokens, width)).index_add_(0, token, weighted)
    lengths = torch.zeros(tokens, dtype=torch.int64, device=token.device)
    lengths.scatter_add_(0, token, torch.ones_like(token))
    return torch.segment_reduce(weighted[order.argsort()], "sum", lengths=lengths, unsafe=True)


class _Pairs(NamedTuple):
    """The slots (T k,) by their expert, those that name none at the end.

    order : (P,) which slot; P is T k, or without the empty ones fewer
    expert_ids : (P,) ascending, E for no expert
    ends : (E,) int32, where each expert's slots end
    """

    order: Tensor
    expert_ids: Tensor
    ends: Tensor

    def without_empty(self) -> "_Pairs":
        """The host waits for their number."""
        selected = int(self.ends[-1])
        return self._replace(order=self.order[:selected], expert_ids=self.expert_ids[:selected])

    @property
    def is_empty(self) -> Tensor:
        """(P, 1): names no expert."""
        return (self.expert_ids >= len(self.ends))[:, None]


def _sorted(expert_ids: Tensor, num_experts: int) -> _Pairs:
    flat = expert_ids.reshape(-1)
    flat = torch.where(flat < 0, num_experts, flat)
    by_expert, order = flat.sort(stable=True)
    experts = torch.arange(num_experts, device=flat.device, dtype=flat.dtype)
    ends = torch.searchsorted(by_expert, experts, right=True, out_int32=True)
    return _Pairs(order, by_expert, ends)


# ---- all experts at once ----


def _has_grouped_mm(hidden: Tensor, read: LayerMatrices) -> bool:
    """Has torch a product of groups of rows for these tensors? Since 2.10, on GPUs of NVIDIA
    from compute capability 8.0 on; rows begin at multiples of 16 bytes."""
    first = read.matrices[0]
    if not is_packed(read.matrices) or not hasattr(F, "grouped_mm"):
        return False
    if hidden.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return False
    if torch.compiler.is_compiling() and hidden.dtype != torch.bfloat16:
        return False  # torch's compiler knows no other
    if first.device.type not in ("cpu", "cuda", "xpu"):
        return False
    if first.is_cuda and torch.cuda.get_device_capability(first.device) < (8, 0):
        return False
    sizes = (read.hidden_size, *(m.shape[-1] for m in read.matrices[:2]))
    return all(size * hidden.element_size() % 16 == 0 for size in sizes)


def _grouped(
    hidden: Tensor, pairs: _Pairs, slots: int, read: LayerMatrices
) -> tuple[Tensor, Tensor]:
    """(which of the slots (P,), what their experts give (P, H)); of empty slots 0."""
    if pairs.order.numel() > FEW_PAIRS and not torch.compiler.is_compiling():
        pairs = pairs.without_empty()
    into, down, *biases = read.matrices
    empty = pairs.is_empty
    transposed = read.storage.order != "rows"
    at = pairs.expert_ids.clamp(max=len(pairs.ends) - 1)

    def product(x: Tensor, matrices: Tensor, bias: list[Tensor]) -> Tensor:
        # Behind the last expert's rows it holds anything.
        matrices = matrices if transposed else matrices.transpose(1, 2)
        out = F.grouped_mm(x, matrices, offs=pairs.ends)
        for each in bias:
            out = out + each[at]
        return out.masked_fill(empty, 0)

    # Its derivative does too.
    x = hidden[pairs.order // slots].masked_fill(empty, 0)
    between = _between(product(x, into, biases[:1]), read)
    return pairs.order, product(between, down, biases[1:])


# ---- one expert after the other ----

_Run = TypeVar("_Run", bound=Callable[..., tuple[Tensor, Tensor]])
# The data say how many rows each expert has, and a compiler has to know.
_not_compiled: Callable[[_Run], _Run] = torch.compiler.disable


@_not_compiled
def _one_by_one(
    hidden: Tensor, pairs: _Pairs, slots: int, read: LayerMatrices
) -> tuple[Tensor, Tensor]:
    """The same without empty slots; the host waits once, for the rows of each expert."""
    results, start, ends = [hidden[:0]], 0, pairs.ends.tolist()
    order = pairs.order[: ends[-1]]
    x = hidden[order // slots]
    for number, end in enumerate(ends):
        if end > start:
            results.append(_expert(x[start:end], number, read))
        start = end
    return order, torch.cat(results)


def _expert(x: Tensor, number: int, read: LayerMatrices) -> Tensor:
    """(rows, H) of x (rows, H), what one expert gives."""
    if not is_packed(read.matrices):
        own = read.activation.matrices
        *first, last = read.matrices[own * number : own * (number + 1)]
        projected = [F.linear(x, matrix) for matrix in first]
        return F.linear(activated(projected, read.activation), last)
    into, down, *biases = (tensor[number] for tensor in read.matrices)
    into_bias, down_bias = biases if biases else (None, None)
    if read.storage.order != "rows":
        into, down = into.T, down.T
    return F.linear(_between(F.linear(x, into, into_bias), read), down, down_bias)


# ---- between the matrices ----


def _between(projected: Tensor, read: LayerMatrices) -> Tensor:
    """(rows, I) of what gate and up gave together (rows, 2I), or up alone (rows, I)."""
    if not read.activation.gated:
        return activated([projected], read.activation)
    if read.storage.order == "interleaved":
        parts = [projected[..., ::2], projected[..., 1::2]]
    else:
        parts = [*projected.chunk(2, -1)]
    return activated(parts, read.activation)


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def activated(parts: list[Tensor], activation: Activation) -> Tensor:
    """``f(min(gate, limit)) * (clamp(up, -limit, limit) + shift)`` of [gate, up]; of [up], f(up).

    See `Activation`.
    """
    first, *up = parts
    limit, alpha = activation.limit, activation.alpha
    if up and limit != float("inf"):
        first, up = first.clamp(max=limit), [up[0].clamp(-limit, limit)]
    if activation.name == "silu":
        done = F.silu(first) if alpha == 1 else first * torch.sigmoid(alpha * first)
    else:
        done = _FUNCTIONS[activation.name](first)
    if not up:
        return done
    return done * (up[0] + activation.shift if activation.shift else up[0])
