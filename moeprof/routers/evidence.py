"""Routers that go by p-values, e-values or local false discovery rates under a null.

What a null's p-values mean, and so what alpha does, is said in :mod:`moeprof.null`. Whatever a
router promises it promises of R before the clamping to min_k..max_k.
"""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np

from .base import ANY, UNIT, Router, Tokens, argmax, last_rank, local_fdr_of, of_layer, parameter

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..null import LayerNull, TokenNull
    from ..null.resolve import AnyNull


def step_up(p: np.ndarray, alpha: float | np.ndarray) -> np.ndarray:
    """max{r : p_(r) E <= alpha r} of each row (T, E), ascending; alpha a number or (T, 1).

    Exact where a long double has 64 bits or more: 53 of p or alpha, 11 of E or r.
    """
    r = np.arange(1, p.shape[1] + 1)
    return last_rank(p.astype(np.longdouble) * p.shape[1] <= np.longdouble(alpha) * r)


@dataclass(frozen=True)
class OnNull(Router):
    """What routers on a null share; registered under no name."""

    name: ClassVar[str] = ""
    wants_null: ClassVar[bool] = True
    null_kind: ClassVar[str] = "trimmed"  # of the default null; "efron" where trimmed won't do


@dataclass(frozen=True)
class BH(OnNull):
    """R = max{r : p_(r) E <= alpha r}, the step-up rule of Benjamini and Hochberg.

    Parameters
    ----------
    alpha : float, or one per layer
        In (0, 1). A knob for compute. It bounds the false discovery rate only against the
        null that the p-values come from, for independent (or positively dependent) scores,
        and only before the clamping to min_k..max_k.

    Source: Benjamini & Hochberg 1995, J. R. Statist. Soc. B 57, eq. (1). The comparison is
    exact, not of rounded products.
    """

    alpha: float = parameter(0.05, UNIT, per_layer=True)
    name: ClassVar[str] = "bh"
    main: ClassVar[str] = "alpha"

    def count(self, tokens: Tokens) -> np.ndarray:
        return step_up(tokens.p, self.alpha)


@dataclass(frozen=True)
class BY(OnNull):
    """BH at alpha/c(E), c(E) = 1 + 1/2 + ... + 1/E (4.744 for 64): for any dependence.

    Parameters
    ----------
    alpha : float, or one per layer
        In (0, 1). As for :class:`BH`, whatever the dependence between a token's scores.

    Source: Benjamini & Yekutieli 2001, Ann. Statist. 29, theorem 1.3.
    """

    alpha: float = parameter(0.05, UNIT, per_layer=True)
    name: ClassVar[str] = "by"
    main: ClassVar[str] = "alpha"

    def count(self, tokens: Tokens) -> np.ndarray:
        return step_up(tokens.p, self.alpha / np.cumsum(1 / tokens.ranks)[-1])


@dataclass(frozen=True)
class StoreyBH(OnNull):
    """R = max{r : p_(r) <= min(lam, alpha r / (E pi0))}, pi0 estimated from each token.

    pi0 = (1 + #{p > lam}) / ((1 - lam) E), not capped at 1.

    Parameters
    ----------
    alpha : float, or one per layer
        In (0, 1). As for :class:`BH`, for independent scores.
    lam : float
        In (0, 1): p-values above it are taken for nulls.
    pi0 : float, or one per layer, or None
        A share of nulls that is known, > 0: then BH at alpha/pi0, and lam has no part.

    Source: Storey, Taylor & Siegmund 2004, J. R. Statist. Soc. B 66.
    """

    alpha: float = parameter(0.05, UNIT, per_layer=True)
    lam: float = parameter(0.5, UNIT)
    pi0: float | None = parameter(None, "(0, inf)", words=(None,), per_layer=True)
    name: ClassVar[str] = "storey_bh"
    main: ClassVar[str] = "alpha"

    def count(self, tokens: Tokens) -> np.ndarray:
        if self.pi0 is not None:
            return step_up(tokens.p, self.alpha / self.pi0)
        experts, low = tokens.p.shape[1], tokens.p <= self.lam
        pi0 = (1 + (~low).sum(axis=1, keepdims=True)) / ((1 - self.lam) * experts)
        return step_up(np.where(low, tokens.p, np.inf), self.alpha / pi0)


