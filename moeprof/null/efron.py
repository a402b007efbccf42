"""Efron's empirical null and the local fdr, from histogram counts.

The bulk of the scores is taken for nulls: a normal fitted to their middle by maximum likelihood,
with the share pi0 of nulls among all (Efron 2004, "Large-scale simultaneous hypothesis testing:
the choice of a null hypothesis", JASA 99; Efron 2008, "Microarrays, empirical Bayes and the
two-groups model", Statistical Science 23, section 4). The definition is statsmodels'
`NullDistribution` and `local_fdr` on z = (s - median) / (IQR / 1.349); here the same likelihoods
are fed from counts, so that any amount of text costs the same. Inside a bin the scores are taken
as spread evenly.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from ..backends.spec import BINS_PER_UNIT, HIGH, LOW
from .scores import EDGES, TINY

if TYPE_CHECKING:
    from numpy.typing import NDArray


LB, UB = -1.0, 1.0  # what lies between is taken for nulls, in z
NORMAL_IQR = 1.349
LFDR_DEGREE, LFDR_BINS = 7, 30
ScoreT = TypeVar("ScoreT", float, "NDArray[np.float64]")
TOO_NARROW = (
    "efron: the middle half of the scores lies within 1/128, one bin, so that the null is as wide "
    "as the bin and rejects whatever lies above it"
)
UNDETERMINED = "no local fdr can be fitted: the scores leave its density undetermined"


@dataclass(frozen=True)
class EfronNull:
    """The fitted normal and its share, in z = (score - median) / scale."""

    median: float
    scale: float
    mean: float
    sd: float
    pi0: float

    @property
    def centre(self) -> float:
        """The null's mean as a score."""
        return self.median + self.scale * self.mean

    def z(self, scores: ScoreT) -> ScoreT:
        return (scores - self.median) / self.scale

    def pdf(self, z: ScoreT) -> ScoreT:
        x = (z - self.mean) / self.sd
        return np.exp(-0.5 * x**2 - math.log(self.sd) - 0.5 * math.log(2 * math.pi))

    def sf(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """1 - Phi((z - mean) / sd) of scores (...), at least the smallest normal float64."""
        x = (self.z(scores) - self.mean) / self.sd
        return np.maximum(0.5 * np.vectorize(math.erfc)(x * math.sqrt(0.5)), TINY)


def _below(per_bin: NDArray[np.uint64]) -> NDArray[np.float64]:
    """(8193,) float64: the number of scores below each edge."""
    return np.concatenate([[0.0], np.cumsum(per_bin.astype(np.float64))])


def _central_sums(
    per_bin: NDArray[np.uint64], median: float, scale: float
) -> tuple[float, float, float]:
    """(count, sum of z, sum of z^2) of the scores with z in [-1, 1]."""
    edges = (EDGES - median) / scale
    left, right = np.clip(edges[:-1], LB, UB), np.clip(edges[1:], LB, UB)
    count = per_bin * ((right - left) * scale * BINS_PER_UNIT)
    first, second = (left + right) / 2, (left * left + left * right + right * right) / 3
    return float(count.sum()), float(count @ first), float(count @ second)


def _phi(x: float) -> float:
    return 0.5 * math.erfc(-x * math.sqrt(0.5))


def fit_efron(per_bin: NDArray[np.uint64]) -> EfronNull:
    """The EfronNull of a layer's or an expert's histogram (8192,) uint64.

    The maximum of statsmodels' likelihood, in the central scores' count, sum and sum of squares.
    It is found in two variables: at an inner maximum pi0 is the central share over the normal's
    central mass, and the rest is the likelihood of a truncated normal, which has one maximum;
    where that pi0 exceeds 1, the maximum has pi0 = 1. statsmodels' own search, in three
    variables, often stops at pi0 = 1 short of it.

    Always there: the median lies in a bin with scores, so some of them are central, and the
    scale is at least some of a bin (with a warning if it is less than one).

    Raises ValueError where a quarter of the scores or more lies in an outer bin, and with them
    what is outside of the histogram's range: their spread is not known.
    """
    below = _below(per_bin)
    n = below[-1]
    if max(per_bin[0], per_bin[-1]) * 4 >= n:
        raise ValueError(
            f"no efron null can be fitted: a quarter of the scores lies outside [{LOW}, {HIGH}]"
        )
    lower, median, upper = np.interp(n * np.array([0.25, 0.5, 0.75]), below, EDGES)
    scale = (upper - lower) / NORMAL_IQR
    if (upper - lower) * BINS_PER_UNIT < 1:
        warnings.warn(TOO_NARROW, stacklevel=2)
    central, z_sum, zz_sum = _central_sums(per_bin, median, scale)
    share, z_mean, zz_mean = central / n, z_sum / central, zz_sum / central

    def density(d: float, s: float) -> float:
        """-(mean log density of the central scores under the untruncated normal) + constant."""
        return (zz_mean - 2 * d * z_mean + d * d) / (2 * s * s) + math.log(s)

    def truncated(d: float, s: float, mass: float) -> float:
        return density(d, s) + math.log(mass)

    def all_null(d: float, s: float, mass: float) -> float:
        return share * density(d, s) - (1 - share) * math.log1p(-mass)

    mean, sd, mass = _minimum(truncated)
    if share > mass:
        mean, sd, mass = _minimum(all_null)
    pi0 = min(1.0, float(share / mass))
    return EfronNull(float(median), float(scale), mean, sd, pi0)


def _minimum(loss: Callable[[float, float, float], float]) -> tuple[float, float, float]:
    """(d, s, mass) that minimise loss(d, s, mass), mass the normal's between -1 and 1.

    By Nelder-Mead from the standard normal; s stays below e^3, where the middle of a normal is
    flat to 1 in 400, and above e^-6.
    """
    from scipy.optimize import minimize

    def central_mass(d: float, s: float) -> float:
        return _phi((UB - d) / s) - _phi((LB - d) / s)

    def objective(parameters: Sequence[float]) -> float:
        d, log_s = parameters
        s = math.exp(log_s)
        mass = central_mass(d, s)
        return loss(d, s, mass) if 0 < mass < 1 else math.inf

    options = {"xatol": 1e-7, "fatol": 1e-13, "maxiter": 1000, "maxfev": 2000}
    bounds = [(-3.0, 3.0), (-6.0, 3.0)]
    d, log_s = minimize(
        objective, [0.0, 0.0], method="Nelder-Mead", bounds=bounds, options=options
    ).x
    return float(d), math.exp(log_s), central_mass(d, math.exp(log_s))


def efron_table(fit: EfronNull) -> NDArray[np.float64]:
    """The "table" form of an EfronNull: the normal over the whole range.

    x_max is the range's upper end; beyond it p falls on as at that point, though a score of 32
    has never been seen.
    """
    sf = fit.sf(EDGES)
    hazard = fit.pdf(fit.z(float(HIGH))) / fit.scale / sf[-1]
    beta = 1 / hazard if np.isfinite(hazard) and hazard > 0 else 1 / BINS_PER_UNIT
    return np.concatenate([[HIGH, sf[-1], max(beta, 1 / BINS_PER_UNIT)], sf])


def local_fdr_table(per_bin: NDArray[np.uint64], fit: EfronNull) -> NDArray[np.float64]:
    """Local fdr pi0 f0 / f at the 8193 edges, float64: of each score, how likely it is null.

    f by Lindsey's method as statsmodels' `local_fdr(z, null_proportion=pi0, null_pdf=fit.pdf,
    deg=7, nbins=30)`: a Poisson regression of the counts in 29 equal bins on a polynomial. Then
    1 below the null's centre and nonincreasing above. Outside the range of the counted scores it
    keeps its last value inside: a polynomial says nothing there.

    Raises ValueError where nothing can be fitted.
    """
    from statsmodels.genmod.generalized_linear_model import GLM, families
    from statsmodels.regression.linear_model import OLS

    used = np.flatnonzero(per_bin)
    first, last = used[0], used[-1] + 1
    below = _below(per_bin)
    edges = np.linspace(EDGES[first], EDGES[last], LFDR_BINS)
    counts, z_edges = np.diff(np.interp(edges, EDGES, below)), fit.z(edges)
    design = np.vander((z_edges[:-1] + z_edges[1:]) / 2, LFDR_DEGREE + 1)
    spread = design.std(axis=0)
    spread[spread <= 1e-8] = 1.0  # the constant
    design /= spread
    start = OLS(np.log(1 + counts), design).fit().params
    try:
        with np.errstate(all="ignore"):
            model = GLM(counts, design, family=families.Poisson()).fit(start_params=start)
    except ValueError as error:
        raise ValueError(UNDETERMINED) from error
    z = fit.z(EDGES[first : last + 1])
    f = model.predict(np.vander(z, LFDR_DEGREE + 1) / spread)
    f /= below[-1] * (z_edges[1] - z_edges[0])
    with np.errstate(all="ignore"):
        lfdr = np.clip(fit.pi0 * fit.pdf(z) / f, TINY, 1.0)
    if not np.isfinite(lfdr).all():
        raise ValueError(UNDETERMINED)
    table = np.concatenate([np.ones(first), lfdr, np.full(EDGES.size - 1 - last, lfdr[-1])])
    table[EDGES < fit.centre] = 1.0
    return np.minimum.accumulate(table)
