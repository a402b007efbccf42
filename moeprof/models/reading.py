"""What a router said: the experts of each token, their weights, the logits.

T tokens, E experts, k of them a token. Leading dimensions may be (B, S) in place of T.
"""

from typing import Any

import torch
from torch import Tensor

from .layer import Layer
from .routing import Routing

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_MASKS = (*INTEGERS, torch.bool)


def read_choice(output: Any, tokens: int, layer: Layer) -> Routing:
    """Read what the router of `layer` returned for T tokens.

    Accepted: logits or probabilities (T, E), of which the layer's top_k count; (logits, weights
    (T, k), indices (T, k)); (scores (T, E) mostly zero or weights (T, k), indices) in either
    order; (scores, logits); (mask (T, E) of zeros and ones, scores or weights[, logits]); the
    five values by expert of transformers 4's Granite.

    Raises
    ------
    ValueError
        "Router output format unexpected: ...", with the layer and what came.
    """
    if type(output) is tuple and len(output) == 3:  # transformers 5: called for each step
        logits, weights, experts = output
        if _is_triple(logits, weights, experts, (tokens, layer.num_experts)):
            return Routing(weights, experts, logits=as_logits(logits))
    if choice := _read(output, tokens, layer):
        return choice
    missing = "" if layer.top_k else ", whose k neither router, block nor configuration says"
    raise ValueError(
        f"Router output format unexpected: {layer.name}: wanted logits "
        f"({tokens}, {layer.num_experts}){missing}; (logits, weights (T, k), indices (T, k)); "
        f"(scores (T, E) or weights, indices); got {describe_output(output)}"
    )


def read_logits(output: Any, tokens: int, layer: Layer) -> Tensor | None:
    """The logits (T, E) of a router whose experts' call tells the choice; None if unclear."""
    rows = _rows(output, tokens)
    if rows is not None and len(rows) == 1 and _is_scores(rows[0], layer.num_experts):
        return as_logits(rows[0])
    return None


def read_experts_call(
    args: tuple[Any, ...], kwargs: dict[str, Any], tokens: int, layer: Layer
) -> Routing:
    """Read the choice from what the forward of stacked experts got: (hidden, indices, weights).

    The indices (T, k) are the only integers among its arguments, weights may be (T, k) or (T, E).

    Raises
    ------
    ValueError
        "Router output format unexpected: ...", with the layer and what came.
    """
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    rows = [r for r in (_flat(value, tokens) for value in given[1:]) if r is not None]
    indices = [r for r in rows if r.dtype in INTEGERS and r.shape[1] <= layer.num_experts]
    if len(indices) != 1:
        raise ValueError(
            f"Router output format unexpected: {layer.name}: wanted (hidden, indices "
            f"({tokens}, k), weights) in the call of the experts; got "
            f"{describe_output((*args, *kwargs.values()))}"
        )
    experts = indices[0]
    floating = [r for r in rows if r.is_floating_point()]
    weights = next((w for w in floating if w.shape == experts.shape), None)
    if weights is None and floating and floating[0].shape[1] == layer.num_experts:
        weights = _at(floating[0], experts)
    return Routing(weights, experts)


def without_empty(choice: Routing, num_experts: int) -> tuple[Routing, bool]:
    """The choice with -1 for the empty slots that transformers writes as E; were there any?"""
    experts = choice.chosen
    empty = experts.cpu().numpy() == num_experts
    if not empty.any():
        return choice, False
    return choice._replace(expert_ids=experts.masked_fill(experts == num_experts, -1)), True


# ---- of a gate whose block is patched ----


def read_gate(output: Any, tokens: int, num_experts: int, name: str) -> Routing:
    """Read what the gate of a patched block `name` returned; of logits alone nothing is chosen.

    Accepted: logits (T, E); (logits (T, E), weights (T, k), indices (T, k)); (weights (T, k) or
    scores (T, E), indices (T, k)). Leading dimensions may be (B, S) in place of T.

    Raises
    ------
    ValueError
        "Router output format unexpected ...", with what came.
    """
    parts = [output] if isinstance(output, Tensor) else output
    if isinstance(parts, tuple | list) and parts and all(isinstance(p, Tensor) for p in parts):
        rows = [p.reshape(-1, p.shape[-1]) for p in parts if p.dim() in (2, 3)]
        if len(rows) == len(parts) and all(len(r) == tokens for r in rows):
            if read := _by_shape(rows, num_experts):
                return read
    raise ValueError(
        f"Router output format unexpected: {name}: wanted logits ({tokens}, {num_experts}), or "
        "(logits, weights (T, k), indices (T, k)), or (weights, indices); got "
        f"{describe_output(output)}"
    )


