"""The extensions as Python modules: what it says of itself, what it loads, leaks, bad arguments."""

import ast
import ctypes
import gc
import importlib.util
import inspect
import os
import pickle
import platform
import re
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import util

import moeprof
from moeprof import _C, _kernels

pytestmark = pytest.mark.once

PUBLIC = {
    module: sorted(name for name in vars(module) if not name.startswith("_"))
    for module in (_C, _kernels)
}
BINDINGS = [(module, name) for module, names in PUBLIC.items() for name in names]
every_module = pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__)
every_binding = pytest.mark.parametrize(
    ("module", "name"), BINDINGS, ids=lambda value: getattr(value, "__name__", value)
)
linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")

# ---- the CPU ----

# CPU features in the names of /proc/cpuinfo, which hides what XCR0 does not save
FLAGS = {
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx512bf16": {"avx512_bf16"},
    "avx512fp16": {"avx512_fp16"},
    "amx": {"amx_tile", "amx_bf16"},
}


def linux_grants_amx():
    """True if this process may use the tiles; to ask twice does no harm."""
    prctl, request, tiles = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(prctl, request, tiles) == 0


@pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="needs Linux on x86-64"
)
def test_features_are_those_of_proc_cpuinfo():
    text = Path("/proc/cpuinfo").read_text()
    flags = set(re.search(r"^flags\s*:(.*)$", text, re.M)[1].split())
    expected = [name for name, needed in FLAGS.items() if needed <= flags]
    if "avx2" not in expected:
        expected = []
    if "avx512" not in expected:
        expected = [name for name in expected if name == "avx2"]
    if "amx" in expected and not linux_grants_amx():
        expected.remove("amx")
    assert _C.cpu_features() == expected


def test_every_feature_is_known_here():
    assert set(_C.cpu_features()) <= set(FLAGS) == set(util.level_names()) - {"scalar", "openblas"}


# ---- what it says of itself ----


def stub(module):
    """{name: its arguments} of the module's .pyi."""
    file = module.__name__.removeprefix("moeprof.") + ".pyi"
    tree = ast.parse(Path(moeprof.__file__).with_name(file).read_text())
    found = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    types = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    found |= {node.name: node.body[0] for node in types}  # __new__
    arguments = {name: [*f.args.posonlyargs, *f.args.args] for name, f in found.items()}
    return {name: [a.arg for a in args if a.arg != "cls"] for name, args in arguments.items()}


@every_module
def test_the_stub_names_what_there_is(module):
    assert sorted(stub(module)) == PUBLIC[module]


@every_binding
def test_docstrings_open_with_the_signature_of_the_stub(module, name):
    function = getattr(module, name)
    assert function.__text_signature__ and len(function.__doc__) > 20
    assert list(inspect.signature(function).parameters) == stub(module)[name]


def test_both_have_the_same_kernels_and_nothing_else_in_common():
    assert _C.variants() == _kernels.variants()
    both = set(PUBLIC[_C]) & set(PUBLIC[_kernels])
    assert both == {"limit_cpu", "cpu_features", "variants"}


def test_moeprof_cpu_holds_in_both():
    code = """if True:
        from moeprof import _C, _kernels
        for module in (_C, _kernels):
            print({variant for _, variant, _, used in module.variants() if used})"""
    assert util.run_python(code, MOEPROF_CPU="scalar").stdout.split() == ["{'scalar'}"] * 2
    assert util.run_python(code, MOEPROF_CPU="").stdout == util.run_python(code).stdout


def test_all_is_sorted_and_resolves():
    assert moeprof.__all__ == sorted(moeprof.__all__) and len(set(moeprof.__all__)) > 10
    for name in moeprof.__all__:
        assert getattr(moeprof, name).__doc__, name
    assert set(moeprof.__all__) <= set(dir(moeprof))
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = moeprof.nope


# ---- what the import loads ----


def test_import_brings_in_nothing_heavy():
    code = "import sys, moeprof; print(*sys.modules)"
    loaded = set(util.run_python(code).stdout.split())
    heavy = {"torch", "transformers", "scipy", "scipy_openblas32", "pandas", "matplotlib"}
    assert "numpy" in loaded and not loaded & heavy


@linux
@pytest.mark.parametrize("order", ("moeprof, scipy.linalg", "scipy.linalg, moeprof"))
def test_scipy_keeps_its_own_blas(order):
    """The wheel's OpenBLAS is there, its symbols are in nobody's way."""
    code = f"""if True:
        import ctypes, numpy as np
        import {order}
        names = ("scipy_cblas_sgemm", "scipy_openblas_set_num_threads", "cblas_sgemm")
        print(*[hasattr(ctypes.CDLL(None), name) for name in names])
        a = np.random.default_rng(0).standard_normal((50, 50))
        print(np.allclose(scipy.linalg.inv(a) @ a, np.eye(50)))
        print("scipy_openblas32" in open("/proc/self/maps").read())"""
    *visible, right, loaded = util.run_python(code).stdout.split()
    assert visible == ["False"] * 3 and right == "True"
    wheel = importlib.util.find_spec("scipy_openblas32") is not None
    assert loaded == str(wheel) or os.environ.get("MOEPROF_BLAS") == "system"


