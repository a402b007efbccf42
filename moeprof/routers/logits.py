"""Routers that go by the logits, or by the softmax of them, alone.

a_r = p_(r) / p_(1) = exp(z_(r) - z_(1)) stands for the softmax p where its sum cancels: it is
exactly 1 for equal logits.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .base import ANY, UNIT, Router, Tokens, argmax, below_top, parameter, shown, whose

TILT = 100.0  # of a search for a budget; more than gaps of logits are


@dataclass(frozen=True)
class TopK(Router):
    """R = k: the k experts with the highest logits, for every token.

    Parameters
    ----------
    k : int, or one per layer
        Experts per token, 1 <= k <= E. max_k is k unless given.

    Source: Shazeer et al. 2017, "Outrageously Large Neural Networks", eq. (3) to (5).
    """

    k: int = parameter(8, "[1, inf)", per_layer=True, integer=True)
    name: ClassVar[str] = "topk"
    main: ClassVar[str] = "k"
    main_range: ClassVar[tuple[float, float]] = (0.0, 1025.0)
    notes: ClassVar[dict[str, str]] = {"max_k": "k"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_k is None and not isinstance(self.k, tuple):
            object.__setattr__(self, "max_k", self.k)

    def limits(self, num_experts: int, eligible: int | None = None) -> tuple[int, int]:
        most = num_experts if eligible is None else eligible
        if not isinstance(self.k, tuple) and self.k > most:
            experts, got = whose(most, num_experts), shown(self.k)
            raise ValueError(f"k: expected at most {most} ({experts}), got {got}")
        return super().limits(num_experts, eligible)

    def count(self, tokens: Tokens) -> np.ndarray:
        return np.full(len(tokens.z), self.k)


@dataclass(frozen=True)
class TopP(Router):
    """R = min{r : p_(1) + ... + p_(r) >= P}, p the softmax; the one that crosses P included.

    Parameters
    ----------
    P : float, or one per layer
        The mass to reach, in (0, 1). Where rounding never gets there, R = E.

    Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", ICLR; for
    experts Huang et al. 2024, arXiv 2403.07652.
    """

    P: float = parameter(0.5, UNIT, per_layer=True)
    name: ClassVar[str] = "top_p"
    main: ClassVar[str] = "P"

    def count(self, tokens: Tokens) -> np.ndarray:
        sums = np.cumsum(np.exp(below_top(tokens.z)), axis=1)
        short = sums[:, :-1] < self.P * sums[:, -1:]
        return 1 + short.sum(axis=1)


@dataclass(frozen=True)
class MinP(Router):
    """R = #{p_i > t p_(1)}, p the softmax.

    Parameters
    ----------
    t : float, or one per layer
        In (0, 1), a share of the largest. R falls as it grows.

    Source: the smart expert reduction of ik_llama.cpp, github.com/ikawrakow/ik_llama.cpp.
    """

    t: float = parameter(0.1, UNIT, per_layer=True)
    name: ClassVar[str] = "min_p"
    main: ClassVar[str] = "t"
    increasing: ClassVar[bool] = False

    def count(self, tokens: Tokens) -> np.ndarray:
        return (np.exp(below_top(tokens.z)) > self.t).sum(axis=1)


@dataclass(frozen=True)
class Entropy(Router):
    """R = ceil(c exp(H)), at most E; H is the entropy of the softmax in nats.

    exp(H) is the number of experts that share the mass: 1 for a token with one clear choice, E
    where all logits are equal.

    Parameters
    ----------
    c : float, or one per layer
        Above 0.

    Source: Hill 1973, "Diversity and Evenness", Ecology 54, for exp(H).
    """

    c: float = parameter(0.5, "(0, inf)", per_layer=True)
    name: ClassVar[str] = "entropy"
    main: ClassVar[str] = "c"
    main_range: ClassVar[tuple[float, float]] = (0.0, 1025.0)

    def count(self, tokens: Tokens) -> np.ndarray:
        # exp(H) = A exp(sum a_r d_r / A), A the sum of a_r and d_r = -ln a_r: E for equal ones
        d = -below_top(tokens.z)
        a = np.exp(-d)
        spread = np.multiply(a, d, out=np.zeros_like(a), where=a > 0)
        total, spread = (np.cumsum(x, axis=1)[:, -1] for x in (a, spread))
        experts = np.ceil(self.c * (total * np.exp(spread / total)))
        return np.minimum(experts, tokens.z.shape[1]).astype(int)


@dataclass(frozen=True)
class Kneedle(Router):
    """R = argmax of h_r + c r, h_r = (y_1 - y_r)/(y_1 - y_E) - (r - 1)/(E - 1).

    The knee of the sorted curve y: the point farthest from the chord of its ends. 0 (so min_k)
    where all y are equal. An infinite distance y_1 - y_r is the whole of the curve's height.

    Parameters
    ----------
    on : "prob" or "log"
        y is the softmax, or its logarithm.
    c : float, or one per layer
        The tilt: 0 is the knee itself, R never falls as it grows.

    Source: Satopaa et al. 2011, "Finding a 'Kneedle' in a Haystack", ICDCS Workshops. (The
    tilt is moeprof's.)
    """

    on: str = parameter("prob", words=("prob", "log"))
    c: float = parameter(0.0, ANY, per_layer=True)
    name: ClassVar[str] = "kneedle"
    main: ClassVar[str] = "c"
    main_range: ClassVar[tuple[float, float]] = (-2.0, 2.0)  # h lies in [-1, 1]

    def count(self, tokens: Tokens) -> np.ndarray:
        d = -below_top(tokens.z)
        if self.on == "prob":
            d = 1 - np.exp(-d)
        whole, steps = d[:, -1:], max(d.shape[1] - 1, 1)
        share = np.divide(d, whole, out=np.ones_like(d), where=~np.isinf(d) & (whole > 0))
        knee = argmax(share - (tokens.ranks - 1) / steps, self.c)
        return np.where(whole[:, 0] == 0, 0, knee)


@dataclass(frozen=True)
class GapRatio(Router):
    """R = argmax over r in {min_k..max_k}, r < E, of h_r + c r, h_r = ln p_(r) - ln p_(r+1).

    The largest ratio of neighbours, as a difference of logits; equal infinities lie 0 apart.
    0 where there is no such r.

    Parameters
    ----------
    c : float, or one per layer
        The tilt: R never falls as it grows.

    Source: Ahn & Horenstein 2013, Econometrica 81, for eigenvalues. (The tilt is moeprof's.)
    """

    c: float = parameter(0.0, ANY, per_layer=True)
    name: ClassVar[str] = "gap_ratio"
    main: ClassVar[str] = "c"
    main_range: ClassVar[tuple[float, float]] = (-TILT, TILT)

    def count(self, tokens: Tokens) -> np.ndarray:
        z, h = tokens.z, np.full_like(tokens.z, -math.inf)
        h[:, :-1] = 0
        np.subtract(z[:, :-1], z[:, 1:], out=h[:, :-1], where=z[:, :-1] != z[:, 1:])
        h[:, (tokens.ranks < tokens.min_k) | (tokens.ranks > tokens.max_k)] = -math.inf
        return argmax(h, self.c)
