"""The routers in plain torch, vectorised over tokens: what a user would write without C.

`route(router, logits, null)` gives the weights (T, E), zero where not selected, summing to 1, of
float32 logits (T, E) under a table null. What the C path has to be faster than.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..routers import Router

if TYPE_CHECKING:
    from numpy.typing import NDArray


def route(router: Router, logits: Tensor, null: Any) -> Tensor:
    """(T, E) float32 weights, zero where not selected, by a router of the registry."""
    experts, table = logits.shape[1], router.table(logits.shape[1], null)
    ranks = torch.arange(1, experts + 1)
    evidence, by_p = -logits.double(), router.name in ON_P
    if by_p:
        evidence = p_values(logits.double(), tables_of(null.table), null.score)
        if router.name == "weighted_bh":
            evidence = evidence / torch.from_numpy(table)
    # By logit first: the second sort is stable.
    order = logits.argsort(dim=1, descending=True, stable=True)
    if by_p:
        order = order.gather(1, evidence.gather(1, order).argsort(dim=1, stable=True))
    z, seen = logits.double().gather(1, order), evidence.gather(1, order)
    if router.name in ("local_fdr", "ebh") and table is not None:
        seen = interpolated(scores(z, null.score), tables_of(table))
    R = COUNTS[router.name](router, seen if router.wants_null else z, ranks, null)
    min_k, max_k = router.limits(experts)
    chosen = ranks <= R.clamp(min_k, max_k)[:, None]
    weights = torch.softmax(z.float() / router.temperature, dim=1) * chosen
    weights = weights / weights.sum(dim=1, keepdim=True)
    return torch.zeros_like(logits).scatter_(1, order, weights)


# ---- scores and p-values ----


def tables_of(array: NDArray[np.float64]) -> Tensor:
    """(1, N) of a layer's table, (E, N) of those of its experts."""
    return torch.from_numpy(array).reshape(-1, array.shape[-1])


def scores(z: Tensor, score: str) -> Tensor:
    return torch.log_softmax(z, dim=1) if score == "logprob" else z


def interpolated(s: Tensor, table: Tensor) -> Tensor:
    """Tables (1 or E, 8193) at the edges of the histogram, linear between them."""
    at = (s.clamp(-32, 32) + 32) * 128
    bin_ = at.long().clamp(max=8191)
    i = bin_ + torch.arange(len(table)) * table.shape[1]
    flat = table.reshape(-1)
    return flat[i] + (flat[i + 1] - flat[i]) * (at - bin_)


def p_values(z: Tensor, table: Tensor, score: str) -> Tensor:
    """Under tables (1 or E, N): linear between the edges, an exponential tail beyond x_max."""
    s = scores(z, score)
    x_max, p_max, beta = table[:, :3].T
    tail = p_max * torch.exp(-(s - x_max).clamp(min=0) / beta)
    inside = torch.maximum(interpolated(s, table[:, 3:].contiguous()), p_max)
    return torch.where(s > x_max, tail, inside)


# ---- R, from p-values, local fdr or logits in order of evidence (T, E) ----


def last(holds: Tensor, ranks: Tensor) -> Tensor:
    return (holds * ranks).amax(dim=1)


def step_up(p: Tensor, alpha: float | Tensor, ranks: Tensor) -> Tensor:
    return last(p * len(ranks) <= alpha * ranks, ranks)


def storey(router: Any, p: Tensor, ranks: Tensor, null: Any) -> Tensor:
    if router.pi0 is not None:
        return step_up(p, router.alpha / router.pi0, ranks)
    low = p <= router.lam
    pi0 = (1 + (~low).sum(dim=1, keepdim=True)) / ((1 - router.lam) * len(ranks))
    return step_up(p.where(low, math.inf), router.alpha / pi0, ranks)


def ebh(router: Any, seen: Tensor, ranks: Tensor, null: Any) -> Tensor:
    if router.e == "lr":
        odds = null.pi0 / (1 - null.pi0) if null.pi0 < 1 else 0.0
        e = (1 / seen - 1) * odds
    else:
        e = 0.5 * seen.rsqrt()
    return last(e * (router.alpha * ranks) >= len(ranks), ranks)


def higher_criticism(router: Any, p: Tensor, ranks: Tensor, null: Any) -> Tensor:
    p, share = p.clamp(2.0**-53, 1 - 2.0**-53), ranks / len(ranks)
    h = math.sqrt(len(ranks)) * (share - p) / torch.sqrt(share * (1 - share))
    h[:, -1] = -math.inf  # its variance is 0
    R = (h + router.c * ranks).argmax(dim=1) + 1
    return R * (h > 0).any(dim=1)


def entropy(router: Any, z: Tensor, ranks: Tensor, null: Any) -> Tensor:
    logprob = torch.log_softmax(z, dim=1)
    H = -(logprob.exp() * logprob).sum(dim=1)
    return torch.ceil(router.c * torch.exp(H)).long()


def top_p(router: Any, z: Tensor, ranks: Tensor, null: Any) -> Tensor:
    return 1 + (torch.softmax(z, dim=1).cumsum(dim=1)[:, :-1] < router.P).sum(dim=1)


def kneedle(router: Any, z: Tensor, ranks: Tensor, null: Any) -> Tensor:
    y = torch.softmax(z, dim=1)
    share = (y[:, :1] - y) / (y[:, :1] - y[:, -1:])
    return (share - (ranks - 1) / (len(ranks) - 1) + router.c * ranks).argmax(dim=1) + 1


def gap_ratio(router: Any, z: Tensor, ranks: Tensor, null: Any) -> Tensor:
    min_k, max_k = router.limits(len(ranks))
    h = (z[:, :-1] - z[:, 1:])[:, min_k - 1 : max_k]
    return (h + router.c * ranks[min_k - 1 : max_k][: h.shape[1]]).argmax(dim=1) + min_k


COUNTS: dict[str, Callable[[Any, Tensor, Tensor, Any], Tensor]] = {
    "topk": lambda router, z, ranks, null: torch.full((len(z),), router.k),
    "bh": lambda router, p, ranks, null: step_up(p, router.alpha, ranks),
    "by": lambda router, p, ranks, null: step_up(p, router.alpha / (1 / ranks).sum(), ranks),
    "storey_bh": storey,
    "weighted_bh": lambda router, p, ranks, null: step_up(p, router.alpha, ranks),
    "ebh": ebh,
    "local_fdr": lambda router, lfdr, ranks, null: (lfdr <= router.q).sum(dim=1),
    "fixed_p": lambda router, p, ranks, null: (p <= router.t).sum(dim=1),
    "higher_criticism": higher_criticism,
    "top_p": top_p,
    "min_p": lambda router, z, ranks, null: (torch.exp(z - z[:, :1]) > router.t).sum(dim=1),
    "entropy": entropy,
    "kneedle": kneedle,
    "gap_ratio": gap_ratio,
    "expert_threshold": lambda router, p, ranks, null: (p <= router.rho).sum(dim=1),
}
ON_P = (
    "bh",
    "by",
    "storey_bh",
    "weighted_bh",
    "ebh",
    "fixed_p",
    "higher_criticism",
    "expert_threshold",
)
