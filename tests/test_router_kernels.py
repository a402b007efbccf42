"""Every router's C kernel against its reference(), and what all routers share.

Which routers there are is asked of the registry: a new one needs no edit here.
"""

import numpy as np
import pytest
import util
from routing import (
    CASES,
    NAMES,
    WIDTHS,
    any_null,
    case_id,
    evidence,
    hold,
    layer_null,
    logits_of,
    make,
    route,
    some_nulls,
)
from util import narrow, widen

pytestmark = pytest.mark.once

every_router = pytest.mark.parametrize("name", NAMES)


def even(name):
    """Keywords under which all experts weigh the same."""
    return {"u": None} if name == "weighted_bh" else {}


@pytest.mark.parametrize("case", CASES, ids=case_id)
@pytest.mark.parametrize("experts", WIDTHS)
def test_c_is_the_reference(case, experts):
    name, own = case
    limits = {"max_k": experts}, {"min_k": min(2, experts)}
    for i, kind in enumerate(some_nulls(case, WIDTHS, experts), WIDTHS.index(experts)):
        null = layer_null(kind, experts)
        for dtype, tokens in (("float32", 200), ("bfloat16", 60), ("float16", 60)):
            z = logits_of(tokens, experts)
            if dtype == "float16":
                z = np.clip(z, -6e4, 6e4)
            hold(make(name, experts, **own), z, dtype, null)
        router = make(name, experts, **own, **limits[i % 2])
        hold(router, logits_of(100, experts), "float32", null)


@pytest.mark.parametrize("tokens", (0, 1, 7, 1024))
@every_router
def test_any_number_of_tokens(name, tokens):
    router, null = make(name, 64), any_null(name, 64)
    z = logits_of(tokens, 64)
    hold(router, z, "float32", null)
    one = route(router, z, null=null)
    for threads in (2, 4):
        for a, b in zip(one, route(router, z, null=null, threads=threads), strict=True):
            np.testing.assert_array_equal(a, b)
    counts, rejections = router.count_tokens(z, null)
    np.testing.assert_array_equal(counts, one.counts)
    np.testing.assert_array_equal(rejections, one.rejections)


@every_router
def test_several_inf_share_and_ties_go_to_the_lower_id(name):
    z = np.full((3, 16), -1.0, np.float32)
    z[0, [11, 3, 7]] = np.inf
    z[1, [9, 2, 5, 14]] = 4
    z[2] = -np.inf
    z[2, 13] = 0
    got = route(make(name, 16, **even(name), min_k=3, max_k=3), z, null=any_null(name, 16))
    np.testing.assert_array_equal(got.experts[:2], [[3, 7, 11], [2, 5, 9]])
    np.testing.assert_array_equal(got.weights[0], np.float32([1 / 3] * 3))
    np.testing.assert_array_equal(got.experts[2], [13, 0, 1])
    np.testing.assert_array_equal(got.weights[2], [1, 0, 0])


@pytest.mark.parametrize("value", (0.0, -7.5, 1e30, np.inf))
@every_router
def test_equal_logits_choose_the_first_experts(name, value):
    router = make(name, 8, **even(name), min_k=4, max_k=4)
    got = route(router, np.full((2, 8), value, np.float32), null=any_null(name, 8))
    np.testing.assert_array_equal(got.experts, [[0, 1, 2, 3]] * 2)
    np.testing.assert_array_equal(got.weights, np.full((2, 4), 0.25))


@pytest.mark.parametrize("limits", ((1, 1), (1, 64), (3, 5), (7, 7), (63, 63)))
@pytest.mark.parametrize("name", [n for n in NAMES if n != "gap_ratio"])  # it looks within them
def test_clamping_leaves_the_rejections_alone(name, limits):
    z, (min_k, max_k) = logits_of(200, 64), limits
    null = any_null(name, 64)
    free = route(make(name, 64, max_k=64), z, null=null)
    got = route(make(name, 64, min_k=min_k, max_k=max_k), z, null=null)
    np.testing.assert_array_equal(got.rejections, free.rejections)
    np.testing.assert_array_equal(got.counts, np.clip(free.rejections, min_k, max_k))
    assert got.experts.shape == (200, max_k)
    best = evidence(make(name, 64), z, null)[:, :max_k]
    chosen = np.arange(max_k) < got.counts[:, None]
    np.testing.assert_array_equal(got.experts, np.where(chosen, best, -1))
    assert (got.weights[~chosen] == 0).all()


@pytest.mark.parametrize("temperature", (0.125, 1.0, 8.0, 1e39, 1e-50))
@every_router
def test_temperature_acts_on_the_weights_only(name, temperature):
    z, null = logits_of(200, 64), any_null(name, 64)
    plain = route(make(name, 64), z, null=null)
    got = route(make(name, 64, temperature=temperature), z, null=null)
    for part in ("experts", "counts", "rejections", "p"):
        np.testing.assert_array_equal(getattr(got, part), getattr(plain, part))
    with np.errstate(invalid="ignore"):
        ref = make(name, 64, temperature=temperature).reference(z, null=null)[0]
    ref = np.take_along_axis(ref, np.maximum(got.experts, 0), axis=1)
    util.assert_close(got.weights, np.where(got.experts >= 0, ref, 0), 1e-6)


@pytest.mark.parametrize("dtype", util.DTYPES)
@pytest.mark.parametrize("norm", ("none", "sum", "mass"))
@every_router
def test_norms(name, norm, dtype):
    """none: p_e. sum: p_e / M_S. mass: p_e M_topk / M_S. Rounded to the dtype of the model."""
    z, k = np.random.default_rng(0).standard_normal((50, 32)), 6
    z = widen(narrow(2 * z, dtype), dtype)
    router = make(name, 32, min_k=2, temperature=0.5)
    null = any_null(name, 32)
    got = route(router, z, dtype, null=null, norm=norm, norm_k=k)
    p = util.softmax(z / 0.5)
    chosen = np.where(got.experts >= 0, np.take_along_axis(p, np.maximum(got.experts, 0), 1), 0)
    within = chosen.sum(axis=1, keepdims=True)
    top = np.sort(p, axis=1)[:, -k:].sum(axis=1, keepdims=True)
    ref = chosen * {"none": 1.0, "sum": 1 / within, "mass": top / within}[norm]
    util.assert_close(got.weights, ref, 1e-6 + util.HALF_ULP[dtype] * ref, norm)
    exact = route(router, z, "float32", null=null, norm=norm, norm_k=k)
    np.testing.assert_array_equal(got.weights, widen(narrow(exact.weights, dtype), dtype))


# ---- unusable rows ----

BAD_ROWS = {"NaN": [0, np.nan, 1, 2], "-inf": [-np.inf] * 4, "NaN and inf": [np.nan, np.inf, 1, 2]}


@pytest.mark.parametrize("bad", BAD_ROWS.values(), ids=BAD_ROWS)
@every_router
def test_the_first_unusable_row_is_named_by_c_and_reference(name, bad):
    z = np.zeros((1000, 4), np.float32)
    z[[700, 37, 999]] = bad
    for dtype in util.DTYPES:
        with pytest.raises(ValueError, match="router_logits: row 37 has a NaN or no entry above"):
            route(make(name, 4), z, dtype, null=any_null(name, 4), threads=4)
    with pytest.raises(ValueError, match="router_logits: row 37 "):
        make(name, 4).reference(z, null=any_null(name, 4))
