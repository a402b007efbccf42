"""The arguments of the bindings: RouteSpec and Layer, and what is refused with a clear error."""

import gc
import pickle
import weakref

import numpy as np
import pytest
import util

from moeprof import _C, _kernels

pytestmark = pytest.mark.once

# ---- RouteSpec and Layer ----


class Table(np.ndarray):
    """An array that can refer to other objects."""


def held():
    """{type: an object of it}"""
    return {"RouteSpec": _C.RouteSpec(SPEC, "float32", 4), "Layer": layer()}


@pytest.mark.parametrize("name", ("RouteSpec", "Layer"))
def test_an_object_of_ours_is_immutable_and_has_no_copy(name):
    made = held()[name]
    assert type(made) is getattr(_C, name) and gc.is_tracked(made)
    with pytest.raises(AttributeError):
        made.num_experts = 3
    with pytest.raises(TypeError):
        type(made).extra = 3
    with pytest.raises(TypeError, match="cannot pickle"):
        pickle.dumps(made)
    with pytest.raises(TypeError, match="not an acceptable base type"):
        type("Own", (type(made),), {})


def test_a_layer_keeps_its_addresses():
    """It has copied them: what becomes of the array is nothing to it."""
    random = util.Layer(4, 16, 8)
    ids, weights = util.random_slots(20, 2, 4)
    expected = random(random.hidden(20), ids, weights)
    random.pointers[:] = 0
    np.testing.assert_array_equal(random(random.hidden(20), ids, weights), expected)


def test_a_route_spec_keeps_its_tables():
    z = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)

    def made():
        null = ("table", "logit", util.table_of(3.5))
        return _C.RouteSpec(("bh", (0.3,), 1, 4, 1.0, "sum", 1, null, None), "float32", 8)

    spec = made()
    filled = [util.table_of(float(i)) for i in range(100)]  # where the table lay, if it went
    for got, expected in zip(_C.route(z, spec, 1, True), _C.route(z, made(), 1, True), strict=True):
        np.testing.assert_array_equal(got, expected)
    assert len(filled) == 100


def test_a_cycle_through_a_route_spec_is_collected():
    table = util.table_of(3.5).view(Table)
    null = ("table", "logit", table)
    table.spec = _C.RouteSpec(("bh", (0.3,), 1, 4, 1.0, "sum", 1, null, None), "float32", 8)
    gone = weakref.ref(table)
    del table, null
    gc.collect()
    assert gone() is None


def test_the_types_of_a_second_module_object_are_its_own():
    code = """if True:
        import gc, sys, weakref, importlib, numpy as np, moeprof
        first = sys.modules.pop("moeprof._C")
        second = importlib.import_module("moeprof._C")
        spec = ("topk", (2.0,), 1, 2, 1.0, "sum", 1, ("normal", "logit", None), None)
        z = np.ones((1, 4), np.float32)
        made = second.RouteSpec(spec, "float32", 4)
        second.route(z, made, 1, False)
        try:
            first.route(z, made, 1, False)
        except TypeError as error:
            print(error)
        gone = weakref.ref(second.RouteSpec)
        del second, made
        sys.modules["moeprof._C"] = moeprof._C = first
        gc.collect()
        print(gone() is None)"""
    message, gone = util.run_python(code).stdout.splitlines()
    assert message.startswith("spec: expected a moeprof._C.RouteSpec") and gone == "True"


# ---- bad arguments ----

F32, F64 = np.ones((2, 4), np.float32), np.ones((2, 4))
I32, U16 = np.zeros((2, 1), np.int32), np.ones((2, 4), np.uint16)
INDEX, ONES = np.zeros(2, np.int32), np.ones((2, 1), np.float32)
NORMAL, SURVIVAL = ("normal", "logit", None), np.ones(8196)
SPEC = ("bh", (0.05,), 1, 2, 1.0, "sum", 1, NORMAL, None)
POINTERS = np.array([[F32.ctypes.data] * 2] * 3, np.uint64)  # of 8 floats each
FIVE = np.repeat(POINTERS[:1], 5, axis=0)
MADE = _C.RouteSpec(SPEC, "float32", 4)
BIG, TWO = F32.astype(">f4"), F32[:, :2].copy()
SWAPPED = "C-contiguous, aligned array of native byte order"


