"""The routers as functions and as objects: what they promise, and what they refuse.

Which routers there are is asked of the registry: a new one needs no edit here.
"""

import inspect
import warnings
from dataclasses import replace

import numpy as np
import pytest
import scipy.special
import torch
import util
from nulls import null_of, random_logits
from routing import NAMES, any_null, logits_of, make, route, weights_of
from util import narrow

import moeprof
from moeprof import _C, BH, BY, LocalFDR, StoreyBH, TopK, WeightedBH
from moeprof.null import LayerNull, normal_reference
from moeprof.routers import REGISTRY, Router, make_router
from moeprof.routers.base import parameters_of

pytestmark = [
    pytest.mark.once,
    # Some logits here have more to choose than the default cap; test_patch_messages.py
    # asserts that this is said.
    pytest.mark.filterwarnings("ignore:max_k=None caps"),
]

FUNCTIONS = [name for name in moeprof.__all__ if name.endswith("_routing")]
every_router = pytest.mark.parametrize("name", NAMES)
every_function = pytest.mark.parametrize("function", FUNCTIONS)


# ---- the functions ----


class Efron(LayerNull):
    """A LayerNull with the local fdr that an efron null has."""

    pi0 = 0.9
    local_fdr = np.minimum(1, 1.2 / (1 + np.exp(-32 + np.arange(8193) / 128)))


def null_for(function):
    """The null that a function is called with: `normal` wherever it will do."""
    return EFRON if function in ("ebh_routing", "local_fdr_routing") else "normal"


EFRON = Efron("logit", util.table_of(6.0))


def call(function, logits, **options):
    return getattr(moeprof, function)(logits, null=null_for(function), **options)


@every_function
def test_unusable_rows_of_3d_logits(function):
    z = np.zeros((3, 5, 8), np.float32)
    z[2, 1, 3] = np.nan
    with pytest.raises(ValueError, match="row 11 "):
        call(function, z)


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
    null = null_for(function)
    p = normal_reference(z) if null == "normal" else null.reference(z)
    np.testing.assert_allclose(stats.p_values, p, rtol=1e-9, atol=1e-300)
    np.testing.assert_array_equal(stats.mask.sum(axis=1), stats.expert_counts)
    assert not stats.routing_weights[~stats.mask].any()
    batched = call(function, torch.from_numpy(z).view(2, 50, 32), return_stats=True)
    assert batched.mask.dtype == torch.bool
    np.testing.assert_array_equal(batched.mask.reshape(100, 32), stats.mask)
    np.testing.assert_array_equal(batched.p_values.reshape(100, 32), stats.p_values)


@every_function
def test_weights_sum_to_1_or_are_the_softmax(function):
    z = random_logits(100, 32)
    whole, plain = call(function, z), call(function, z, norm="none")
    np.testing.assert_array_equal(plain.selected_experts, whole.selected_experts)
    np.testing.assert_allclose(whole.routing_weights.sum(1), 1, rtol=1e-5)
    softmax = scipy.special.softmax(z.astype(np.float64), axis=1)
    expected = np.where(whole.routing_weights > 0, softmax, 0)
    np.testing.assert_allclose(plain.routing_weights, expected, rtol=1e-5, atol=1e-30)
    with pytest.raises(ValueError, match="norm: expected 'sum' or 'none', got 'mass'"):
        call(function, z, norm="mass")


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
    for run in (
        lambda: moeprof.benjamini_hochberg_routing(np.zeros((1, 4), np.float32), alpha),
        lambda: BH(alpha),
        lambda: moeprof.benjamini_hochberg(p, alpha),
    ):
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
        ({"min_k": True}, "min_k: expected an integer, got True"),
        ({"max_k": True}, "max_k: expected an integer, got True"),
        ({"min_k": 5, "max_k": 4}, "min_k: expected at most max_k=4, got 5"),
    ],
)
@every_router
def test_bad_limits(name, limits, message):
    z = np.zeros((1, 8), np.float32)
    with pytest.raises(ValueError, match=message):
        make(name, 8, **limits).spec(8, norm="sum", null=any_null(name, 8))
    if name == "bh":
        with pytest.raises(ValueError, match=message):
            call("benjamini_hochberg_routing", z, **limits)