def test_a_second_module_object_works():
    """Multi-phase init: importing anew gives functions that work, beside the first."""
    code = """if True:
        import sys, numpy as np, moeprof
        import importlib, moeprof._kernels
        z = np.ones((1, 4), np.float32)
        for name, call in [
            ("moeprof._C", lambda module: module.p_values(z, ("normal", "logit", None))),
            ("moeprof._kernels", lambda module: module.softmax(z, 1.0)),
        ]:
            first = sys.modules.pop(name)
            second = importlib.import_module(name)
            assert second is not first
            assert (call(second) == call(first)).all()
            assert second.variants() == first.variants()"""
    util.run_python(code)


# ---- leaks ----

LEAKS = """
import gc, os, sys
import numpy as np
import util
from moeprof import _C, _kernels

f32 = np.float32
x, w, index = np.ones((40, 32), f32), np.ones((24, 32), f32), np.arange(40, dtype=np.int32)
z, p, short = np.ones((40, 16), f32), np.full((40, 16), 0.01), np.ones((3, 5), f32)
bad_row, table = z.copy(), util.table_of(3.5)
bad_row[7] = np.nan
normal, null = ("normal", "logit", None), ("table", "logprob", table)
each = np.tile(table, (16, 1))
spec = ("bh", (0.3,), 1, 4, 1.0, "sum", 1, null, None)
bad_specs = [("nope", *spec[1:]), ("bh", (0.1, 0.2), *spec[2:]), ("bh", ("x",), *spec[2:]),
             (*spec[:5], "nope", *spec[6:]), (*spec[:2], 9, *spec[3:]), spec[:4], [],
             (*spec[:8], np.ones(3)), (*spec[:7], ("nope", "logit", table), None), (*spec[:7],
             ("table", "logit", each[:3]), None), (*spec[:7], None, None)]
layer, silu = util.Layer(16, 32, 24), util.SWIGLU
pointers, hidden, layer = layer.pointers, layer.hidden(40), layer.layer
made = _C.RouteSpec(spec, "float32", 16)
ids, weights = util.random_slots(40, 3, 16)
bad_ids = np.full_like(ids, 99)
places = _C.tally_layout(16, True)
counts, sums = (np.zeros(max(o + r * c for o, r, c in part.values()), t)
                for part, t in zip(places, (np.int64, float), strict=True))
recency, real = np.full(16, -1, "i"), np.ones(40, bool)
tallied = (counts, sums, recency, ids, z, "float32")

CALLS = {
    "RouteSpec": [(spec, "float32", 16), (spec, "nope", 16), (spec, "float32", 3), (spec,),
                  *[(bad, "float32", 16) for bad in bad_specs]],
    "Layer": [(pointers, "float32", 32, 24, silu), (pointers[:2], "float32", 32, 24, silu),
              (pointers, "nope", 32, 24, silu), (pointers, "float32", 0, 24, silu),
              (pointers * 0, "float32", 32, 24, silu), (p, "float32", 32, 24, silu),
              (pointers, "float32", 32, 24, None), (pointers, "float32", 32, 24, silu[:3]),
              (pointers, "float32", 32, 24, ("silu", -1.0, 1.0, 0.0)), (pointers,)],
    "route": [(z, made, 2, True), (z, made, 2, False), (bad_row, made, 1, True), (z, spec, 1,
              True), (p, made, 1, True), (short, made, 1, True), (z,)],
    "p_values": [(z, null), (z, normal), (bad_row, normal), (z, ("table", "centred", each)),
                 (z, ("nope", "logit", None)), (z, ("table", "logit", p)), (p, normal), ()],
    "experts": [(hidden, ids, weights, layer, 2), (hidden, ids.astype(np.int64), weights, layer,
                1), (hidden, ids, ids, layer, 1), (hidden, bad_ids, weights, layer, 1),
                (hidden, ids, short, layer, 1), (hidden, ids, weights, pointers, 1),
                (z, ids, weights, layer, 1), ()],
    "moe": [(hidden, z, layer, made, 2), (hidden, bad_row, layer, made, 1), (hidden, short, layer,
            made, 1), (hidden, p, layer, made, 1), (hidden, z, layer, spec, 1), (hidden, z, made,
            layer, 1), (hidden, z, layer, _C.RouteSpec(spec, "float16", 16), 1), ()],
    "linear": [(x, index, w, "float32"), (x, index + 99, w, "float32"), (x, index, short,
               "float32"), (x, index, w, "nope"), (x, p, w, "float32"), (x,)],
    "dense": [(x, w.ctypes.data, 24, 0, "float32", 2), (x, 0, 24, 0, "float32", 2),
              (x, w.ctypes.data, 24, 0, "nope", 2), (p, w.ctypes.data, 24, 0, "float32", 1), ()],
    "gemm": [(x, index, w, "float32"), (x, index + 99, w, "float32"), (x, index, short,
             "float32"), (x, index, w, "nope"), (x,)],
    "glu": [(silu, x[0], x[0], "float32"), (silu, None, x[0], "bfloat16"), (silu, x[0], z[0],
            "float32"), (silu, x, x, "float32"), (silu, x[0], x[0], "nope"), (("nope", 1.0, 1.0,
            0.0), x[0], x[0], "float32"), (silu[:2], x[0], x[0], "float32"), (silu, None), ()],
    "softmax": [(z, 1.0), (p, 1.0), (z, "x"), (z,)],
    "logprob": [(z,), (p,), (None,)],
    "order": [(p, z), (None, z), (p, short), (z, z), (p,)],
    "step_up": [(np.full((2, 4096), 0.01), 0.05), (z, 0.05), (p, None), (p,)],
    "limit_cpu": [(None,), ("scalar",), (None,), ("nope",), (3,)],
    "cpu_features": [(), (1,)],
    "variants": [(), (1,)],
    "formats": [(), (1,)],
    "routers": [(), (1,)],
    "threads": [(), (1,)],
    "find_openmp": [(), (1,)],
    "tally_layout": [(16, True), (1, False), (0, True), (2000, True), ("x", True)],
    "tally": [(*tallied, real, ids, 1000, True), (*tallied, None, None, 0, False),
              (*tallied[:3], ids.astype(np.int64), None, "float32", None, None, 5, True),
              (counts, sums, recency, bad_ids, None, "float32", None, None, 5, True),
              (*tallied, None, bad_ids, 5, True), (*tallied, real[:3], None, 5, True),
              (*tallied[:4], short, "float32", real, None, 5, True), (*tallied[:5], "nope", None,
              None, 5, True), (counts[:7], *tallied[1:], None, None, 5, True), ()],
}

def call(function, arguments, times):
    for _ in range(times):
        try:
            function(*arguments)
        except (TypeError, ValueError):
            pass

def references(arguments):
    # arrays and tuples exactly; numbers, strings and None are in other hands too
    inner = [item for a in arguments if isinstance(a, tuple) for item in a]
    kept = [a for a in (*arguments, *inner) if isinstance(a, (_C.RouteSpec, _C.Layer))
            or (isinstance(a, (np.ndarray, tuple)) and len(a))]
    shared = [*arguments, *inner, None, True, False, 1, 2, *map(np.dtype, "fdiIHQ")]
    return [sys.getrefcount(a) for a in kept], [sys.getrefcount(a) for a in shared]

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

bindings = [(module, name) for module in (_C, _kernels) for name in vars(module) if name[0] != "_"]
assert set(CALLS) == {name for _, name in bindings}, "a binding without calls here"
for module, name in bindings:
    function = getattr(module, name)
    for i, arguments in enumerate(CALLS[name]):
        call(function, arguments, 100)
        gc.collect()
        before = references(arguments), sys.getallocatedblocks(), resident()
        call(function, arguments, 1000)
        gc.collect()
        after = references(arguments), sys.getallocatedblocks(), resident()
        assert after[0][0] == before[0][0], f"{name} {i}: {before[0]} -> {after[0]}"
        assert max(np.subtract(after[0][1], before[0][1])) < 500, f"{name} {i}: shared objects"
        assert after[1] - before[1] < 100, f"{name} {i}: {after[1] - before[1]} blocks more"
        assert after[2] - before[2] < 2**20, f"{name} {i}: {after[2] - before[2]} bytes more"
"""


