"""Routers: the C path against reference(), what the functions promise, BH against its oracles.

Which routers there are is asked of the registry: a new one needs no edit here.
"""

import warnings
from collections import namedtuple
from dataclasses import fields
from functools import lru_cache

import numpy as np
import pytest
import torch
import util
from nulls import null_of, random_logits
from scipy.stats import false_discovery_control
from util import narrow, widen

import moeprof
from moeprof import _C, BH, TopK
from moeprof.null import LayerNull, normal_reference
from moeprof.routers import REGISTRY, Router, make_router

NAMES = sorted(REGISTRY)
FUNCTIONS = [name for name in moeprof.__all__ if name.endswith("_routing")]
WIDTHS = (1, 2, 8, 60, 64, 128, 256)
Routed = namedtuple("Routed", "weights experts counts rejections p")
every_router = pytest.mark.parametrize("name", NAMES)
every_function = pytest.mark.parametrize("function", FUNCTIONS)


def make(name, experts, **shared):
    """A router with its own defaults, as far as they fit so many experts."""
    own = {f.name for f in fields(REGISTRY[name])}
    k = {"k": min(8, experts)} if "k" in own else {}
    return make_router(name, **k, **shared)


def nulls_of(name):
    return ("normal", "logprob", "logit") if REGISTRY[name].wants_null else ("normal",)


@lru_cache
def layer_null(kind, experts):
    """None (`normal`), or a null fitted on a score."""
    return None if kind == "normal" else null_of(random_logits(400, experts), score=kind).layer(0)


def logits_of(tokens, experts, seed=5):
    """Nasty rows first, then as `layer_null` has seen them, with a few that stand out."""
    rng = np.random.default_rng(seed)
    z = random_logits(tokens, experts, seed)
    z[:, rng.integers(0, experts, 3)] += rng.exponential(3, (tokens, 3)).astype(np.float32)
    nasty = util.nasty_rows(experts, seed)
    return np.concatenate([nasty, z])[:tokens]


def route(router, z, dtype="float32", *, null=None, norm="sum", norm_k=1, threads=1):
    """_C.route of float32 logits, rounded to the dtype."""
    spec = router.spec(z.shape[1], norm=norm, norm_k=norm_k, null=null)
    return Routed(*_C.route(narrow(z, dtype), dtype, spec, threads, True))


def p_reference(z, null):
    return normal_reference(z) if null is None else null.reference(z)


def evidence(router, z, null):
    """The experts of each token, best first, by the rule of statistics.md."""
    p = p_reference(z, null) if router.wants_null else np.zeros(z.shape)
    return np.lexsort((np.broadcast_to(np.arange(z.shape[1]), z.shape), -z, p), axis=1)


def off_boundaries(router, z, null):
    """The tokens whose R does not hang on the last bits of their p-values."""
    p = np.sort(p_reference(z, null), axis=1) if router.wants_null else np.zeros(z.shape)
    low, high = 1 - 1e-9, 1 + 1e-9
    return np.array([router.count(row * low) == router.count(row * high) for row in p], bool)


def hold(router, z, dtype, null):
    """The C path equals reference(): R and the selection exactly, the weights nearly."""
    z = widen(narrow(z, dtype), dtype)
    steady = off_boundaries(router, z, null)
    assert steady.sum() >= 0.95 * len(z)
    z = z[steady]
    got = route(router, z, dtype, null=null)
    with np.errstate(invalid="ignore"):
        ref, rejections = router.reference(z, null=null)
    np.testing.assert_array_equal(got.rejections, rejections)
    counts = np.clip(rejections, *router.limits(z.shape[1]))
    np.testing.assert_array_equal(got.counts, counts)
    chosen = np.arange(got.experts.shape[1]) < counts[:, None]
    expected = np.where(chosen, evidence(router, z, null)[:, : chosen.shape[1]], -1)
    np.testing.assert_array_equal(got.experts, expected)
    ref = np.where(chosen, np.take_along_axis(ref, np.maximum(expected, 0), axis=1), 0)
    tol = 1e-6 + (0 if dtype == "float32" else util.HALF_ULP[dtype] * ref)
    util.assert_close(got.weights, ref, tol, f"{router} {dtype}")
    np.testing.assert_allclose(got.p, p_reference(z, null), rtol=1e-9, atol=1e-300)


