"""Logits to a routing, in the order of csrc/route.c. All shapes are known from the spec, and
nothing waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..spec import RouteSpec
from .counts import ROUTERS, Tokens, Wants
from .nulls import p_values, scores
from .prepared import Prepared
from .rule import affinities, choice, finite, shares_in_order

if TYPE_CHECKING:
    from numpy.typing import NDArray

ENOUGH = 2.0**-100  # fp32 is still exact to 24 bits far below


def route(
    logits: Tensor, spec: RouteSpec, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(weights, expert_ids, counts, rejections), see `Backend.route`.

    Weights carry gradients to the logits; the selection is constant. They are float64 for
    logits in float64. A row with a NaN or nothing above -inf is a ValueError on the CPU. On
    another device, which would have to be waited for to know, its weights are NaN.
    """
    own, logits = _taken(logits, spec)
    usable = logits.detach().amax(1, keepdim=True) > -torch.inf  # not where it is NaN
    _check_rows(usable)
    with torch.no_grad():
        z, eligible = choice(own, logits.detach())
        order, by_logit, rejections = _judge(own, z, eligible)
        counts = rejections.clamp(spec.min_k, spec.max_k)
        # None where all slots are used
        unused = own.slots >= counts[:, None] if spec.min_k < spec.max_k else None
    ids = order[:, : spec.max_k]
    weights = _weigh(own, logits, ids, unused, by_logit[:, : spec.norm_k], dtype)
    weights = torch.where(usable, weights, own.nan)
    return weights, _filled(ids.to(torch.int32), unused, -1), counts, rejections


def _taken(logits: Tensor, spec: RouteSpec) -> tuple[Prepared, Tensor]:
    """The spec on the device of the logits (T, E), and these in float32 or float64."""
    if logits.dim() != 2 or logits.shape[1] != spec.num_experts:
        raise ValueError(
            f"router_logits: expected {spec.num_experts} experts, as the RouteSpec has, "
            f"got the shape {tuple(logits.shape)}"
        )
    if logits.dtype != torch.float64:
        logits = logits.to(torch.float32)
    return Prepared.of(spec, logits.device), logits


def _check_rows(usable: Tensor) -> None:
    if usable.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if not usable.all():
        row = int(usable[:, 0].int().argmin())
        raise ValueError(f"router_logits: row {row} has a NaN or no entry above -inf")


def _judge(own: Prepared, z: Tensor, eligible: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The experts that a token may use (T, n) by evidence and by logit, and R (T,)."""
    wants, rejections = ROUTERS[own.spec.router]
    seen = z if eligible is None else z.gather(1, eligible)
    z_sorted, order = seen.sort(dim=1, descending=True, stable=True)
    by_logit = ids = order if eligible is None else eligible.gather(1, order)
    if wants is not Wants.NOTHING:
        z_sorted = z_sorted.to(own.precise)

    def in_order(values_of: Callable[[Prepared, Tensor], Tensor]) -> Tensor:
        """Values of all experts, of those in the order: it makes none where it is of all."""
        if eligible is None and not own.is_by_expert:
            return values_of(own, z_sorted)
        return values_of(own, z.to(own.precise)).gather(1, ids)

    p = None
    # One null for all experts orders them as their logits do.
    has_own_order = own.is_by_expert or Wants.WEIGHTS in wants
    if Wants.P in wants and (has_own_order or not own.is_tabled):
        p = in_order(p_values)
    if p is not None and has_own_order:
        if Wants.WEIGHTS in wants:
            weights = own.constant(_weights)[ids]
            p = (p / weights).masked_fill(weights == 0, torch.inf)
        p, again = p.sort(dim=1, stable=True)
        ids = ids.gather(1, again)
    wants_scores = Wants.LFDR in wants or (Wants.P in wants and p is None)
    scores_sorted = in_order(scores) if wants_scores else None
    R = rejections(Tokens(own, z_sorted, scores_sorted, p), *own.spec.parameters)
    return ids, by_logit, R.to(torch.int32)


def _weights(spec: RouteSpec) -> NDArray[np.float64]:
    return np.asarray(spec.table)


def _filled(values: Tensor, unused: Tensor | None, value: float) -> Tensor:
    """The value in the slots that are unused."""
    return values if unused is None else values.masked_fill(unused, value)


def _weigh(
    own: Prepared,
    logits: Tensor,
    ids: Tensor,
    unused: Tensor | None,
    by_logit: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """(T, max_k): the weights of the experts ids, 0 where a slot is unused.

    by_logit (T, norm_k): those that the model would choose.
    """
    spec, rule = own.spec, own.spec.rule
    rounded_to = dtype if rule.rounds and dtype.itemsize == 2 else logits.dtype
    chosen = logits.gather(1, ids).to(own.precise)

    def affinities_of(ids: Tensor) -> Tensor:
        if rule.affinity == "sparsemixer":
            return shares_in_order(rule, logits, ids, spec.temperature, rounded_to, own.precise)
        if rule.affinity == "softmax":
            every = affinities(rule.affinity, logits.to(own.precise), spec.temperature)
            return every.gather(1, ids)
        return affinities(rule.affinity, logits.gather(1, ids).to(own.precise), spec.temperature)

    def shares() -> Tensor:
        """The affinities of the chosen, divided by their sum; 0 where a slot is unused."""
        is_plain = rule.epsilon == 0 and rule.floor == 0
        if is_plain and rule.affinity == "softmax":
            return _softmax_of(chosen, unused, spec.temperature)
        given = _filled(affinities_of(ids), unused, 0.0)
        divisor = (given.sum(1, keepdim=True) + rule.epsilon).clamp(min=rule.floor)
        if not is_plain or rule.affinity == "sqrt_softplus":
            return given / divisor
        # Where nothing is left of the affinities. Far below, a sigmoid is the exponential too.
        lost = divisor < ENOUGH
        instead = _softmax_of(chosen, unused, spec.temperature)
        return torch.where(lost, instead, given / divisor.masked_fill(lost, 1.0))

    weights = _filled(affinities_of(ids), unused, 0.0) if spec.norm == "none" else shares()
    if spec.norm == "mass":
        mass = affinities_of(by_logit).sum(1, keepdim=True)
        weights = _filled(weights * mass, unused, 0.0)  # where the mass is infinite
    if rule.scale != 1:
        weights = weights * rule.scale
    if own.expert_scale is not None:
        weights = weights * own.expert_scale[ids]
    return weights.to(rounded_to).to(logits.dtype)


def _softmax_of(chosen: Tensor, unused: Tensor | None, temperature: float) -> Tensor:
    """Over the chosen of each row; they share equally where all of them are -inf."""
    z = _filled(finite(chosen), unused, -torch.inf)
    if temperature != 1:
        z = (z - z.detach().amax(1, keepdim=True)) / temperature
    return torch.softmax(z, 1)