@linux
def test_1000_calls_of_each_binding_leave_nothing_behind():
    util.run_python(LEAKS)


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


def layer(dtype="float32", pointers=POINTERS, size=4, inner=2, activation=util.SWIGLU):
    return _C.Layer(pointers, dtype, size, inner, activation)


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
        "format: expected one of float32 bfloat16 float16, got int4",
    ),
    (lambda: layer(size=0), ValueError, "hidden_size, intermediate_size: expected .* got 0, 2"),
    (lambda: route(F64), TypeError, "router_logits: expected dtype float32, got float64"),
    (lambda: route(F32, "float16"), TypeError, "router_logits: expected dtype uint16, got float32"),
    (lambda: route(F32[0]), ValueError, "router_logits: expected 2 dimensions, got 1"),
    (lambda: route(F32[:, ::2]), ValueError, f"router_logits: expected a {SWAPPED}"),
    (lambda: route(BIG), ValueError, f"router_logits: expected a {SWAPPED}"),
    (lambda: route(util.shifted(F32, 1)), ValueError, f"router_logits: expected a {SWAPPED}"),
    (lambda: route(F32, "float64"), TypeError, "dtype: expected float32, .* got float64"),
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
    (lambda: layer(inner=0), ValueError, "intermediate_size"),
    (lambda: _C.dense(F32[:, :0].copy(), 1, 4, 0, "float32", 1), ValueError, "x: expected"),
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


@every_binding
def test_a_wrong_number_of_arguments(module, name):
    with pytest.raises(TypeError, match="argument"):
        getattr(module, name)(*[None] * 20)


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