@every_router
def test_numbers_of_numpy_become_pythons(name):
    """In what a router says of itself, and in the JSON that an operator of torch takes."""
    router = make(name, 8)
    own = {f.name: getattr(router, f.name) for f in parameters_of(type(router))}
    kinds = {int: np.int64, float: np.float64}
    made = replace(router, **{n: kinds.get(type(v), lambda v: v)(v) for n, v in own.items()})
    assert made == router and repr(made) == repr(router)
    made.spec(8, norm="sum", norm_k=np.int64(2), null=any_null(name, 8)).operands()
    assert repr(moeprof.TopK([np.int64(1), np.int64(2)]).k) == "(1, 2)"
    assert repr(moeprof.BH(np.float32(0.5)).alpha) == "0.5"


@pytest.mark.parametrize("name", ["beta", "pi0", "alpha", "k"])
def test_an_array_in_place_of_a_number_is_named(name):
    router = {"beta": "higher_criticism", "pi0": "storey_bh", "alpha": "bh", "k": "topk"}[name]
    with pytest.raises(ValueError, match=rf"^{name}: expected .*got array"):
        make_router(router, **{name: np.array([0.3, 0.4])})


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
    own = {name: list(make(name, 8).parameters(any_null(name, 8))) for name in NAMES}
    assert _C.routers() == own


@every_router
def test_each_router_is_documented_and_exported(name):
    cls = REGISTRY[name]
    assert "Source:" in cls.__doc__ and cls.__name__ in moeprof.routers.__all__
    assert f"{name}_routing" in moeprof.__all__
    for f in parameters_of(cls):
        assert f.name in cls.__doc__ or f.name in Router.__doc__, f.name
        assert f.name in inspect.signature(getattr(moeprof, f"{name}_routing")).parameters or (
            name == "topk"
        )
    low, high = cls.main_range
    assert cls.main in [f.name for f in parameters_of(cls)] and low < high
    with pytest.raises(AttributeError):  # frozen
        make(name, 8).temperature = 2.0
    assert hash(make(name, 8)) == hash(make(name, 8))


# ---- parameters by layer ----


@every_router
def test_a_main_parameter_for_each_layer(name):
    cls = REGISTRY[name]
    values = [2, 3, 5] if name == "topk" else [0.125, 0.25, 0.5]
    router = make(name, 8, **{cls.main: values})
    assert getattr(router, cls.main) == tuple(values)
    for layer, value in enumerate(values):
        assert router.at(layer, 3) == make(name, 8, **{cls.main: value})
    with pytest.raises(ValueError, match=f"^{cls.main}: expected 4 values, one a layer, got 3"):
        router.at(0, 4)
    with pytest.raises(ValueError, match=f"^{cls.main}: has a value for each layer"):
        router.spec(8, norm="sum", null=any_null(name, 8))
    with pytest.raises(ValueError, match=f"^{cls.main}: expected"):
        make(name, 8, **{cls.main: [*values, None]})
    plain = make(name, 8)
    assert plain.at(1, 3) == plain


def test_weights_of_experts_and_layers():
    u = np.array([weights_of(8), np.ones(8)])
    router = WeightedBH(0.2, u, [0.5, 1.5])
    assert router.at(1, 2) == WeightedBH(0.2, (1.0,) * 8, 1.5) and hash(router)
    np.testing.assert_array_equal(router.at(0, 2).table(8), 0.5 * u[0])
    with pytest.raises(ValueError, match="u, v: have values for each layer"):
        router.spec(8, norm="sum")
    nan, deep = [[1.0]] * 3 + [[np.nan]], np.ones((1, 1, 8))
    for bad in (
        {"u": u * 1.01},
        {"u": u - 1},
        {"v": [1.0, 1.1]},
        {"v": -1.0},
        {"u": "x"},
        {"u": nan},
        {"u": 1.0},
        {"u": deep},
    ):
        with pytest.raises(ValueError, match="^[uv]: expected "):
            WeightedBH(0.2, **bad)
    with pytest.raises(ValueError, match="u: expected 9 weights"):
        WeightedBH(0.2, u[0]).spec(9, norm="sum")
    with pytest.raises(ValueError, match="u: expected 3 values, one a layer, got 2"):
        router.at(0, 3)
    few = WeightedBH(0.2, (4.0, 4.0, 0, 0, 0, 0, 0, 0), min_k=3)
    with pytest.raises(ValueError, match=r"min_k: expected at most 2 \(experts of positive"):
        few.spec(8, norm="sum")
    spec = list(
        WeightedBH(0.2, (4.0, 4.0, 0, 0, 0, 0, 0, 0), min_k=2).spec(8, norm="sum").arguments
    )
    spec[2] = 3  # and C itself refuses it
    with pytest.raises(ValueError, match="min_k: expected at most the 2 experts of positive"):
        util.route(np.zeros((1, 8), np.float32), "float32", tuple(spec), 1, False)