@pytest.mark.parametrize("experts", WIDTHS)
@pytest.mark.parametrize(("name", "kind"), [(n, kind) for n in NAMES for kind in nulls_of(n)])
def test_c_is_the_reference(name, kind, experts):
    null = layer_null(kind, experts)
    for dtype, tokens in (("float32", 300), ("bfloat16", 60), ("float16", 60)):
        for limits in ({}, {"max_k": experts}, {"min_k": min(2, experts)}):
            router = make(name, experts, **limits)
            z = np.clip(logits_of(tokens, experts), -6e4, 6e4) if dtype == "float16" else None
            hold(router, logits_of(tokens, experts) if z is None else z, dtype, null)


@pytest.mark.parametrize("tokens", (0, 1, 7, 1000))
@every_router
def test_any_number_of_tokens(name, tokens):
    router = make(name, 64)
    z = logits_of(tokens, 64)
    hold(router, z, "float32", None)
    one = route(router, z)
    for threads in (2, 4):
        for a, b in zip(one, route(router, z, threads=threads), strict=True):
            np.testing.assert_array_equal(a, b)


@every_router
def test_several_inf_share_and_ties_go_to_the_lower_id(name):
    z = np.full((3, 16), -1.0, np.float32)
    z[0, [11, 3, 7]] = np.inf
    z[1, [9, 2, 5, 14]] = 4
    z[2] = -np.inf
    z[2, 13] = 0
    got = route(make(name, 16, min_k=3, max_k=3), z)
    np.testing.assert_array_equal(got.experts[:2], [[3, 7, 11], [2, 5, 9]])
    np.testing.assert_array_equal(got.weights[0], np.float32([1 / 3] * 3))
    np.testing.assert_array_equal(got.experts[2], [13, 0, 1])
    np.testing.assert_array_equal(got.weights[2], [1, 0, 0])


@pytest.mark.parametrize("value", (0.0, -7.5, 1e30, np.inf))
@every_router
def test_equal_logits_choose_the_first_experts(name, value):
    got = route(make(name, 8, min_k=4, max_k=4), np.full((2, 8), value, np.float32))
    np.testing.assert_array_equal(got.experts, [[0, 1, 2, 3]] * 2)
    np.testing.assert_array_equal(got.weights, np.full((2, 4), 0.25))


@pytest.mark.parametrize("limits", ((1, 1), (1, 64), (3, 5), (7, 7), (64, 64)))
@every_router
def test_clamping_leaves_the_rejections_alone(name, limits):
    z, (min_k, max_k) = logits_of(200, 64), limits
    free = route(make(name, 64, max_k=64), z)
    got = route(make(name, 64, min_k=min_k, max_k=max_k), z)
    np.testing.assert_array_equal(got.rejections, free.rejections)
    np.testing.assert_array_equal(got.counts, np.clip(free.rejections, min_k, max_k))
    assert got.experts.shape == (200, max_k)
    best = evidence(make(name, 64), z, None)[:, :max_k]
    chosen = np.arange(max_k) < got.counts[:, None]
    np.testing.assert_array_equal(got.experts, np.where(chosen, best, -1))
    assert (got.weights[~chosen] == 0).all()


@pytest.mark.parametrize("temperature", (0.125, 1.0, 8.0, 1e39, 1e-50))
@every_router
def test_temperature_acts_on_the_weights_only(name, temperature):
    z = logits_of(200, 64)
    plain = route(make(name, 64), z)
    got = route(make(name, 64, temperature=temperature), z)
    for part in ("experts", "counts", "rejections", "p"):
        np.testing.assert_array_equal(getattr(got, part), getattr(plain, part))
    with np.errstate(invalid="ignore"):
        ref = make(name, 64, temperature=temperature).reference(z)[0]
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
    got = route(router, z, dtype, norm=norm, norm_k=k)
    p = util.softmax(z / 0.5)
    chosen = np.where(got.experts >= 0, np.take_along_axis(p, np.maximum(got.experts, 0), 1), 0)
    within = chosen.sum(axis=1, keepdims=True)
    top = np.sort(p, axis=1)[:, -k:].sum(axis=1, keepdims=True)
    ref = chosen * {"none": 1.0, "sum": 1 / within, "mass": top / within}[norm]
    util.assert_close(got.weights, ref, 1e-6 + util.HALF_ULP[dtype] * ref, norm)
    exact = route(router, z, "float32", norm=norm, norm_k=k)
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
            route(make(name, 4), z, dtype, threads=4)
    with pytest.raises(ValueError, match="router_logits: row 37 "):
        make(name, 4).reference(z)


