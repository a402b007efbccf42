"""What may be claimed of the routers as statistics, and nothing else (docs/statistics.md).

p-values are known, independent and continuous unless a test says otherwise: they come from a
null under which the logit 32 - 64 p has the p-value p, so that the C routers see them.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import util
from nulls import random_logits
from routing import ToyNull, conformal_table, layer_null, make, p_reference, route
from scipy.stats import false_discovery_control, norm
from util import narrow, widen

import moeprof
from moeprof import _C, BH, BY, EBH, FixedP, HigherCriticism, StoreyBH, TopK, WeightedBH
from moeprof.null import LayerNull
from moeprof.routers import Tokens

pytestmark = pytest.mark.once

# ---- Benjamini-Hochberg against its oracles ----


def oracle(p, alpha):
    return false_discovery_control(p, axis=-1) <= alpha


def away(p, alpha):
    """The rows that have no p_(r) within 1e-9 of its threshold: there libraries disagree."""
    experts = p.shape[1]
    ratio = np.sort(p, axis=1) * experts / (alpha * np.arange(1, experts + 1))
    return (np.abs(ratio - 1) > 1e-9).all(axis=1)


def adversarial(experts, alpha, rng):
    """Rows of p-values with ties, zeros, ones, and steps just off the line alpha r/E."""
    line = alpha * np.arange(1, experts + 1) / experts
    rows = [np.zeros(experts), np.ones(experts), np.full(experts, alpha / 2)]
    rows += [rng.integers(0, 4, experts) / 3, rng.choice(line * 0.999, experts)]
    rows += [line * (1 + off) for off in (-1e-6, 1e-6)]
    rows += [np.where(np.arange(experts) < r, line[r - 1] * 0.9999, 1) for r in (1, experts)]
    return rng.permuted(np.array(rows), axis=1)


@pytest.mark.parametrize("alpha", (1e-6, 0.01, 0.05, 0.2, 0.5, 0.999))
@pytest.mark.parametrize("experts", (1, 2, 7, 64, 256))
def test_bh_marks_what_scipy_marks(experts, alpha):
    rng = np.random.default_rng(experts)
    random = rng.random((400, experts)) ** rng.choice([1, 3, 10], (400, 1))
    p = np.concatenate([random, adversarial(experts, alpha, rng)])
    p = p[away(p, alpha)]
    assert len(p) > 380
    mask = moeprof.benjamini_hochberg(p, alpha)
    assert mask.dtype == bool and mask.shape == p.shape
    np.testing.assert_array_equal(mask, oracle(p, alpha))
    np.testing.assert_array_equal(moeprof.benjamini_hochberg(p[3], alpha), mask[3])
    np.testing.assert_array_equal(moeprof.benjamini_hochberg(p[:, ::-1], alpha), mask[:, ::-1])


@pytest.mark.parametrize("alpha", (0.05, 0.1, 0.25, 0.3, 0.5))
@pytest.mark.parametrize("experts", (1, 3, 10, 60, 64))
def test_bh_at_its_boundaries_is_exact(experts, alpha):
    """p = alpha r/E, rounded up, down and to nearest, against fractions."""
    line = [float(util.Fraction(alpha) * r / experts) for r in range(1, experts + 1)]
    for r, at in enumerate(line, 1):
        for p_r in (np.nextafter(at, 0), at, np.nextafter(at, 1)):
            p = np.ones((1, experts))
            p[0, :r] = p_r
            exact = util.Fraction(p_r) * experts <= util.Fraction(alpha) * r
            mask = moeprof.benjamini_hochberg(p, alpha)
            assert mask.sum() == (r if exact else 0), (experts, alpha, r, p_r)
            assert _C.step_up(p, alpha) == util.step_up_exact(p[0], alpha)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.float16, torch.bfloat16))
def test_bh_of_a_tensor(dtype):
    p = (torch.rand(50, 16, generator=torch.Generator().manual_seed(0)) ** 4).to(dtype)
    mask = moeprof.benjamini_hochberg(p, 0.2)
    assert mask.dtype == torch.bool and mask.any() and not mask.all()
    np.testing.assert_array_equal(mask.numpy(), moeprof.benjamini_hochberg(p.double().numpy(), 0.2))


@pytest.mark.parametrize("shape", ((0, 8), (3, 0), (0,)))
def test_bh_of_nothing(shape):
    assert moeprof.benjamini_hochberg(np.zeros(shape), 0.05).shape == shape


@pytest.mark.parametrize(
    ("p", "error", "message"),
    [
        (np.array([[0.5, -1e-9]]), ValueError, r"p: expected p-values in \[0, 1\]"),
        (np.array([[0.5, 1 + 1e-9]]), ValueError, r"p: expected p-values in \[0, 1\]"),
        (np.array([0.5, np.nan]), ValueError, r"p: expected p-values in \[0, 1\]"),
        (np.zeros((1, 2, 3)), ValueError, r"p: expected \(T, E\) or \(E,\), got shape"),
        (np.float64(0.5), TypeError, "p: expected a torch.Tensor or numpy.ndarray, got float64"),
        ([0.5, 0.1], TypeError, "p: expected a torch.Tensor or numpy.ndarray, got list"),
    ],
)
def test_bad_p(p, error, message):
    with pytest.raises(error, match=message):
        moeprof.benjamini_hochberg(p, 0.05)


# ---- false discoveries ----

TOKENS, E, FALSE = 40_000, 64, 8


def uniform_null():
    """A null under which the logit 32 - 64 p has the p-value p."""
    sf = np.arange(8192, -1, -1) / 8192
    return LayerNull("logit", np.concatenate([[32.0, 1e-9, 1.0], sf]))


def mask_of(p, alpha, way):
    """The experts that BH rejects, before any clamping."""
    if way == "benjamini_hochberg":
        return moeprof.benjamini_hochberg(p, alpha)
    return rejected(BH(alpha), p)


def routed(router, p):
    """What a router in C makes of known p (T,E), before any clamping."""
    z = (32 - 64 * p).astype(np.float32)
    got = route(replace(router, max_k=p.shape[1]), z, null=uniform_null())
    np.testing.assert_allclose(got.p, p, atol=1e-7)
    return got


def rejects(router, p):
    """The tokens of which it rejects any expert."""
    return routed(router, p).rejections > 0


def rejected(router, p):
    """The experts that it rejects."""
    got = routed(router, p)
    evidence = p if router.name != "weighted_bh" else router.evidence(p, None)
    rank = np.empty(p.shape, int)
    order = np.argsort(evidence, axis=1, kind="stable")
    np.put_along_axis(rank, order, np.broadcast_to(np.arange(p.shape[1]), p.shape), axis=1)
    return rank < got.rejections[:, None]


def fdp_of(mask):
    """The share of nulls (all experts but the first FALSE) among the rejected."""
    return mask[:, FALSE:].sum(axis=1) / np.maximum(mask.sum(axis=1), 1)


@pytest.mark.parametrize("way", ("benjamini_hochberg", "the router"))
@pytest.mark.parametrize("alpha", (0.05, 0.2, 0.5))
def test_false_discovery_rate(alpha, way):
    p = np.random.default_rng(1).random((TOKENS, E))
    p[:, :FALSE] *= 0.002
    mask = mask_of(p, alpha, way)
    fdp = fdp_of(mask)
    assert abs(fdp.mean() - (E - FALSE) / E * alpha) <= 4 * fdp.std() / np.sqrt(TOKENS)


@pytest.mark.parametrize("way", ("benjamini_hochberg", "the router"))
@pytest.mark.parametrize("alpha", (0.05, 0.2, 0.5))
def test_rejections_under_the_global_null(alpha, way):
    p = np.random.default_rng(2).random((TOKENS, E))
    at_all = rejects(BH(alpha), p) if way == "the router" else mask_of(p, alpha, way).any(axis=1)
    some = at_all.mean()
    assert abs(some - alpha) <= 4 * np.sqrt(alpha * (1 - alpha) / TOKENS)


def test_the_router_is_exact_at_the_boundary():
    """Every p is 1/2 = alpha, or 1/2 + 2e-14."""
    z = np.zeros((2, E), np.float32)
    z[1] = -1e-12
    got = route(BH(0.5, max_k=E), z, null=uniform_null())
    assert got.p[0, 0] == 0.5 < got.p[1, 0] < 0.5 + 1e-13
    assert got.rejections.tolist() == [E, 0]


@pytest.mark.parametrize(("experts", "size", "digits"), [(64, 0.109, 3), (8, 0.19, 2)])
def test_size_of_the_normal_null_under_noise(experts, size, digits):
    z = np.random.default_rng(3).standard_normal((TOKENS, experts)).astype(np.float32)
    some = (route(BH(0.05, max_k=experts), z).rejections > 0).mean()
    assert abs(some - size) <= 4 * np.sqrt(size * (1 - size) / TOKENS) + 0.5 * 10.0**-digits


@pytest.mark.parametrize("kind", ("normal", "logprob", "logit"))
def test_bh_made_to_select_8_selects_the_top_8(kind):
    z, null = random_logits(2000, E), layer_null(kind, E)
    bh = route(BH(1 - 1e-9, min_k=8, max_k=8), z, null=null)
    top = route(TopK(8), z)
    np.testing.assert_array_equal(bh.experts, top.experts)
    np.testing.assert_array_equal(bh.weights, top.weights)
    z = widen(narrow(z, "bfloat16"), "bfloat16")  # and where there are ties, the same rule
    bh = route(BH(1 - 1e-9, min_k=8, max_k=8), z, "bfloat16", null=null)
    np.testing.assert_array_equal(bh.experts, route(TopK(8), z, "bfloat16").experts)


def some_p(seed=4, tokens=TOKENS, sharp=0.002):
    p = np.random.default_rng(seed).random((tokens, E))
    p[:, :FALSE] *= sharp
    return p


@pytest.mark.parametrize("alpha", (0.05, 0.2, 0.5))
def test_storey_keeps_the_level_and_beats_bh(alpha):
    p, noise = some_p(), np.random.default_rng(5).random((TOKENS, E))
    mask = rejected(StoreyBH(alpha), p)
    fdp = fdp_of(mask)
    assert fdp.mean() <= alpha + 4 * fdp.std() / np.sqrt(TOKENS)
    assert mask.sum() > rejected(BH(alpha), p).sum()
    some = rejects(StoreyBH(alpha), noise).mean()
    assert some <= alpha + 4 * np.sqrt(alpha * (1 - alpha) / TOKENS)


@pytest.mark.parametrize("v", (0.5, 1.0, 1.5))
def test_weighted_bh_spends_alpha_as_its_weights_say(v):
    alpha = 0.2
    u = np.random.default_rng(6).exponential(1, E) + 0.1
    u[-3] = 0
    u /= u.mean()
    mask = rejected(WeightedBH(alpha, u, v), some_p())
    fdp, expected = fdp_of(mask), alpha * v * u[FALSE:].sum() / E
    assert abs(fdp.mean() - expected) <= 4 * fdp.std() / np.sqrt(TOKENS)
    assert not mask[:, -3].any()


def least_favourable(a, tokens, seed):
    """p of one true hypothesis in E under the dependence at which BH at a is worst.

    J = j with probability a/j: then j of them have p uniform in ((j-1)a/E, ja/E], the others
    in (a, 1]; else all in (a, 1].
    """
    rng, ranks = np.random.default_rng(seed), np.arange(1, E + 1)
    assert a * (1 / ranks).sum() <= 1
    J = np.searchsorted(np.cumsum(a / ranks), rng.random(tokens), side="right") + 1
    J = np.where(J > E, 0, J)[:, None]
    low, share = (J - 1) * a / E, 1 - rng.random((tokens, E))
    inside = rng.random((tokens, E)).argsort(axis=1) < J
    return np.where(inside, low + share * a / E, a + share * (1 - a))


def test_least_favourable_dependence():
    """P(R >= 1) = a c(E) for BH at a, and = alpha for BY at alpha = a c(E): equalities."""
    a, tokens = 0.1, 100_000
    p, c = least_favourable(a, tokens, 7), (1 / np.arange(1, E + 1)).sum()
    alpha = a * c
    tol = 4 * np.sqrt(alpha * (1 - alpha) / tokens)
    assert abs((_C.step_up(p, a) > 0).mean() - alpha) <= tol
    assert abs((_C.step_up(p, alpha / c) > 0).mean() - alpha) <= tol
    # through the routers float32 logits move p by 1e-7 of a bin of 1.6e-3
    for router in (BH(a), BY(alpha)):
        assert abs(rejects(router, p).mean() - alpha) <= tol + 1e-3
    for level in (0.05, 0.2, 0.5):
        some = rejects(EBH(level, "calibrator"), p).mean()
        assert some <= level + 4 * np.sqrt(level * (1 - level) / tokens)


def test_identities():
    p = np.concatenate([some_p(8, 4000), np.random.default_rng(9).random((4000, E)) ** 2])
    c = np.cumsum(1 / np.arange(1, E + 1))[-1]
    for alpha in (0.01, 0.3, 0.9):
        np.testing.assert_array_equal(rejected(BY(alpha), p), rejected(BH(alpha / c), p))
    for x in (0.4, 0.7, 1.25):
        np.testing.assert_array_equal(rejected(StoreyBH(0.3, pi0=x), p), rejected(BH(0.3 / x), p))
    np.testing.assert_array_equal(rejected(WeightedBH(0.3), p), rejected(BH(0.3), p))


def test_storey_by_the_definition():
    """max{r : p_(r) <= min(lam, alpha r / (E pi0))}, row by row."""
    alpha, lam, p = 0.4, 0.3, some_p(10, 2000)
    got = rejected(StoreyBH(alpha, lam=lam), p).sum(axis=1)
    for row, R in zip(np.sort(p, axis=1), got, strict=True):
        pi0 = (1 + (row > lam).sum()) / ((1 - lam) * E)
        holds = [row[r - 1] <= min(lam, alpha * r / (E * pi0)) for r in range(1, E + 1)]
        assert R == max((r for r, held in enumerate(holds, 1) if held), default=0)


@pytest.mark.parametrize("e", ("lr", "calibrator"))
def test_e_values_have_mean_at_most_1_under_the_null(e):
    """The scores are normal, and so is what stands out: lfdr is known."""
    rng, edges, pi0, shift = np.random.default_rng(11), -32 + np.arange(8193) / 128, 0.9, 2.0
    f0, f1 = norm.pdf(edges), norm.pdf(edges, shift)
    with np.errstate(invalid="ignore", divide="ignore"):
        lfdr = np.nan_to_num(pi0 * f0 / (pi0 * f0 + (1 - pi0) * f1), nan=1.0)
    lfdr = np.where(edges < 0, 1.0, np.maximum(np.minimum.accumulate(lfdr), 1e-300))
    table = np.concatenate([[32.0, norm.sf(32.0), 0.03], norm.sf(edges)])
    null, z = ToyNull("table", "logit", table, lfdr, pi0), rng.standard_normal((TOKENS, 8))
    z = z.astype(np.float32)
    tokens = EBH(0.5, e).look(z, null)[1]
    p_e = 0.5 / np.sqrt(tokens.p) if e == "calibrator" else 9 * (1 / tokens.lfdr - 1)
    # (the calibrator's mean is 1, its variance infinite: the standard error is large)
    assert p_e.mean() <= 1 + 4 * p_e.std() / np.sqrt(p_e.size)
    for level in (0.05, 0.3):
        some = (route(EBH(level, e, max_k=8), z, null=null).rejections > 0).mean()
        assert some <= level + 4 * np.sqrt(level * (1 - level) / TOKENS)


def test_fixed_p_rejects_at_its_level_and_does_not_correct():
    p = np.random.default_rng(12).random((TOKENS, E))
    rate = routed(FixedP(0.05), p).rejections.sum() / p.size
    assert abs(rate - 0.05) <= 4 * np.sqrt(0.05 * 0.95 / p.size)


# ---- Higher Criticism ----

HC = json.loads((Path(__file__).parent / "data" / "hc_score.json").read_text())


def scores_of_hc(p, router):
    """h_r of one row, as the formula stands; p ascending."""
    E, h = len(p), {}
    for r, at in enumerate(p, 1):
        clipped = min(max(at, 2.0**-53), 1 - 2.0**-53)
        v = r / E * (1 - r / E) if router.denominator == "rank" else clipped * (1 - clipped)
        last = E if router.beta == "auto" else int(router.beta * E)
        if r <= last and v > 0 and not (router.beta == "auto" and at < 1 / E):
            h[r] = np.sqrt(E) * (r / E - clipped) / np.sqrt(v)
    return h


def brute_force(p, router):
    h = scores_of_hc(p, router)
    if not any(value > 0 for value in h.values()):
        return 0
    best = max(value + router.c * r for r, value in h.items())
    return min(r for r, value in h.items() if value + router.c * r == best)


@pytest.mark.parametrize("denominator", ("rank", "p"))
@pytest.mark.parametrize("beta", (1.0, 0.5, 0.1, "auto"))
@pytest.mark.parametrize("c", (0.0, 0.05, -0.3))
def test_higher_criticism_by_brute_force(beta, denominator, c):
    router = HigherCriticism(beta, denominator, c)
    for experts in (1, 2, 8, 64):
        rng = np.random.default_rng(experts)
        p = np.sort(rng.random((100, experts)) ** rng.choice([1, 3, 9], (100, 1)), axis=1)
        p[0], p[1], p[2] = 0, 1, 0.5
        R = router.count(Tokens(z=p, p=p))
        np.testing.assert_array_equal(R, [brute_force(row, router) for row in p])
        z = (32 - 64 * p).astype(np.float32)
        got = route(replace(router, max_k=experts), z, null=uniform_null())
        seen = np.sort(got.p, axis=1)
        np.testing.assert_array_equal(got.rejections, [brute_force(row, router) for row in seen])


@pytest.mark.parametrize("case", HC["cases"], ids=lambda case: f"E={len(case['p'])}")
def test_higher_criticism_scores_are_those_of_fdrtool(case):
    """hc.score is |h_r|, with the variance of its own at r = E, where ours has no h."""
    p, score = np.array(case["p"]), np.array(case["score"])
    h = np.array(list(scores_of_hc(p, HigherCriticism()).values()))
    np.testing.assert_allclose(np.abs(h), score[:-1], rtol=1e-12)
    R = HigherCriticism().count(Tokens(z=p[None], p=p[None]))[0]
    above = np.where(p[:-1] < np.arange(1, len(p)) / len(p), score[:-1], 0)
    assert R == (above.argmax() + 1 if (above > 0).any() else 0)


# ---- the definitions again, by another hand, row by row: neither C nor count() ----


def by_definition(name, row, own, limits):
    """R of float64 logits, from the table in docs/statistics.md."""
    E, z = len(row), np.sort(row)[::-1]
    p = np.exp(z - z[0]) / np.exp(z - z[0]).sum()
    if name == "top_p":
        return min(r for r in range(1, E + 1) if p[:r].sum() >= own["P"] or r == E)
    if name == "min_p":
        return sum(p_i > own["t"] * p[0] for p_i in p)
    if name == "entropy":
        return min(E, int(np.ceil(own["c"] * np.exp(-(p * np.log(p)).sum()))))
    if name == "kneedle":
        y = p if own["on"] == "prob" else np.log(p)
        h = {r: (y[0] - y[r - 1]) / (y[0] - y[-1]) - (r - 1) / (E - 1) for r in range(1, E + 1)}
    else:
        h = {r: np.log(p[r - 1] / p[r]) for r in range(limits[0], min(limits[1], E - 1) + 1)}
    return max(h, key=lambda r: h[r] + own["c"] * r)


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("top_p", {"P": 0.3}),
        ("top_p", {"P": 0.9}),
        ("min_p", {"t": 0.05}),
        ("min_p", {"t": 0.6}),
        ("entropy", {"c": 0.2}),
        ("entropy", {"c": 1.0}),
        ("kneedle", {"on": "prob", "c": 0.0}),
        ("kneedle", {"on": "log", "c": 0.01}),
        ("gap_ratio", {"c": 0.0}),
        ("gap_ratio", {"c": 0.1}),
    ],
)
def test_routers_on_logits_by_their_definitions(name, own):
    for experts, limits in ((8, (1, 8)), (8, (3, 5)), (64, (2, 16)), (64, (1, 64))):
        z = random_logits(200, experts)
        router = make(name, experts, **own, min_k=limits[0], max_k=limits[1])
        expected = [by_definition(name, row.astype(float), own, limits) for row in z]
        np.testing.assert_array_equal(route(router, z).rejections, expected)


@pytest.mark.parametrize("name", ("local_fdr", "lr", "calibrator"))
def test_routers_on_lfdr_and_e_values_by_their_definitions(name):
    null, z = layer_null("logit", E), random_logits(300, E)
    null = replace(null, local_fdr=null.local_fdr**2)
    z[:, :4] += np.random.default_rng(0).exponential(8, (300, 4)).astype(np.float32)
    s = z.astype(float)
    lfdr = np.sort(np.interp(s, -32 + np.arange(8193) / 128, null.local_fdr), axis=1)
    for level in (0.2, 0.5, 0.9):
        if name == "local_fdr":
            router, expected = make(name, E, q=level, max_k=E), (lfdr <= level).sum(axis=1)
        else:
            p = np.sort(p_reference(z, null), axis=1)
            e = (
                0.5 * p**-0.5
                if name == "calibrator"
                else ((1 / lfdr - 1) * null.pi0 / (1 - null.pi0))
            )
            holds = e >= E / (level * np.arange(1, E + 1))
            router = EBH(level, name, max_k=E)
            expected = [
                max((r for r, held in enumerate(row, 1) if held), default=0) for row in holds
            ]
        got = route(router, z, null=null).rejections
        np.testing.assert_array_equal(got, expected)
        assert len(set(got.tolist())) > 2


# ---- conformal p-values ----


def share_at_most(u, n, ties, strict=False, replicates=20_000, at_once=200):
    """P(p <= u) where each p has a calibration of its own, by the kernel: an expert's each."""
    rng, hits, size = np.random.default_rng(n), 0, (at_once, n + 1)
    for _ in range(replicates // at_once):
        drawn = rng.integers(0, 8, size) / 4 if ties else rng.standard_normal(size)
        drawn = drawn.astype(np.float32)
        calibration, z = drawn[:, :-1].astype(float), drawn[:, -1].copy()
        if strict:  # what `>` in place of `>=` would make of it
            p = (1 + (calibration > z[:, None]).sum(1)) / (n + 1)
        else:
            p = _C.p_values(z[None], ("conformal", "logit", conformal_table(calibration)))[0]
        hits += (p <= u).sum()
    return hits / replicates


@pytest.mark.parametrize(("u", "n"), [(0.1, 37), (0.25, 99)])
def test_conformal_p_values_are_valid_over_redrawn_calibrations(u, n):
    exact = np.floor(u * (n + 1)) / (n + 1)
    tol = 4 * np.sqrt(exact * (1 - exact) / 20_000)
    assert abs(share_at_most(u, n, ties=False) - exact) <= tol
    assert share_at_most(u, n, ties=True) <= exact + tol
    assert share_at_most(u, n, ties=True, strict=True) > exact + tol  # `>` must fail


def test_conformal_p_counts_whole_bins_below_the_stored_scores():
    calibration = random_logits(400, 64).ravel().astype(float)
    null, z = ToyNull("conformal", "logit", conformal_table(calibration)), random_logits(50, 64, 1)
    got = _C.p_values(z, null.spec)
    np.testing.assert_array_equal(got, null.reference(z))
    exact = (1 + (calibration >= z[..., None]).sum(axis=-1)) / (calibration.size + 1)
    assert (got >= exact).all() and (
        got[z > np.sort(calibration)[-1024]] == exact[z > np.sort(calibration)[-1024]]
    ).all()


# ---- nulls that are one for each expert ----


@pytest.mark.parametrize("kind", ("each", "conformal each", "centred", "softmax"))
def test_p_values_of_every_form(kind):
    null, z = layer_null(kind, 64), util.nasty_rows(64)
    got = _C.p_values(z, null.spec)
    np.testing.assert_allclose(got, p_reference(z, null), rtol=1e-9, atol=1e-15)
    assert make("bh", 64).count_tokens(z, null)[0].shape == (len(z),)
