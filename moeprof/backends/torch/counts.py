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

from .prepared import Prepared
from .rule import below

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Wants(Flag):
    """What a router looks at, besides the logits, which order the experts."""

    NOTHING = 0
    P = auto()  # p-values, which order the experts before their logits do
    LFDR = auto()  # local false discovery rates, if the spec has a table of them
    WEIGHTS = auto()  # the spec's table holds a weight for each expert, which divides its p


class Tokens(NamedTuple):
    """T tokens as a router sees them: the n experts that each may use, best first, (T, n)."""

    own: Prepared
    z: Tensor  # the logits, descending for a router that doesn't want p
    p: Any = None  # ascending; a router that wants p has it
    lfdr: Any = None

    @property
    def experts(self) -> int:
        return self.z.shape[1]

    @property
    def ranks(self) -> Tensor:
        """1..n."""
        return self.own.ranks[: self.experts]

    @property
    def below(self) -> Tensor:
        """z_1 - z_r >= 0; infinities that are equal lie at distance 0."""
        return -below(self.z, self.z[:, :1])


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
    return (holds * tokens.ranks).amax(1)


def _argmax(h: Tensor, first: int, c: float, tokens: Tokens) -> Tensor:
    """The r with the largest h_r + c r, h of the ranks from `first` on, the smallest on ties; 0
    if there is none above -inf."""
    if not h.shape[1]:
        return h.new_zeros(len(h))
    most = (h + c * tokens.ranks[first - 1 : first - 1 + h.shape[1]]).max(1)
    return (most.indices + first).where(most.values > -math.inf, 0)


def _levels(alpha: float, experts: int) -> NDArray[np.float64]:
    """(n,) the largest p that the step-up rule rejects at each r: p n <= alpha r, exactly."""
    if math.isinf(alpha):
        return np.full(experts, math.inf)
    over, under = alpha.as_integer_ratio()
    found = np.empty(experts)
    for r in range(1, experts + 1):
        level = over * r / (under * experts)  # the nearest float
        a, b = level.as_integer_ratio()
        is_above = a * under * experts > over * r * b
        found[r - 1] = math.nextafter(level, 0) if is_above else level
    return found


def _step_up(tokens: Tokens, alpha: float) -> Tensor:
    """max{r : p_(r) n <= alpha r}: Benjamini & Hochberg."""
    levels = tokens.own.constant(_levels, alpha, tokens.experts)
    return _last(tokens.p <= levels, tokens)


def _rejected_at(level: float, tokens: Tokens) -> Tensor:
    """#{p <= level}."""
    return (tokens.p <= level).sum(1)


# ---- on p-values and local false discovery rates ----


@router(Wants.P)
def bh(tokens: Tokens, alpha: float) -> Tensor:
    return _step_up(tokens, alpha)


@router(Wants.P | Wants.WEIGHTS)
def weighted_bh(tokens: Tokens, alpha: float) -> Tensor:
    return _step_up(tokens, alpha)


@router(Wants.P)
def by(tokens: Tokens, alpha: float) -> Tensor:
    return _step_up(tokens, alpha / sum(1 / j for j in range(1, tokens.experts + 1)))


def _storey_levels(alpha: float, lam: float, experts: int) -> NDArray[np.float64]:
    """(n + 1, n): `_levels` for 0..n p-values that are at most lam; no r above that."""
    found = np.full((experts + 1, experts), -1.0)
    for low in range(1, experts + 1):
        pi0 = (1 + (float(experts) - low)) / ((1 - lam) * experts)
        found[low, :low] = _levels(alpha / pi0, experts)[:low]
    return found


@router(Wants.P)
def storey_bh(tokens: Tokens, alpha: float, lam: float, pi0: float) -> Tensor:
    if pi0 > 0:
        return _step_up(tokens, alpha / pi0)
    levels = tokens.own.constant(_storey_levels, alpha, lam, tokens.experts)
    return _last(tokens.p <= levels[_rejected_at(lam, tokens)], tokens)


@router(Wants.P | Wants.LFDR)
def ebh(tokens: Tokens, alpha: float, pi0: float) -> Tensor:
    if tokens.lfdr is None:
        e = 0.5 / tokens.p.sqrt()
    else:
        e = (1 / tokens.lfdr - 1) * (pi0 / (1 - pi0) if pi0 < 1 else 0.0)
    return _last(e * (alpha * tokens.ranks) >= tokens.experts, tokens)


@router(Wants.LFDR)
def local_fdr(tokens: Tokens, q: float) -> Tensor:
    return (tokens.lfdr <= q).sum(1)


@router(Wants.P)
def fixed_p(tokens: Tokens, t: float) -> Tensor:
    return _rejected_at(t, tokens)


@router(Wants.P)
def expert_threshold(tokens: Tokens, rho: float) -> Tensor:
    return _rejected_at(rho, tokens)


@router(Wants.P)
def higher_criticism(tokens: Tokens, beta: float, denominator: float, c: float) -> Tensor:
    n, by_rank = tokens.experts, denominator == 0
    last = math.floor(beta * n) if 0 < beta < 1 else n
    if by_rank and last == n:
        last -= 1  # v would be 0
    if last == 0:
        return tokens.p.new_zeros(len(tokens.p))
    p, share = tokens.p[:, :last], tokens.ranks[:last] / n
    least = 2.0**-53
    clipped = p.clamp(least, 1 - least)
    v = share * (1 - share) if by_rank else clipped * (1 - clipped)
    h = math.sqrt(n) * (share - clipped) / v.sqrt()
    if beta == 0:  # "auto"
        h = h.where(p >= 1 / n, -math.inf)
    return _argmax(h, 1, c, tokens).where((h > 0).any(1), 0)


# ---- on the logits: a_r = p_(r) / p_(1) of the softmax, exactly 1 for equal logits ----


@router(Wants.NOTHING)
def topk(tokens: Tokens, k: float) -> Tensor:
    return torch.full((len(tokens.z),), int(k), device=tokens.z.device)


@router(Wants.NOTHING)
def top_p(tokens: Tokens, P: float) -> Tensor:
    sums = torch.exp(-tokens.below).cumsum(1)
    return 1 + (sums[:, :-1] < P * sums[:, -1:]).sum(1)


@router(Wants.NOTHING)
def min_p(tokens: Tokens, t: float) -> Tensor:
    return (torch.exp(-tokens.below) > t).sum(1)


@router(Wants.NOTHING)
def entropy(tokens: Tokens, c: float) -> Tensor:
    d = tokens.below
    a = torch.exp(-d)
    mass = a.sum(1)
    spread = (a * d).where(a > 0, 0.0).sum(1)
    shared = (c * (mass * torch.exp(spread / mass))).ceil()
    return shared.nan_to_num().clamp(max=tokens.experts)


@router(Wants.NOTHING)
def kneedle(tokens: Tokens, on: float, c: float) -> Tensor:
    d = tokens.below
    if on == 0:  # "prob"
        d = 1 - torch.exp(-d)
    whole, steps = d[:, -1:], max(tokens.experts - 1, 1)
    share = (d / whole).where(d < math.inf, 1.0)
    knee = _argmax(share - (tokens.ranks - 1) / steps, 1, c, tokens)
    return knee.where(whole[:, 0] != 0, 0)


@router(Wants.NOTHING)
def gap_ratio(tokens: Tokens, c: float) -> Tensor:
    spec, z = tokens.own.spec, tokens.z
    last = min(spec.max_k, tokens.experts - 1)
    above, beneath = z[:, spec.min_k - 1 : last], z[:, spec.min_k : last + 1]
    return _argmax(-below(beneath, above), spec.min_k, c, tokens)