@every_function
def test_unusable_rows_of_3d_logits(function):
    z = np.zeros((3, 5, 8), np.float32)
    z[2, 1, 3] = np.nan
    with pytest.raises(ValueError, match="row 11 "):
        getattr(moeprof, function)(z, null="normal")


# ---- the functions ----


def call(function, logits, **options):
    return getattr(moeprof, function)(logits, null="normal", **options)


def assert_routing(result, z, dtype="float32"):
    """Shapes, padding, best first, rows summing to 1; z (T,E) are the values routed."""
    weights, experts, counts = (np.asarray(part) for part in result[:3])
    rows, width = z.shape
    weights, experts = weights.reshape(rows, width), experts.reshape(rows, experts.shape[-1])
    counts = counts.reshape(rows)
    assert ((experts >= 0).sum(axis=1) == counts).all() and (experts[:, 0] >= 0).all()
    assert (np.diff((experts >= 0).astype(int), axis=1) <= 0).all()  # -1 only at the end
    ranked = np.take_along_axis(z, np.maximum(experts, 0), axis=1)
    assert (ranked[:, 1:] <= ranked[:, :-1])[experts[:, 1:] >= 0].all()
    dense = np.zeros((rows, width + 1), bool)
    np.put_along_axis(dense, experts, True, axis=1)
    assert (weights[~dense[:, :width]] == 0).all() and (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=17 * util.HALF_ULP[dtype])


@pytest.mark.parametrize("shape", ((7, 32), (0, 32), (2, 3, 32), (0, 3, 32), (2, 0, 32)))
@pytest.mark.parametrize("dtype", (np.float32, np.float16))
@every_function
def test_numpy_in_numpy_out(function, dtype, shape):
    z = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    result = call(function, z)
    assert all(type(part) is np.ndarray for part in result)
    weights, experts, counts = result
    assert weights.dtype == dtype and experts.dtype == np.int64 and counts.dtype == np.int64
    assert weights.shape == shape and counts.shape == shape[:-1]
    assert experts.shape[:-1] == shape[:-1]
    assert_routing(result, z.reshape(-1, 32).astype(np.float32), str(np.dtype(dtype)))