def test_what_only_an_efron_null_has_is_asked_for():
    for router in (LocalFDR(), moeprof.EBH()):
        with pytest.raises(ValueError, match="null: expected one of kind efron"):
            router.spec(8, norm="sum")


def test_expert_threshold_works_with_each_experts_own_scores():
    """Each takes a share rho of the tokens, however few the null has seen."""
    logits = random_logits(300, 16) + np.linspace(-3, 3, 16, dtype=np.float32)
    router = moeprof.ExpertThreshold(0.25, max_k=16)
    null = router.adapt(null_of(logits, kind="efron"))
    assert null.kind == "all" and null.fallbacks == []
    experts = route(router, logits, null=null.layer(0)).experts
    rejections = route(router, logits, null=null.layer(0)).rejections
    within = np.arange(16) < rejections[:, None]
    load = np.bincount(experts[within], minlength=16) / len(logits)
    np.testing.assert_allclose(load, 0.25, atol=2 / 300)
    with pytest.raises(ValueError, match="expert_threshold needs at least 15 scores of each"):
        router.adapt(null_of(logits[:14]))
    assert BH().adapt("any") == "any"


def test_higher_criticism_looks_at_no_more_than_the_experts():
    """A beta above 1, which only C can be given, is 1; it read past the arrays."""
    z = random_logits(20, 64)
    name, _, *rest = moeprof.HigherCriticism(max_k=64).spec(64, norm="sum").arguments
    got = [
        util.route(z, "float32", (name, (beta, 0.0, 0.0), *rest), 1, False)[3]
        for beta in (1.0, 20.0, 1e300, np.inf)
    ]
    for rejections in got[1:]:
        np.testing.assert_array_equal(rejections, got[0])


@pytest.mark.parametrize(
    ("make_one", "message"),
    [
        (lambda: StoreyBH(lam=1.0), r"lam: expected a number in \(0, 1\), got 1.0"),
        (lambda: StoreyBH(pi0=0), r"pi0: expected a number in \(0, inf\) or None, got 0"),
        (lambda: moeprof.EBH(e="x"), "e: expected 'lr' or 'calibrator', got 'x'"),
        (lambda: moeprof.HigherCriticism(beta="all"), r"beta: .* in \(0, 1\] or 'auto', got 'all'"),
        (lambda: moeprof.HigherCriticism(denominator=1), "denominator: expected 'rank' or 'p'"),
        (lambda: moeprof.HigherCriticism(c=np.nan), r"c: expected a number in \(-inf, inf\)"),
        (lambda: moeprof.Kneedle("x"), "on: expected 'prob' or 'log', got 'x'"),
        (lambda: moeprof.Entropy(0.0), r"c: expected a number in \(0, inf\), got 0.0"),
        (lambda: BY(True), r"alpha: expected a number in \(0, 1\), got True"),
    ],
)
def test_bad_parameters(make_one, message):
    with pytest.raises(ValueError, match=message):
        make_one()


def test_a_router_of_ones_own_is_a_function_not_a_subclass():
    with pytest.raises(TypeError, match="Mine: .* a function that takes logits"):

        class Mine(moeprof.Router):
            name = "mine"

    assert "mine" not in REGISTRY