def route(logits=F32, dtype="float32", spec=SPEC, num_experts=4, **changes):
    names = (
        "router",
        "parameters",
        "min_k",
        "max_k",
        "temperature",
        "norm",
        "norm_k",
        "null",
        "table",
    )
    spec = tuple(changes.get(n, v) for n, v in zip(names, spec, strict=True)) if changes else spec
    return _C.route(logits, _C.RouteSpec(spec, dtype, num_experts), 1, False)


def p_of(null):
    return _C.p_values(F32, null)


def layer(
    dtype="float32", pointers=POINTERS, size=4, inner=2, activation=util.SWIGLU, storage="rows"
):
    return _C.Layer(pointers, dtype, dtype, size, inner, activation, storage)


def by_columns(index, w, first=0, n=1):
    return _kernels.transposed(F32, index, w, first, n, "float32")


def glu(g, u, activation=util.SWIGLU):
    return _kernels.glu(activation, g, u, "float32")


def activation(changed):
    return layer(activation=changed)


def experts(hidden=F32, ids=I32, weights=ONES, dtype="float32"):
    return _C.experts(hidden, ids, weights, layer(dtype), 1)


def moe(hidden=F32, logits=TWO, dtype="float32", spec=SPEC, num_experts=2, spec_dtype=None):
    made = _C.RouteSpec(spec, spec_dtype or dtype, num_experts)
    return _C.moe(hidden, logits, layer(dtype), made, 1)


def tally(
    counts=None, sums=None, recency=INDEX - 1, experts=I32, logits=None, real=None, previous=None
):
    """Of 2 experts, without pairs."""
    places = _C.tally_layout(2, False)
    given = (counts, sums)
    arrays = [
        np.zeros(sum(r * c for _, r, c in part.values()), t) if array is None else array
        for array, part, t in zip(given, places, (np.int64, float), strict=True)
    ]
    return _C.tally(*arrays, recency, experts, logits, "float32", real, previous, 1, False)


READ_ONLY = INDEX - 1
READ_ONLY.setflags(write=False)

