"""How many experts a token gets: the routers, as their files in csrc/routers/ define them.

Each is a function of what it sees of the tokens and of its parameters, in the order of its C
twin. r counts from 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import Flag, auto
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..spec import RouteSpec
from .nulls import least_scores, local_fdr_of, p_of_scores
from .prepared import Prepared
from .rule import below

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Wants(Flag):
    """What a router looks at. The logits order the experts."""

    NOTHING = 0
    Z = auto()  # the logits themselves
    P = auto()  # p-values, which order the experts before their logits do
    LFDR = auto()  # local false discovery rates, if the spec has a table of them
    WEIGHTS = auto()  # the spec's table holds a weight for each expert, which divides its p


class Tokens(NamedTuple):
    """T tokens as a router sees them: the n experts that each may use, best first, (T, n)."""

    own: Prepared
    z: Tensor  # the logits, descending for a router that doesn't want p
    scores: Any = None  # of a null by layer with a table, descending
    p_sorted: Any = None  # ascending, where the scores don't tell

    @property
    def p(self) -> Tensor:
        """The p-values, ascending; of a router that wants them."""
        p: Tensor = self.p_sorted
        return p_of_scores(self.own, self.scores) if p is None else p

    @property
    def lfdr(self) -> Tensor:
        """The local false discovery rates; of a router that wants them."""
        return local_fdr_of(self.own, self.scores)

    @property
    def distance(self) -> Tensor:
        """z_1 - z_r >= 0; infinities that are equal lie at distance 0."""
        return -below(self.z, self.z[:, :1])

    def reach(
        self,
        levels_of: Callable[..., NDArray[np.float64]],
        *arguments: float,
        row: Tensor | None = None,
    ) -> Tensor:
        """(T, n) bool: p_(r) <= level_r; `row`: which levels a token has, of several."""
        if self.p_sorted is None:
            bound = self.own.constant(least_scores, levels_of, *arguments)
            return self.scores >= (bound if row is None else bound[row])
        bound = self.own.constant(levels_of, *arguments)
        reached: Tensor = self.p_sorted <= (bound if row is None else bound[row])
        return reached


class Form(NamedTuple):
    """A router in torch."""

    wants: Wants
    rejections: Callable[..., Tensor]  # (T,), R before clamping


ROUTERS: dict[str, Form] = {}


def router(wants: Wants) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Enters a function under its name, that of the router."""

    def enter(count: Callable[..., Tensor]) -> Callable[..., Tensor]:
        ROUTERS[count.__name__] = Form(wants, count)
        return count

    return enter


# ---- what several do ----


def _last(holds: Tensor, tokens: Tokens) -> Tensor:
    """The last r that holds, 0 if none does."""
    return (holds * tokens.own.whole_ranks).amax(1)


def _number(holds: Tensor) -> Tensor:
    """How many r hold."""
    return holds.sum(1, dtype=torch.int32)


def _argmax(h: Tensor, first: int, c: float, tokens: Tokens) -> Tensor:
    """The r with the largest h_r + c r, h of the ranks from `first` on, the smallest on ties; 0
    if there is none above -inf."""
    if not h.shape[1]:
        return h.new_zeros(len(h))
    tilt = c * tokens.own.ranks[first - 1 : first - 1 + h.shape[1]]
    most = (h + tilt).max(1)
    return (most.indices + first).masked_fill(most.values == -math.inf, 0)


def step_up_levels(alpha: float, experts: int, ranks: int | None = None) -> NDArray[np.float64]:
    """(ranks,) the largest p that the step-up rule rejects at each r: p n <= alpha r, exactly.

    ranks : of r, from 1 on; None for all n experts
    """
    ranks = experts if ranks is None else ranks
    if math.isinf(alpha):
        return np.full(ranks, math.inf)
    over, under = alpha.as_integer_ratio()
    found = np.empty(ranks)
    for r in range(1, ranks + 1):
        level = over * r / (under * experts)  # the nearest float
        a, b = level.as_integer_ratio()
        is_above = a * under * experts > over * r * b
        found[r - 1] = math.nextafter(level, 0) if is_above else level
    return found


def _step_up_levels(spec: RouteSpec, alpha: float) -> NDArray[np.float64]:
    return step_up_levels(alpha, spec.rule.eligible(spec.num_experts))


def _step_up(tokens: Tokens, alpha: float) -> Tensor:
    """max{r : p_(r) n <= alpha r}: Benjamini & Hochberg."""
    return _last(tokens.reach(_step_up_levels, alpha), tokens)


def _one_level(spec: RouteSpec, level: float) -> NDArray[np.float64]:
    return np.array([level])


# ---- on p-values and local false discovery rates ----


@router(Wants.P)
def bh(tokens: Tokens, alpha: float) -> Tensor:
    return _step_up(tokens, alpha)


@router(Wants.P | Wants.WEIGHTS)
def weighted_bh(tokens: Tokens, alpha: float) -> Tensor:
    return _step_up(tokens, alpha)


