"""What holds of a router for any logits: order of experts, limits, sums of weights, growth."""

from dataclasses import replace

import numpy as np
import pytest
import util
from hypothesis import given, settings
from hypothesis import strategies as st
from routing import CASES, NAMES, case_id, layer_null, make, nulls_of, route, scores

from moeprof.routers import REGISTRY

pytestmark = pytest.mark.once

every_case = pytest.mark.parametrize("case", CASES, ids=case_id)
every_router = pytest.mark.parametrize("name", NAMES)
quick = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**32 - 1)
MOST = {"c": 3.0, "k": 8}  # of a main parameter that is no share
WIDTHS = st.sampled_from((1, 2, 8, 64))


def drawn(test):
    """A test of a seed and of a number of experts."""
    return given(seed=seeds, experts=WIDTHS)(quick(test))


def draw(seed, experts, tokens=40):
    """Logits (T,E) without ties, some of them sharp, and the generator."""
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((tokens, experts)) * rng.choice([0.3, 2, 6], (tokens, 1))
    return rng, z.astype(np.float32)


def null_kind(seed, name, own):
    kinds = nulls_of(name, own)
    return kinds[seed % len(kinds)]


@every_case
@drawn
def test_permuting_the_experts_permutes_the_selection(case, seed, experts):
    """With them their nulls and their weights; outside ties of the evidence."""
    name, own = case
    rng, z = draw(seed, experts)
    null = layer_null(null_kind(seed, name, own), experts)
    router, permutation = make(name, experts, **own), rng.permutation(experts)
    ours, permuted = router, null
    if getattr(router, "u", None) is not None:
        ours = replace(router, u=tuple(router.u[e] for e in permutation))
    if null is not None and np.ndim(null.table) == 2:
        permuted = replace(null, table=np.ascontiguousarray(null.table[permutation]))
    before = route(router, z, null=null)
    after = route(ours, z[:, permutation], null=permuted)
    # a sum over permuted experts differs in its last bits, and so may what lies on a boundary
    same = (before.rejections == after.rejections) & ~ties(router, z, null)
    assert same.mean() > 0.9
    np.testing.assert_array_equal(
        before.experts[same],
        np.where(after.experts < 0, -1, permutation[after.experts])[same],
    )
    np.testing.assert_allclose(before.weights[same], after.weights[same], atol=1e-6)


def ties(router, z, null):
    """The tokens with two experts of equal evidence and equal logits, or nearly."""
    if null is None or null.form == "conformal":
        near = np.sort(z, axis=1)
        return (np.diff(near, axis=1) == 0).any(axis=1)
    s = np.sort(scores(z, null.score), axis=1)
    return (np.diff(s, axis=1) < 1e-12).any(axis=1)


@every_router
@drawn
def test_R_never_falls_or_never_rises_with_the_main_parameter(name, seed, experts):
    rng, z = draw(seed, experts)
    cls = REGISTRY[name]
    low, high = max(cls.main_range[0], -3.0), min(cls.main_range[1], MOST.get(cls.main, 1.0))
    values = np.sort(rng.uniform(low, high, 6)).tolist()
    if name == "topk":
        values = list(range(1, min(8, experts) + 1))
    null = layer_null(null_kind(seed, name, {}), experts)
    counts = np.array(
        [
            route(make(name, experts, **{cls.main: value}, max_k=experts), z, null=null).rejections
            for value in values
        ]
    )
    steps = np.diff(counts, axis=0)
    assert (steps >= 0).all() if cls.increasing else (steps <= 0).all()


@every_case
@drawn
def test_limits_and_sums_of_weights(case, seed, experts):
    """min_k <= counts <= max_k; the weights sum to M_S, 1 and M_topk."""
    name, own = case
    rng, z = draw(seed, experts)
    z[:3] = util.nasty_rows(experts)[rng.integers(0, 12, 3)]
    min_k, max_k = np.sort(rng.integers(1, experts + 1, 2)).tolist()
    if name == "weighted_bh" and min_k == experts > 2:
        min_k -= 1  # one expert has weight 0
    router = make(name, experts, **own, min_k=min_k, max_k=max_k)
    null = layer_null(null_kind(seed, name, own), experts)
    k = int(rng.integers(1, experts + 1))
    p = util.softmax(z)
    top = np.sort(p, axis=1)[:, -k:].sum(axis=1)
    for norm in ("none", "sum", "mass"):
        got = route(router, z, null=null, norm=norm, norm_k=k)
        assert (got.counts >= min_k).all() and (got.counts <= max_k).all()
        assert ((got.experts >= 0).sum(axis=1) == got.counts).all()
        chosen = np.take_along_axis(p, np.maximum(got.experts, 0), axis=1)
        M_S = np.where(got.experts >= 0, chosen, 0).sum(axis=1)
        expected = {"none": M_S, "sum": np.ones(len(z)), "mass": top}[norm]
        np.testing.assert_allclose(got.weights.sum(axis=1), expected, atol=2e-6)


@every_case
def test_one_expert_is_always_chosen(case):
    name, own = case
    z = np.float32([[0.0], [-5.0], [30.0], [np.inf]])
    for kind in nulls_of(name, own):
        got = route(make(name, 1, **own), z, null=layer_null(kind, 1))
        np.testing.assert_array_equal(got.experts, np.zeros((4, 1)))
        np.testing.assert_array_equal(got.weights, np.ones((4, 1)))


@pytest.mark.parametrize("experts", (1, 2, 8, 60, 64, 128, 256))
def test_equal_logits_have_the_R_of_the_formula(experts):
    z = np.full((2, experts), -1.25, np.float32)
    for value in (0.1, 0.25, 0.5, 0.75):
        R = {
            name: int(route(make(name, experts, **own, max_k=experts), z).rejections[0])
            for name, own in [
                ("top_p", {"P": value}),
                ("min_p", {"t": value}),
                ("entropy", {"c": value}),
                ("kneedle", {"c": value}),
                ("gap_ratio", {"c": -value}),
            ]
        }
        share = int(np.ceil(value * experts))
        assert R["top_p"] == share and R["entropy"] == share and R["min_p"] == experts
        assert R["kneedle"] == 0 and R["gap_ratio"] == (1 if experts > 1 else 0)