BAD = [
    (lambda: route([[1.0]]), TypeError, "router_logits: expected a NumPy array, got list"),
    (lambda: _C.route(F32, SPEC, 1, False), TypeError, "spec: expected a .*RouteSpec, got tuple"),
    (
        lambda: _C.route(TWO, MADE, 1, False),
        ValueError,
        "router_logits: expected 4 experts.* got 2",
    ),
    (
        lambda: _C.moe(F32, TWO, POINTERS, MADE, 1),
        TypeError,
        "layer: expected a .*Layer, got numpy",
    ),
    (
        lambda: _C.moe(F32, TWO, layer(), SPEC, 1),
        TypeError,
        "spec: expected a .*RouteSpec, got tup",
    ),
    (lambda: moe(num_experts=4), ValueError, "RouteSpec of 2 experts and float32.* 4 and float32"),
    (
        lambda: moe(spec_dtype="float16"),
        ValueError,
        "2 experts and float32.* got one of 2 and float16",
    ),
    (lambda: moe(F32[:, :2].copy()), ValueError, r"hidden: expected \(T, 4\).* got \(2, 2\)"),
    (lambda: _C.experts(F32, I32, ONES, MADE, 1), TypeError, "layer: expected .*Layer, got .*Spec"),
    (
        lambda: layer("int4"),
        TypeError,
        "format: expected one of float32 bfloat16 float16 .*q8 .*, got int4",
    ),
    (lambda: layer(size=0), ValueError, "hidden_size, intermediate_size: expected .* got 0, 2"),
    (lambda: route(F64), TypeError, "router_logits: expected dtype float32, got float64"),
    (lambda: route(F64, "float16"), TypeError, "router_logits: expected dtype uint16, got float64"),
    (lambda: route(F32[0]), ValueError, "router_logits: expected 2 dimensions, got 1"),
    (lambda: route(F32[:, ::2]), ValueError, f"router_logits: expected a {SWAPPED}"),
    (lambda: route(BIG), ValueError, f"router_logits: expected a {SWAPPED}"),
    (lambda: route(util.shifted(F32, 1)), ValueError, f"router_logits: expected a {SWAPPED}"),
    (lambda: route(F32, "float64"), TypeError, "dtype: expected float32, .* got float64"),
    (
        lambda: _C.choice_logits(TWO, MADE),
        ValueError,
        "router_logits: expected 4 experts.* got 2",
    ),
    (lambda: route(spec=(*SPEC, 1)), TypeError, "rule: expected a tuple"),
    (lambda: route(spec=(*SPEC, ("softmax",))), TypeError, "rule"),
    (lambda: route(spec=[]), TypeError, "spec: expected a tuple"),
    (lambda: route(spec=SPEC[:5]), TypeError, "spec"),
    (lambda: route(router="nope"), ValueError, "router: no router is named nope"),
    (lambda: route(parameters=()), ValueError, "router bh: expected 1 parameters, got 0"),
    (lambda: route(parameters=("x",)), TypeError, "real number"),
    (lambda: route(norm="max"), ValueError, "norm: expected none, sum or mass, got max"),
    (lambda: route(table=SURVIVAL), ValueError, "table: expected None for the router bh"),
    (lambda: p_of([]), TypeError, "null: expected a tuple"),
    (lambda: p_of(("table", "logit")), TypeError, "null"),
    (lambda: p_of(("t", "logit", None)), ValueError, "null: expected normal, softmax, table or c"),
    (lambda: p_of(("table", "z", None)), ValueError, "score: expected logprob, logit or centred"),
    (lambda: p_of(("normal", "logit", SURVIVAL)), ValueError, "p_table: expected None for the nu"),
    (lambda: p_of(("table", "logit", None)), TypeError, "p_table: expected a NumPy array, got No"),
    (lambda: p_of(("table", "logit", np.ones(7))), ValueError, "p_table: expected 8196 values, go"),
    (lambda: p_of(("conformal", "logit", SURVIVAL)), ValueError, "expected 9218 values, got 8196"),
    (lambda: p_of(("table", "logit", np.ones((3, 8196)))), ValueError, "each of 4 experts, got 3"),
    (lambda: p_of(("table", "logit", np.ones(8196, "f4"))), TypeError, "p_table: expected dtype f"),
    (lambda: route(min_k=0), ValueError, "1 <= min_k <= max_k <= 4, got min_k=0, max_k=2"),
    (lambda: route(max_k=5), ValueError, "1 <= min_k <= max_k <= 4, got min_k=1, max_k=5"),
    (lambda: route(norm_k=5), ValueError, r"\(norm over 5\)"),
    (lambda: route(num_experts=1025), ValueError, "expected 1 to 1024 experts, got 1025"),
    (lambda: route(num_experts=0), ValueError, "expected 1 to 1024 experts, got 0"),
    (lambda: _C.p_values(F64, NORMAL), TypeError, "router_logits: expected dtype float32"),
    (lambda: _C.p_values(F32[:, :0], NORMAL), ValueError, "router_logits: expected 1 to"),
    (lambda: experts(F64), TypeError, "hidden: expected dtype float32, got float64"),
    (lambda: experts(F32, dtype="bfloat16"), TypeError, "hidden: expected dtype uint16"),
    (lambda: experts(ids=I32.astype(np.int16)), TypeError, "expert_ids: expected dtype int32, got"),
    (lambda: experts(ids=I32.astype(np.int64)[:1]), ValueError, r"expected \(2, k\) both"),
    (
        lambda: experts(weights=U16),
        TypeError,
        "routing_weights: expected dtype float32, got uint16",
    ),
    (
        lambda: experts(weights=F64),
        TypeError,
        "routing_weights: expected dtype float32, got float64",
    ),
    (
        lambda: experts(weights=F32),
        ValueError,
        r"expert_ids and routing_weights: expected \(2, k\)",
    ),
    (lambda: experts(ids=I32[:1], weights=ONES[:1]), ValueError, r"expected \(2, k\) both"),
    (lambda: layer(pointers=F64), TypeError, "pointers: expected dtype uint64, got float64"),
    (
        lambda: layer(pointers=POINTERS[:1]),
        ValueError,
        r"expected \(3, num_experts\), or",
    ),
    (lambda: layer(pointers=POINTERS[:, :0].copy()), ValueError, r"pointers: expected \(3, num"),
    (lambda: layer(pointers=POINTERS * 0), ValueError, "pointers: weights without memory"),
    (lambda: layer(pointers=FIVE), ValueError, r"pointers: expected \(3, num.*twice as many"),
    (lambda: layer(storage="columns"), ValueError, "storage: expected one of rows transposed"),
    (
        lambda: layer(pointers=POINTERS[:2].copy(), storage="interleaved"),
        ValueError,
        "storage: expected rows or transposed.* nothing to interleave",
    ),
    (lambda: layer(inner=0), ValueError, "intermediate_size"),
    (
        lambda: _C.dense(F32[:, :0].copy(), 1, 4, 0, "float32", "float32", 1),
        ValueError,
        "x: expected",
    ),
    (
        lambda: _kernels.linear(F32[:, :0].copy(), INDEX, F32[:, :0].copy(), "float32"),
        ValueError,
        "K",
    ),
    (lambda: experts(F32[:, :0].copy()), ValueError, "hidden"),
    (lambda: moe(logits=F32), ValueError, r"router_logits: expected shape \(2, 2\), got \(2, 4\)"),
    (lambda: moe(logits=F32[:1, :2]), ValueError, r"expected shape \(2, 2\), got \(1, 2\)"),
    (lambda: moe(logits=U16), TypeError, "router_logits: expected dtype float32, got uint16"),
    (lambda: moe(U16, logits=F64, dtype="float16"), TypeError, "router_logits: expected dtype u"),
    (
        lambda: _kernels.linear(F64, INDEX, F32, "float32"),
        TypeError,
        "x: expected dtype float32, got fl",
    ),
    (
        lambda: _kernels.linear(F32, I32, F32, "float32"),
        ValueError,
        "index: expected 1 dimensions, got",
    ),
    (
        lambda: _kernels.linear(F32, INDEX + 2, F32, "float32"),
        ValueError,
        "index: outside the rows of x",
    ),
    (
        lambda: _kernels.linear(F32, INDEX - 1, F32, "float32"),
        ValueError,
        "index: outside the rows of x",
    ),
    (lambda: _kernels.linear(F32, INDEX, F64, "float32"), TypeError, "w: expected .* weights"),
    (lambda: _kernels.linear(F32, INDEX, BIG, "float32"), (TypeError, ValueError), "w: expected"),
    (
        lambda: _kernels.linear(F32, INDEX, ONES, "float32"),
        ValueError,
        "x and w: expected the same K",
    ),
    (lambda: _kernels.gemm(F32, INDEX, ONES, "float32"), ValueError, "x and w: expected"),
    (lambda: by_columns(INDEX, F32), ValueError, "x and w: expected the same K"),
    (lambda: by_columns(INDEX, np.ones((4, 3), "f4"), 2, 2), ValueError, "first, n: outside"),
    (lambda: by_columns(INDEX, np.ones((4, 3), "f4"), -1, 2), ValueError, "first, n: outside"),
    (lambda: by_columns(INDEX, F64), TypeError, "w: expected contiguous"),
    (lambda: by_columns(INDEX + 2, np.ones((4, 3), "f4")), ValueError, "index: outside the rows"),
    (lambda: _kernels.gemm(F32, INDEX, U16, "float32"), TypeError, "w: expected"),
    (lambda: _kernels.gemm(F32, INDEX, F32.T, "float32"), TypeError, "w: expected contiguous"),
    (lambda: glu(ONES[0], F32[0]), ValueError, "g and u: expected the same"),
    (lambda: glu(ONES, ONES), ValueError, "g: expected 1 dimensions"),
    (lambda: glu(None, ONES), ValueError, "u: expected 1 dimensions"),
    (lambda: activation([]), TypeError, r"activation: expected a tuple \(name, alpha, .* got list"),
    (
        lambda: activation(("tanh", 1.0, 1.0, 0.0)),
        ValueError,
        "expected one of silu gelu gelu_tanh relu relu2, got tanh",
    ),
    (lambda: activation(("silu", 0.0, 1.0, 0.0)), ValueError, "alpha: expected a finite number"),
    (lambda: activation(("silu", np.inf, 1.0, 0.0)), ValueError, "alpha: expected a finite number"),
    (lambda: activation(("relu", 2.0, 1.0, 0.0)), ValueError, "alpha: expected 1, since only silu"),
    (lambda: activation(("silu", 1.0, 0.0, 0.0)), ValueError, "limit: expected a number above 0"),
    (lambda: activation(("silu", 1.0, np.nan, 0.0)), ValueError, "limit: expected .* got .*nan"),
    (lambda: activation(("silu", 1.0, 1.0, np.inf)), ValueError, "shift: expected a finite number"),
    (
        lambda: layer(pointers=POINTERS[:2], activation=("silu", 1.0, 7.0, 0.0)),
        ValueError,
        "limit and shift: expected inf and 0, since experts without gate",
    ),
    (lambda: _kernels.softmax(F64, 1.0), TypeError, "z: expected dtype float32, got float64"),
    (lambda: _kernels.logprob(F32[0]), ValueError, "z: expected 2 dimensions, got 1"),
    (lambda: _kernels.order(F32, F32), TypeError, "p: expected dtype float64, got float32"),
    (lambda: _kernels.order(F64[:1], F32), ValueError, "p and z: expected the same shape"),
    (lambda: _C.step_up(F32, 0.1), TypeError, "p: expected dtype float64, got float32"),
    (lambda: _C.step_up(F64[:, ::2], 0.1), ValueError, f"p: expected a {SWAPPED}"),
    (lambda: _C.tally_layout(1025, True), ValueError, "num_experts: expected 1 to 1024, got 1025"),
    (lambda: tally(np.zeros(5, np.int64)), ValueError, r"lengths of tally_layout\(2\), got 5"),
    (lambda: tally(counts=F64[0]), TypeError, "counts: expected dtype int64, got float64"),
    (lambda: tally(sums=F64[0]), ValueError, r"lengths of tally_layout\(2\)"),
    (lambda: tally(recency=INDEX[:0]), ValueError, "num_experts: expected 1 to 1024, got 0"),
    (lambda: tally(recency=READ_ONLY), ValueError, "recency: expected an array that can be writ"),
    (lambda: tally(experts=ONES), TypeError, "expert_ids: expected dtype int32, got float32"),
    (lambda: tally(experts=I32 + 2), ValueError, r"expert_ids: an index is outside"),
    (lambda: tally(logits=F32), ValueError, "logits: expected 2 tokens of 2 experts, got 2 of 4"),
    (lambda: tally(real=np.ones(3, bool)), ValueError, "real: expected 2 tokens, got 3"),
    (lambda: tally(real=INDEX), TypeError, "real: expected dtype bool, got int32"),
    (lambda: tally(previous=I32[:1]), ValueError, "previous: expected 2 tokens, got 1"),
    (lambda: tally(previous=I32 - 2), ValueError, "previous: an index is outside"),
]


@pytest.mark.parametrize("i", range(len(BAD)))
def test_bad_arguments_are_named(i):
    run, error, message = BAD[i]
    with pytest.raises(error, match=message):
        run()


@pytest.mark.parametrize("width", (0, 1))
def test_kernels_take_no_rows_and_one_expert(width):
    empty, one = np.zeros((0, 4), np.float32), np.full((3, width), 2, np.float32)
    for kernel in (
        lambda z: _kernels.softmax(z, 1.0),
        _kernels.logprob,
        lambda z: _kernels.order(None, z),
    ):
        assert kernel(empty).shape == (0, 4) and kernel(one).shape == (3, width)
    assert _C.step_up(np.zeros((3, width)), 0.5).tolist() == [width] * 3
    assert _C.step_up(empty.astype(float), 0.5).shape == (0,)
    x, none = np.zeros((2, 4), np.float32), np.zeros(0, np.int32)
    assert _kernels.linear(x, none, x, "float32").shape == (0, 2)
    assert _kernels.linear(x, none, x[:0], "float32").shape == (0, 0)