@pytest.mark.parametrize("shape", ((7, 32), (0, 32), (2, 3, 32)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
@every_function
def test_torch_in_torch_out(function, dtype, shape):
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    result = call(function, z)
    weights, experts, counts = result
    assert all(isinstance(part, torch.Tensor) and not part.requires_grad for part in result)
    assert weights.dtype == dtype and experts.dtype == counts.dtype == torch.int64
    assert weights.shape == shape and counts.shape == shape[:-1]
    name = str(dtype).removeprefix("torch.")
    values = z.detach().float().reshape(-1, 32).numpy()
    assert_routing([weights.float(), experts, counts], values, name)
    bits = narrow(values, name).reshape(shape)
    if name != "bfloat16":
        same = call(function, bits.view(np.dtype(name)))
        np.testing.assert_array_equal(np.asarray(experts), same.selected_experts)
        np.testing.assert_array_equal(weights.numpy(), same.routing_weights)


def views(z):
    """The values of z (T,E), laid out in every way that NumPy knows."""
    wide = np.zeros((2 * z.shape[0], 3 * z.shape[1]), z.dtype)
    wide[::2, ::3] = z
    return {
        "every other": wide[::2, ::3],
        "transposed": np.ascontiguousarray(z.T).T,
        "backwards": np.ascontiguousarray(z[::-1, ::-1])[::-1, ::-1],
        "read-only": np.broadcast_to(z, z.shape),
        "unaligned": util.shifted(z, 1),
        "byte-swapped": z.astype(z.dtype.newbyteorder()),
        "3-D": np.asfortranarray(z.reshape(2, -1, z.shape[1])),
    }


@pytest.mark.parametrize("layout", views(np.zeros((2, 2))))
@pytest.mark.parametrize("dtype", (np.float32, np.float16))
@every_function
def test_any_strides(function, dtype, layout):
    z = np.random.default_rng(0).standard_normal((6, 16)).astype(dtype)
    view, before = views(z)[layout], z.copy()
    for got, ref in zip(call(function, view), call(function, z.reshape(view.shape)), strict=True):
        np.testing.assert_array_equal(got, ref)
    np.testing.assert_array_equal(z, before)
    same = np.broadcast_to(z[:1], (4, 16))
    assert (call(function, same).selected_experts == call(function, z).selected_experts[0]).all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@every_function
def test_any_torch_strides(function, dtype):
    z = torch.randn(3, 16, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    for view in (z.transpose(1, 2), z[:, :, 0], z[:, ::2, 1], z[0].T, z[0, :, 0].expand(4, -1)):
        for a, b in zip(call(function, view), call(function, view.contiguous()), strict=True):
            assert torch.equal(a, b)


@every_function
def test_return_stats(function):
    z = logits_of(100, 32)
    plain, stats = call(function, z), call(function, z, return_stats=True)
    for a, b in zip(plain, stats[:3], strict=True):
        np.testing.assert_array_equal(a, b)
    assert stats.mask.dtype == bool and stats.p_values.dtype == np.float64
    np.testing.assert_allclose(stats.p_values, normal_reference(z), rtol=1e-9, atol=1e-300)
    np.testing.assert_array_equal(stats.mask.sum(axis=1), stats.expert_counts)
    assert not stats.routing_weights[~stats.mask].any()
    batched = call(function, torch.from_numpy(z).view(2, 50, 32), return_stats=True)
    assert batched.mask.dtype == torch.bool
    np.testing.assert_array_equal(batched.mask.reshape(100, 32), stats.mask)
    np.testing.assert_array_equal(batched.p_values.reshape(100, 32), stats.p_values)


def test_max_k_is_16_unless_there_are_fewer():
    z = random_logits(30, 64)
    assert call("benjamini_hochberg_routing", z).selected_experts.shape == (30, 16)
    assert call("benjamini_hochberg_routing", z[:, :5]).selected_experts.shape == (30, 5)
    assert call("topk_routing", z, k=3).selected_experts.shape == (30, 3)


def test_without_a_null_one_warning_names_calibrate_at_the_callers_line():
    z = np.zeros((2, 8), np.float32)
    for options in ({}, {"return_stats": True}):
        with pytest.warns(UserWarning, match="moeprof calibrate") as caught:
            moeprof.benjamini_hochberg_routing(z, **options)
        assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moeprof.topk_routing(z)
        moeprof.benjamini_hochberg_routing(z, null="normal")


# ---- bad input ----


@pytest.mark.parametrize("alpha", (0, 1, -1, 2, np.nan, np.inf, "x", None, True))
def test_bad_alpha(alpha):
    p = np.full((1, 4), 0.5)
    for run in (lambda: moeprof.benjamini_hochberg_routing(np.zeros((1, 4), np.float32), alpha),
                lambda: BH(alpha), lambda: moeprof.benjamini_hochberg(p, alpha)):  # fmt: skip
        with pytest.raises(ValueError, match=r"alpha: expected a number in \(0, 1\), got "):
            run()


@pytest.mark.parametrize("temperature", (0, -1, np.inf, np.nan, "x", None))
@every_function
def test_bad_temperature(function, temperature):
    with pytest.raises(ValueError, match="temperature: expected a number > 0, got"):
        call(function, np.zeros((1, 8), np.float32), temperature=temperature)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"min_k": 0}, r"min_k: expected 1 to 8 \(experts\), got 0"),
        ({"min_k": 9}, r"min_k: expected 1 to 8 \(experts\), got 9"),
        ({"min_k": 1.5}, "min_k: expected an integer, got 1.5"),
        ({"max_k": 0}, r"max_k: expected 1 to 8 \(experts\), got 0"),
        ({"max_k": 9}, r"max_k: expected 1 to 8 \(experts\), got 9"),
        ({"max_k": "8"}, "max_k: expected an integer, got '8'"),
        ({"min_k": 5, "max_k": 4}, "min_k: expected at most max_k=4, got 5"),
    ],
)
@every_router
def test_bad_limits(name, limits, message):
    z = np.zeros((1, 8), np.float32)
    with pytest.raises(ValueError, match=message):
        make(name, 8, **limits).spec(8, norm="sum")
    if name == "bh":
        with pytest.raises(ValueError, match=message):
            call("benjamini_hochberg_routing", z, **limits)


@pytest.mark.parametrize("k", (0, -1, 9, 2.5, "8", None))
def test_bad_k(k):
    with pytest.raises(ValueError, match="^k: expected"):
        call("topk_routing", np.zeros((1, 8), np.float32), k=k)