def _by_shape(rows: list[Tensor], num_experts: int) -> Routing | None:
    *values, last = rows
    if not values:
        is_logits = last.is_floating_point() and last.shape[1] == num_experts
        return Routing(None, None, logits=last) if is_logits else None
    if not all(v.is_floating_point() for v in values):
        return None
    if last.is_floating_point() or last.dtype == torch.bool:  # a mask is no index
        return None
    weights = values[-1]
    if weights.shape != last.shape and weights.shape[1] == num_experts:  # scores over all E
        inside = last.clamp(0, num_experts - 1).long()  # what lies outside is refused later
        weights = weights.gather(1, inside)
    if weights.shape != last.shape:
        return None
    if len(values) == 1:
        return Routing(weights, last)
    if len(values) == 2 and values[0].shape[1] == num_experts:
        return Routing(weights, last, logits=values[0])
    return None


# ---- by what came ----


def _is_triple(logits: Any, weights: Any, experts: Any, shape: tuple[int, int]) -> bool:
    return (
        isinstance(logits, Tensor)
        and isinstance(weights, Tensor)
        and isinstance(experts, Tensor)
        and logits.shape == shape
        and logits.is_floating_point()
        and experts.dtype in INTEGERS
        and experts.dim() == 2
        and experts.shape[0] == shape[0]
        and weights.shape == experts.shape
        and weights.is_floating_point()
    )


def _read(output: Any, tokens: int, layer: Layer) -> Routing | None:
    if isinstance(output, tuple | list) and len(output) == 5:
        return by_expert(output, tokens, layer.num_experts)
    rows = _rows(output, tokens)
    if rows is None:
        return None
    if len(rows) == 1:
        return _of_logits(rows[0], layer)
    numbers = [r for r in rows if r.dtype in _MASKS]
    values = [r for r in rows if r.is_floating_point()]
    if len(numbers) + len(values) != len(rows) or len(numbers) > 1 or not 1 <= len(values) <= 2:
        return None
    if not numbers:
        return _of_scores(values, layer)
    if _is_mask(numbers[0], layer):
        return _of_mask(numbers[0], values, layer)
    return _of_indices(numbers[0], values, layer) if numbers[0].dtype in INTEGERS else None


def _rows(output: Any, tokens: int) -> list[Tensor] | None:
    """The tensors that came as (T, .), or None if something else came."""
    parts = [output] if isinstance(output, Tensor) else output
    if not isinstance(parts, tuple | list) or not 1 <= len(parts) <= 4:
        return None
    # A fourth value, after the three of transformers 5, is none of the choice.
    flat = [_flat(part, tokens) for part in parts[:3]]
    rows = [row for row in flat if row is not None]
    return rows if len(rows) == len(flat) else None


def _flat(part: Any, tokens: int) -> Tensor | None:
    if not isinstance(part, Tensor) or part.dim() not in (2, 3):
        return None
    rows = part if part.dim() == 2 else part.reshape(-1, part.shape[-1])
    return rows if len(rows) == tokens else None


def _of_logits(logits: Tensor, layer: Layer) -> Routing | None:
    if not _is_scores(logits, layer.num_experts) or layer.top_k is None:
        return None
    read = as_logits(logits)
    # In float32, as stock blocks do, so that ties fall the same way.
    given = logits if read is not logits else logits.softmax(-1, dtype=torch.float32)
    weights, experts = given.topk(layer.top_k, dim=-1)
    return Routing(weights, experts, logits=read)


def _of_scores(values: list[Tensor], layer: Layer) -> Routing | None:
    """Of (scores, logits), in either order: the scores are zero for all but the chosen."""
    if len(values) != 2 or not all(_is_scores(v, layer.num_experts) for v in values):
        return None
    first, second = map(_nonzero, values)
    if first is not None and second is None:
        (experts, weights), logits = first, values[1]
    elif second is not None and first is None:
        (experts, weights), logits = second, values[0]
    else:
        return None
    return Routing(weights, experts, logits=as_logits(logits))


def _of_mask(mask: Tensor, values: list[Tensor], layer: Layer) -> Routing | None:
    """Switch: a one for each chosen expert, none for a token over the expert's capacity."""
    scores = [v for v in values if v.shape[1] == layer.num_experts]
    weights = [v for v in values if v.shape[1] != layer.num_experts]
    logits: Tensor | None = None
    weight: Tensor | None
    if len(values) == 2:  # (mask, weights or scores, logits)
        logits, scores = values[1], scores[:-1]
        if logits.shape[1] != layer.num_experts:
            return None
    if scores:  # NLLB: the mask shows the first expert only, the scores all
        if (chosen := _nonzero(scores[0])) is None:
            return None
        experts, weight = chosen
    else:
        ones, indices = mask.float().topk(max(1, int(mask.sum(-1).max())), dim=-1)
        experts = indices.masked_fill(ones == 0, -1)
        weight = next((w for w in weights if w.shape == experts.shape), None)
    return Routing(weight, experts, logits=None if logits is None else as_logits(logits))


