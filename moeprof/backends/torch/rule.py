"""What a model makes of its router's logits, as csrc/rule.h defines it.

The shapes are (T, E), (T, n) of the experts that a token may use, (T, k) of those that are
selected. What experts are chosen by is computed in the dtype of the logits given, float32 or
float64, as models do.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..spec import Rule
from .prepared import Prepared


def below(z: Tensor, top: Tensor) -> Tensor:
    """z - top; 0 where they are equal, at +inf or -inf too."""
    return (z - top).nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)


def below_top(z: Tensor) -> Tensor:
    """z less the row's maximum.

    The maximum counts as constant: the gradient is right where the result is used in a way that
    doesn't change with a shift of the row.
    """
    return below(z, z.detach().amax(-1, keepdim=True))


def finite(z: Tensor) -> Tensor:
    """z with far numbers instead of infinities: for a softmax they are as good."""
    far = torch.finfo(z.dtype).max / 4
    return z.clamp(-far, far)


def softmax(z: Tensor, temperature: float = 1.0) -> Tensor:
    """Over the last dimension; several +inf share equally, and so does what is -inf throughout."""
    return torch.softmax(finite(z) if temperature == 1 else below_top(z) / temperature, -1)


def _softplus(x: Tensor) -> Tensor:
    return -functional.logsigmoid(-x)


def affinities(kind: str, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """The affinity of each expert: for softmax and sparsemixer of all, else of any selection."""
    if kind in ("softmax", "sparsemixer"):
        return softmax(logits, temperature)
    x = logits if temperature == 1 else logits / temperature
    if kind == "sigmoid":
        return torch.sigmoid(x)
    # exp underflows below; the root has no gradient at 0.
    return _softplus(x.clamp(min=math.log(torch.finfo(x.dtype).tiny))).sqrt()


def _log_affinities(kind: str, logits: Tensor) -> Tensor:
    """Finite for every finite logit; of a softmax up to a number that is the same for all."""
    if kind == "sigmoid":
        return functional.logsigmoid(logits)
    if kind == "sqrt_softplus":
        return 0.5 * torch.where(logits < -16, logits, _softplus(logits).log())
    return logits


def choice(own: Prepared, logits: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a router sees in place of the logits (T, E), by which the model chooses, and the ids
    of the experts that a token may use (T, n), ascending; None for all."""
    rule = own.spec.rule
    if rule.groups == 1 and own.bias is None:
        return logits if rule.on_logits else _log_affinities(rule.affinity, logits), None
    value = logits if rule.on_logits else affinities(rule.affinity, logits)
    bias = 0.0 if own.bias is None else own.bias.to(logits.dtype)
    score, eligible = value + bias, None
    if rule.groups > 1:
        groups = _best_groups(rule, score)
        if rule.zeroed:
            allowed = score.masked_fill(~_in_groups(rule, groups, score), 0.0)
            return (allowed - min(own.least_bias, 0.0)).log(), None
        eligible = _members(rule, groups, score.shape[1])
    if rule.on_logits:
        return score, eligible
    if own.bias is None:
        return _log_affinities(rule.affinity, logits), eligible
    return (value + (bias - own.least_bias)).log(), eligible


def _best_groups(rule: Rule, score: Tensor) -> Tensor:
    """(T, top_groups): the groups whose experts a token may use, ascending; of groups that tie
    the first."""
    tokens, experts = score.shape
    by_group = score.view(tokens, rule.groups, experts // rule.groups)
    value = by_group.topk(rule.best, dim=2).values.sum(2)
    best = value.sort(dim=1, descending=True, stable=True).indices[:, : rule.top_groups]
    return best.sort(dim=1).values


def _in_groups(rule: Rule, groups: Tensor, like: Tensor) -> Tensor:
    """(T, E) bool: whether an expert is in one of the groups."""
    tokens, experts = like.shape
    is_best = groups.new_zeros((tokens, rule.groups), dtype=torch.bool).scatter(1, groups, True)
    return is_best[:, :, None].expand(-1, -1, experts // rule.groups).reshape(tokens, experts)


def _members(rule: Rule, groups: Tensor, experts: int) -> Tensor:
    """(T, n): the experts of the groups, ascending."""
    size = experts // rule.groups
    first = groups[:, :, None] * size
    return (first + torch.arange(size, device=groups.device)).flatten(1)


def shares_in_order(
    rule: Rule, logits: Tensor, ids: Tensor, temperature: float, dtype: torch.dtype, wide: Any
) -> Tensor:
    """(T, k): the affinities of sparsemixer, of experts that are chosen in the order ids (T, k);
    dtype: in which distances are compared, wide: of the result."""
    experts, k = logits.shape[1], ids.shape[1]
    slots = torch.arange(k, device=ids.device)
    place = torch.full(logits.shape, k, device=ids.device)
    place = place.scatter(1, ids, slots.expand_as(ids))  # in the order, or behind it
    left = place[:, None, :] >= slots[:, None]  # (T, k, E): not chosen before
    z = logits[:, None, :].expand(-1, k, experts).masked_fill(~left, -math.inf)
    away = below_top(z)
    size = torch.maximum(z.abs(), z.amax(2, keepdim=True)).detach()
    far = (-away.detach() / size).to(dtype) > 2 * rule.jitter  # not where both are 0 or infinite
    parts = (away.to(wide) / temperature).exp().masked_fill(~left | far, 0.0)
    return parts.gather(2, ids[:, :, None]).squeeze(2) / parts.sum(2)