BAD_LOGITS = {
    "1-D": (np.zeros(8, np.float32), ValueError, r"expected \(T, E\) or \(B, S, E\), got .*\(8,\)"),
    "4-D": (np.zeros((1, 1, 1, 8), np.float32), ValueError, r"got shape \(1, 1, 1, 8\)"),
    "no experts": (np.zeros((2, 0), np.float32), ValueError, r"0 \(experts\)"),
    "list": ([[0.0, 1.0]], TypeError, "expected a torch.Tensor or numpy.ndarray, got list"),
    "None": (None, TypeError, "got NoneType"),
    "float64": (np.zeros((1, 8)), TypeError, "expected float32, float16 or bfloat16, got float64"),
    "int": (np.zeros((1, 8), np.int64), TypeError, "bfloat16, got int64"),
    "bits": (np.zeros((1, 8), np.uint16), TypeError, "bfloat16, got uint16"),
    "torch float64": (torch.zeros((1, 8)).double(), TypeError, "bfloat16, got float64"),
    "torch int": (torch.zeros((1, 8)).int(), TypeError, "bfloat16, got int32"),
    "no memory": (torch.zeros((1, 8), device="meta"), ValueError, "a CPU tensor, got one on meta"),
}


@pytest.mark.parametrize(("logits", "error", "message"), BAD_LOGITS.values(), ids=BAD_LOGITS)
@every_function
def test_bad_logits(function, logits, error, message):
    with pytest.raises(error, match=message):
        call(function, logits)


def test_make_router():
    assert make_router("topk", k=3) == TopK(3) and make_router(BH(0.2)) == BH(0.2)
    with pytest.raises(ValueError, match="router: expected one of .*'topk'.*, got 'nope'"):
        make_router("nope")
    with pytest.raises(TypeError, match=r"unknown parameters \['alhpa'\]; it takes .*'alpha'"):
        make_router("bh", alhpa=0.1)
    with pytest.raises(TypeError, match="takes no further parameters: .'k'"):
        make_router(TopK(), k=3)
    with pytest.raises(TypeError, match="expected a name or a Router, got int"):
        make_router(8)


# ---- the registry ----


def test_c_and_python_parameters_are_the_same():
    shared = {f.name for f in fields(Router)}
    own = {n: [f.name for f in fields(c) if f.name not in shared] for n, c in REGISTRY.items()}
    assert _C.routers() == own


@every_router
def test_each_router_is_documented_and_exported(name):
    cls = REGISTRY[name]
    assert "Source:" in cls.__doc__ and cls.__name__ in moeprof.__all__
    for f in fields(cls):
        assert f.name in cls.__doc__ or f.name in Router.__doc__, f.name
    with pytest.raises(AttributeError):  # frozen
        make(name, 8).temperature = 2.0


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


# ---- what may be claimed of BH (statistics.md); known, independent, continuous p ----

TOKENS, E, FALSE = 40_000, 64, 8


def uniform_null():
    """A null under which the logit 32 - 64 p has the p-value p."""
    sf = np.arange(8192, -1, -1) / 8192
    return LayerNull("logit", np.concatenate([[32.0, 1e-9, 1.0], sf]))


def mask_of(p, alpha, way):
    """The experts that BH rejects, before any clamping."""
    if way == "benjamini_hochberg":
        return moeprof.benjamini_hochberg(p, alpha)
    z = (32 - 64 * p).astype(np.float32)
    got = route(BH(alpha, max_k=p.shape[1]), z, null=uniform_null())
    np.testing.assert_allclose(got.p, p, atol=1e-7)
    rank = np.empty(p.shape, int)
    order = np.argsort(-z, axis=1, kind="stable")
    np.put_along_axis(rank, order, np.broadcast_to(np.arange(p.shape[1]), p.shape), axis=1)
    return rank < got.rejections[:, None]


@pytest.mark.parametrize("way", ("benjamini_hochberg", "the router"))
@pytest.mark.parametrize("alpha", (0.05, 0.2, 0.5))
def test_false_discovery_rate(alpha, way):
    p = np.random.default_rng(1).random((TOKENS, E))
    p[:, :FALSE] *= 0.002
    mask = mask_of(p, alpha, way)
    fdp = mask[:, FALSE:].sum(axis=1) / np.maximum(mask.sum(axis=1), 1)
    assert abs(fdp.mean() - (E - FALSE) / E * alpha) <= 4 * fdp.std() / np.sqrt(TOKENS)


@pytest.mark.parametrize("way", ("benjamini_hochberg", "the router"))
@pytest.mark.parametrize("alpha", (0.05, 0.2, 0.5))
def test_rejections_under_the_global_null(alpha, way):
    p = np.random.default_rng(2).random((TOKENS, E))
    some = mask_of(p, alpha, way).any(axis=1).mean()
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