def _of_indices(experts: Tensor, values: list[Tensor], layer: Layer) -> Routing | None:
    size = layer.num_experts
    if experts.shape[1] > size:
        return None
    if len(values) == 2:  # logits first, unless the shapes tell otherwise
        first, second = values
        logits, weights = (first, second) if first.shape[1] == size else (second, first)
        if logits.shape[1] != size:
            return None
        if weights.shape != experts.shape:
            if weights.shape[1] != size:
                return None
            weights = _at(weights, experts)
        return Routing(weights, experts, logits=as_logits(logits))
    scores = values[0]
    if scores.shape == experts.shape:
        return Routing(scores, experts)
    if scores.shape[1] != size:
        return None
    if _nonzero(scores, experts.shape[1]) is not None:
        return Routing(_at(scores, experts), experts)
    logits = as_logits(scores)
    return Routing(None if logits is scores else _at(scores, experts), experts, logits=logits)


def by_expert(output: tuple[Any, ...] | list[Any], tokens: int, num_experts: int) -> Routing | None:
    """Granite of transformers 4: what sorts the T * k choices by expert, and the logits.

    (order (T k,) of the choices by expert, token (T k,) and weight (T k,) of each in that order,
    how many choices each expert has, logits (T, E)).
    """
    order, token, sorted_weights, sizes, logits = output
    tensors = (order, token, sorted_weights, logits)
    if not all(isinstance(t, Tensor) for t in tensors) or not isinstance(sizes, list | Tensor):
        return None
    count = order.numel()
    if order.dtype not in INTEGERS or not (order.shape == token.shape == sorted_weights.shape):
        return None
    if logits.shape != (tokens, num_experts) or not tokens or count % tokens:
        return None
    sizes = torch.as_tensor(sizes, device=order.device)
    if sizes.shape != (num_experts,) or int(sizes.sum()) != count:
        return None
    sorted_experts = torch.repeat_interleave(sizes)
    experts = torch.empty_like(sorted_experts)
    experts[order] = sorted_experts
    weights = torch.empty_like(sorted_weights)
    weights[order] = sorted_weights
    return Routing(weights.view(tokens, -1), experts.view(tokens, -1), logits=as_logits(logits))


# ---- values ----


def _is_scores(values: Tensor, num_experts: int) -> bool:
    return values.is_floating_point() and values.shape[1] == num_experts


def _is_mask(numbers: Tensor, layer: Layer) -> bool:
    """Zeros and ones over all experts; indices of all E experts hold other numbers."""
    if numbers.shape[1] != layer.num_experts or layer.top_k == layer.num_experts:
        return False
    if numbers.dtype == torch.bool or not len(numbers):
        return True
    return int(numbers.min()) >= 0 and int(numbers.max()) <= 1


def as_logits(values: Tensor) -> Tensor:
    """Logits (T, E) as they are, probabilities as their logarithm."""
    if torch.compiler.is_compiling():  # nothing depends on values there
        total = values.sum(-1, dtype=torch.float32)
        are_probabilities = (values >= 0).all() & ((total - 1).abs() < 4e-3).all()
        return torch.where(are_probabilities, _logarithm(values), values.float())
    if not len(values) or float(values.detach().min()) < 0:
        return values
    values_sum = values.detach().sum(-1, dtype=torch.float32)
    # the sum of E roundings to bfloat16, each of at most 2^-9 of a probability
    if float((values_sum - 1).abs().max()) < 4e-3:
        return _logarithm(values)
    return values


def _logarithm(probabilities: Tensor) -> Tensor:
    return probabilities.float().clamp_min(torch.finfo(torch.float32).tiny).log()


def _nonzero(scores: Tensor, k: int | None = None) -> tuple[Tensor, Tensor] | None:
    """(experts, weights) of the scores that are not zero; None if most are not, or above k."""
    most = int((scores != 0).sum(-1).max()) if len(scores) else 0
    if most > (scores.shape[1] - 1 if k is None else k):
        return None
    size, experts = scores.abs().topk(max(1, most), dim=-1)
    experts = experts.masked_fill(size == 0, -1)
    return experts, _at(scores, experts)


def _at(scores: Tensor, experts: Tensor) -> Tensor:
    """The scores (T, E) at these experts (T, k); where there is none, any."""
    return scores.gather(1, experts.long().clamp(0, scores.shape[1] - 1))


def describe_output(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a {output.dtype} tensor of shape {tuple(output.shape)}"
    if isinstance(output, tuple | list):
        return f"{type(output).__name__} of ({', '.join(map(describe_output, output))})"
    return type(output).__name__