@router(Wants.P)
def by(tokens: Tokens, alpha: float) -> Tensor:
    return _step_up(tokens, alpha / sum(1 / j for j in range(1, tokens.own.experts + 1)))


def _storey_levels(spec: RouteSpec, alpha: float, lam: float) -> NDArray[np.float64]:
    """(n + 1, n): the levels where 0..n p-values are at most lam; no r above that is reached."""
    n = spec.rule.eligible(spec.num_experts)
    found = np.full((n + 1, n), -1.0)
    for low in range(1, n + 1):
        pi0 = (1 + (n - low)) / ((1 - lam) * n)
        found[low, :low] = step_up_levels(alpha / pi0, n, low)
    return found


@router(Wants.P)
def storey_bh(tokens: Tokens, alpha: float, lam: float, pi0: float) -> Tensor:
    if pi0 > 0:
        return _step_up(tokens, alpha / pi0)
    low = _number(tokens.reach(_one_level, lam))
    return _last(tokens.reach(_storey_levels, alpha, lam, row=low), tokens)


@router(Wants.P | Wants.LFDR)
def ebh(tokens: Tokens, alpha: float, pi0: float) -> Tensor:
    own = tokens.own
    if own.spec.table is None:
        e = 0.5 / tokens.p.sqrt()
    else:
        e = (1 / tokens.lfdr - 1) * (pi0 / (1 - pi0) if pi0 < 1 else 0.0)
    return _last(e * (alpha * own.ranks) >= own.experts, tokens)


@router(Wants.LFDR)
def local_fdr(tokens: Tokens, q: float) -> Tensor:
    return _number(tokens.lfdr <= q)


@router(Wants.P)
def fixed_p(tokens: Tokens, t: float) -> Tensor:
    return _number(tokens.reach(_one_level, t))


@router(Wants.P)
def expert_threshold(tokens: Tokens, rho: float) -> Tensor:
    return _number(tokens.reach(_one_level, rho))


@router(Wants.P)
def higher_criticism(tokens: Tokens, beta: float, denominator: float, c: float) -> Tensor:
    n, by_rank = tokens.own.experts, denominator == 0
    last = math.floor(beta * n) if 0 < beta < 1 else n
    if by_rank and last == n:
        last -= 1  # v would be 0
    if last == 0:
        return tokens.own.whole_ranks.new_zeros(len(tokens.z))
    p, share = tokens.p[:, :last], tokens.own.ranks[:last] / n
    clipped = p.clamp(2.0**-53, 1 - torch.finfo(p.dtype).eps / 2)  # 1 - 2^-53
    v = share * (1 - share) if by_rank else clipped * (1 - clipped)
    h = math.sqrt(n) * (share - clipped) / v.sqrt()
    if beta == 0:  # "auto"
        h = h.masked_fill(p < 1 / n, -math.inf)
    return _argmax(h, 1, c, tokens).masked_fill(h.amax(1) <= 0, 0)


# ---- on the logits: a_r = p_(r) / p_(1) of the softmax, exactly 1 for equal logits ----


@router(Wants.NOTHING)
def topk(tokens: Tokens, k: float) -> Tensor:
    return tokens.own.whole_ranks.new_full((len(tokens.z),), int(k))


@router(Wants.Z)
def top_p(tokens: Tokens, P: float) -> Tensor:
    sums = torch.exp(-tokens.distance).cumsum(1)
    return 1 + _number(sums[:, :-1] < P * sums[:, -1:])


@router(Wants.Z)
def min_p(tokens: Tokens, t: float) -> Tensor:
    return _number(torch.exp(-tokens.distance) > t)


@router(Wants.Z)
def entropy(tokens: Tokens, c: float) -> Tensor:
    d = tokens.distance
    a = torch.exp(-d)
    mass = a.sum(1)
    spread = (a * d).masked_fill(a == 0, 0.0).sum(1)
    shared = (c * (mass * torch.exp(spread / mass))).ceil()
    return shared.nan_to_num().clamp(max=tokens.own.experts)


@router(Wants.Z)
def kneedle(tokens: Tokens, on: float, c: float) -> Tensor:
    d = tokens.distance
    if on == 0:  # "prob"
        d = 1 - torch.exp(-d)
    whole, steps = d[:, -1:], max(tokens.own.experts - 1, 1)
    share = (d / whole).masked_fill(d == math.inf, 1.0)
    knee = _argmax(share - (tokens.own.ranks - 1) / steps, 1, c, tokens)
    return knee.masked_fill(whole[:, 0] == 0, 0)


@router(Wants.Z)
def gap_ratio(tokens: Tokens, c: float) -> Tensor:
    spec, z = tokens.own.spec, tokens.z
    last = min(spec.max_k, tokens.own.experts - 1)
    above, beneath = z[:, spec.min_k - 1 : last], z[:, spec.min_k : last + 1]
    return _argmax(-below(beneath, above), spec.min_k, c, tokens)