@dataclass(frozen=True)
class WeightedBH(OnNull):
    """BH on p_e / (v u_e): experts that matter more get a larger share of alpha.

    Parameters
    ----------
    alpha : float, or one per layer
        In (0, 1). As for :class:`BH`, if the weights come from calibration text only: then
        the false discovery rate is alpha v (sum of u over the nulls) / E.
    u : (E,) or (L, E) numbers, or None
        The experts' weights, >= 0 with mean 1 in each layer. An expert of weight 0 is never
        selected, not by min_k either.
    v : float, or (L,) numbers
        The layers' weights, >= 0 with mean 1 over the layers.

    Source: Genovese, Roeder & Wasserman 2006, Biometrika 93.
    """

    alpha: float = parameter(0.05, UNIT, per_layer=True)
    u: Any = None
    v: Any = 1.0
    name: ClassVar[str] = "weighted_bh"
    main: ClassVar[str] = "alpha"
    notes: ClassVar[dict[str, str]] = {
        "u": "None (all 1), or (E,) or (L, E) weights >= 0 of mean 1",
        "v": "a weight >= 0, or (L,) of them of mean 1",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.u is not None:
            object.__setattr__(self, "u", _weights("u", self.u, (1, 2)))
        object.__setattr__(self, "v", _weights("v", self.v, (0, 1)))

    def at(self, layer: int, num_layers: int) -> Router:
        router, own = super().at(layer, num_layers), {}
        if self.u is not None and isinstance(self.u[0], tuple):
            own["u"] = of_layer("u", self.u, layer, num_layers)
        if isinstance(self.v, tuple):
            own["v"] = of_layer("v", self.v, layer, num_layers)
        return replace(router, **own) if own else router

    def table(
        self, num_experts: int, null: "LayerNull | TokenNull | None" = None
    ) -> "NDArray[np.float64]":
        u = np.ones(num_experts) if self.u is None else np.array(self.u, dtype=np.float64)
        if u.ndim == 2 or isinstance(self.v, tuple):
            raise ValueError("u, v: have values for each layer; choose one by router.at()")
        if len(u) != num_experts:
            raise ValueError(f"u: expected {num_experts} weights (experts), got {len(u)}")
        weights = self.v * u
        if (weights > 0).sum() < self.min_k:
            raise ValueError(
                f"min_k: expected at most {(weights > 0).sum()} (experts of positive weight), "
                f"got {self.min_k}"
            )
        return weights

    def limits(self, num_experts: int, eligible: int | None = None) -> tuple[int, int]:
        limits = super().limits(num_experts, eligible)
        self.table(num_experts)  # min_k against the weights
        return limits

    def evidence(self, p: np.ndarray, null: "LayerNull | TokenNull | None") -> np.ndarray:
        weights = self.table(p.shape[1])
        return np.divide(p, weights, out=np.full_like(p, np.inf), where=weights > 0)

    def count(self, tokens: Tokens) -> np.ndarray:
        return step_up(tokens.p, self.alpha)


def _weights(name: str, values: Any, ndims: tuple[int, int]) -> Any:
    """Numbers or nested tuples of weights >= 0 with row mean 1; of 0-D no mean is asked."""
    array = np.asarray(values)
    if array.dtype.kind not in "fiu" or array.ndim not in ndims or array.size == 0:
        raise ValueError(f"{name}: expected weights in {' or '.join(map(str, ndims))} dimensions")
    array = array.astype(np.float64)
    if not (np.isfinite(array) & (array >= 0)).all():
        raise ValueError(f"{name}: expected finite weights >= 0")
    if array.ndim and (np.abs(array.mean(axis=-1) - 1) > 1e-6).any():
        raise ValueError(f"{name}: expected weights of mean 1, got {array.mean(axis=-1)}")
    return _nested(array.tolist())


def _nested(values: Any) -> Any:
    return tuple(map(_nested, values)) if isinstance(values, list) else values


@dataclass(frozen=True)
class EBH(OnNull):
    """R = max{r : e_(r) >= E / (alpha r)}: BH on e-values, for any dependence.

    Parameters
    ----------
    alpha : float, or one per layer
        In (0, 1). It bounds the false discovery rate, whatever the dependence, as far as the
        e-values have mean <= 1 under the null.
    e : "lr" or "calibrator"
        "lr": e = f1/f0 = (1/lfdr - 1) pi0/(1 - pi0), 0 below the null's centre; needs a null of
        kind `efron`, by layer. "calibrator": e = p^(-1/2) / 2, of any null.

    Source: Wang & Ramdas 2022, J. R. Statist. Soc. B 84; the calibrator: Vovk & Wang 2021,
    Ann. Statist. 49.
    """

    alpha: float = parameter(0.05, UNIT, per_layer=True)
    e: str = parameter("lr", words=("lr", "calibrator"))
    name: ClassVar[str] = "ebh"
    main: ClassVar[str] = "alpha"

    @property
    def null_kind(self) -> str:  # type: ignore[override]  # here `e` decides
        return "efron" if self.e == "lr" else "trimmed"

    def parameters(self, null: "LayerNull | TokenNull | None" = None) -> dict[str, float]:
        alpha = super().parameters()["alpha"]
        return {"alpha": alpha, "pi0": float(_efron(null, "pi0").pi0) if self.e == "lr" else 0.0}

    def table(
        self, num_experts: int, null: "LayerNull | TokenNull | None"
    ) -> "NDArray[np.float64] | None":
        return _efron(null, "local_fdr").local_fdr if self.e == "lr" else None

    def _local_fdr(
        self, z: np.ndarray, null: "LayerNull | TokenNull | None"
    ) -> tuple[np.ndarray | None, float | None]:
        if self.e != "lr":
            return None, None
        fitted = _efron(null, "pi0")
        return local_fdr_of(z, fitted), fitted.pi0

    def count(self, tokens: Tokens) -> np.ndarray:
        with np.errstate(divide="ignore"):
            if tokens.lfdr is None:
                e = 0.5 / np.sqrt(tokens.p)
            elif tokens.pi0 is not None and tokens.pi0 < 1:
                e = (1 / tokens.lfdr - 1) * (tokens.pi0 / (1 - tokens.pi0))
            else:
                e = np.zeros_like(tokens.lfdr)
        return last_rank(e * (self.alpha * tokens.ranks) >= e.shape[1])


def _efron(null: "LayerNull | TokenNull | None", what: str) -> "LayerNull":
    """The null, if it has this, as only an efron null by layer does; ValueError of others."""
    if not hasattr(null, what):
        from ..null.layers import FIT_EFRON

        raise ValueError(
            f"null: expected one of kind efron, by layer (for its {what}): {FIT_EFRON}"
        )
    return cast("LayerNull", null)


@dataclass(frozen=True)
class LocalFDR(OnNull):
    """R = #{lfdr <= q}; at q = 1/2 those that are each more likely needed than not.

    lfdr is a function of the score, fitted to the layer's calibration scores; it never rises
    with the score.

    Parameters
    ----------
    q : float, or one per layer
        In (0, 1). Needs a null of kind `efron`, by layer.

    Source: Efron, Tibshirani, Storey & Tusher 2001, J. Amer. Statist. Assoc. 96.
    """

    q: float = parameter(0.2, UNIT, per_layer=True)
    name: ClassVar[str] = "local_fdr"
    null_kind: ClassVar[str] = "efron"
    main: ClassVar[str] = "q"

    def table(
        self, num_experts: int, null: "LayerNull | TokenNull | None"
    ) -> "NDArray[np.float64]":
        return _efron(null, "local_fdr").local_fdr

    def evidence(self, p: np.ndarray, null: "LayerNull | TokenNull | None") -> np.ndarray:
        return np.zeros_like(p)  # the logits decide: under one null per layer it is the same

    def _local_fdr(
        self, z: np.ndarray, null: "LayerNull | TokenNull | None"
    ) -> tuple[np.ndarray | None, float | None]:
        return local_fdr_of(z, _efron(null, "local_fdr")), None

    def count(self, tokens: Tokens) -> np.ndarray:
        assert tokens.lfdr is not None  # of an efron null, see `_local_fdr`
        return (tokens.lfdr <= self.q).sum(axis=1)


@dataclass(frozen=True)
class FixedP(OnNull):
    """R = #{p <= t}: BH without the correction, the control for it.

    Parameters
    ----------
    t : float, or one per layer
        In (0, 1).

    Source: none; an uncorrected test of each expert at level t.
    """

    t: float = parameter(0.05, UNIT, per_layer=True)
    name: ClassVar[str] = "fixed_p"
    main: ClassVar[str] = "t"

    def count(self, tokens: Tokens) -> np.ndarray:
        return (tokens.p <= self.t).sum(axis=1)


@dataclass(frozen=True)
class ExpertThreshold(OnNull):
    """R = #{s_e above that expert's own 1 - rho quantile} = #{p_e <= rho}.

    The p-values are of a null of every score of each expert, which :meth:`adapt` makes of a
    complete one: then each expert takes a share rho of the tokens. A null fitted to fewer than
    E - 1 tokens is an error. Under any other null (of a layer, "normal") it is FixedP(rho).

    Parameters
    ----------
    rho : float, or one per layer
        In (0, 1); k/E is the model's own load.

    Source: arXiv 2603.11535.
    """

    rho: float = parameter(0.125, UNIT, per_layer=True)
    name: ClassVar[str] = "expert_threshold"
    null_kind: ClassVar[str] = "efron"
    main: ClassVar[str] = "rho"

    def adapt(self, null: "AnyNull") -> "AnyNull":
        if not hasattr(null, "as_kind"):
            return null
        own = null.as_kind("all").per_expert(1.0)
        if own.fallbacks:
            raise ValueError(
                f"null: {self.name} needs at least {own.counts.shape[1] - 1} scores of each "
                f"expert, got {own.tokens}"
            )
        return own

    def count(self, tokens: Tokens) -> np.ndarray:
        return (tokens.p <= self.rho).sum(axis=1)


@dataclass(frozen=True)
class HigherCriticism(OnNull):
    """R = argmax over S of h_r + c r, h_r = sqrt(E) (r/E - p_(r)) / sqrt(v).

    The number of p-values below which their excess over what chance gives is most significant;
    0 where no h_r > 0, or S is empty. p is clipped to [2^-53, 1 - 2^-53].

    Parameters
    ----------
    beta : float or "auto"
        S = {1..floor(beta E)}, beta in (0, 1]; "auto" is all r with p_(r) >= 1/E (HC+).
    denominator : "rank" or "p"
        "rank": v = (r/E)(1 - r/E), r < E, for selection (2008). "p": v = p_(r)(1 - p_(r)), for
        detection (2004): one tiny p gives R = 1.
    c : float, or one per layer
        The tilt: R never falls as it grows.

    Source: Donoho & Jin 2004, Ann. Statist. 32, and 2008, PNAS 105. (The tilt is moeprof's.)
    """

    beta: float | str = parameter(1.0, "(0, 1]", words=("auto",))
    denominator: str = parameter("rank", words=("rank", "p"))
    c: float = parameter(0.0, ANY, per_layer=True)
    name: ClassVar[str] = "higher_criticism"
    main: ClassVar[str] = "c"
    # v of "rank" bounds h by E; with "p" tokens beyond this need p-values under 1e-4
    main_range: ClassVar[tuple[float, float]] = (-1100.0, 1100.0)

    def count(self, tokens: Tokens) -> np.ndarray:
        p, share = np.clip(tokens.p, 2.0**-53, 1 - 2.0**-53), tokens.ranks / tokens.p.shape[1]
        experts = p.shape[1]
        v = share * (1 - share) if self.denominator == "rank" else p * (1 - p)
        last = experts if self.beta == "auto" else math.floor(self.beta * experts)
        within = np.broadcast_to((tokens.ranks <= last) & (v > 0), p.shape)
        if self.beta == "auto":
            within = within & (tokens.p >= 1 / experts)
        h = np.full_like(p, -np.inf)
        np.divide(math.sqrt(experts) * (share - p), np.sqrt(v), out=h, where=within)
        return np.where((h > 0).any(axis=1), argmax(h, self.c), 0)
