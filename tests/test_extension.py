"""The extensions as Python modules: what they say of themselves, what they load, leaks."""

import ast
import ctypes
import importlib.util
import inspect
import os
import platform
import re
import sys
from pathlib import Path

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
    "avxvnni": {"avx_vnni"},
    "avx512vnni": {"avx512_vnni"},
    "avx512bf16": {"avx512_bf16"},
    "avx512bf16_48k": {"avx512_bf16", "48 KB of L1"},
    "avx512fp16": {"avx512_fp16"},
    "amx": {"amx_tile", "amx_bf16"},
    "amxint8": {"amx_tile", "amx_int8"},
}


def linux_grants_amx():
    """True if this process may use the tiles; to ask twice does no harm."""
    prctl, request, tiles = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(prctl, request, tiles) == 0


def l1_bytes():
    """Of the first core, as Linux tells, "32K"; 0 where it doesn't."""
    cache = Path("/sys/devices/system/cpu/cpu0/cache/index0")
    if not cache.exists():
        return 0
    assert [(cache / name).read_text().strip() for name in ("level", "type")] == ["1", "Data"]
    return int((cache / "size").read_text().strip().removesuffix("K")) << 10


@pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="needs Linux on x86-64"
)
def test_features_are_those_of_proc_cpuinfo():
    text = Path("/proc/cpuinfo").read_text()
    flags = set(re.search(r"^flags\s*:(.*)$", text, re.M)[1].split())
    if l1_bytes() >= 48 << 10:
        flags.add("48 KB of L1")
    expected = [name for name, needed in FLAGS.items() if needed <= flags]
    if "avx2" not in expected:
        expected = []
    if "avx512" not in expected:
        expected = [name for name in expected if name in ("avx2", "avxvnni")]
    if not linux_grants_amx():
        expected = [name for name in expected if not name.startswith("amx")]
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
            print(sorted({variant for _, variant, _, used in module.variants() if used}))"""
    assert util.run_python(code, MOEPROF_CPU="scalar").stdout.split() == ["['scalar']"] * 2
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
layer, silu, f32 = util.Layer(16, 32, 24), util.SWIGLU, ("float32", "float32")
pointers, hidden, layer = layer.pointers, layer.hidden(40), layer.layer
made = _C.RouteSpec(spec, "float32", 16)
coded = _C.encode(w, "float32", "q8", 1)
ids, weights = util.random_slots(40, 3, 16)
bad_ids = np.full_like(ids, 99)
held = {"a": x, "c": z}
places = _C.tally_layout(16, True)
counts, sums = (np.zeros(max(o + r * c for o, r, c in part.values()), t)
                for part, t in zip(places, (np.int64, float), strict=True))
recency, real = np.full(16, -1, "i"), np.ones(40, bool)
tallied = (counts, sums, recency, ids, z, "float32")

CALLS = {
    "RouteSpec": [(spec, "float32", 16), (spec, "nope", 16), (spec, "float32", 3), (spec,),
                  *[(bad, "float32", 16) for bad in bad_specs]],
    "Layer": [(pointers, *f32, 32, 24, silu, "rows"), (np.tile(pointers, (2, 1)), *f32,
              32, 24, silu, "interleaved"), (pointers[:2], *f32, 32, 24, silu, "rows"),
              (pointers, "nope", "float32", 32, 24, silu, "rows"), (pointers, *f32, 0, 24, silu,
              "rows"), (pointers, "float32", "nope", 32, 24, silu, "rows"),
              (pointers, "float32", "float16", 32, 24, silu, "rows"),
              (pointers, "q8", "float16", 32, 24, silu, "rows"),
              (pointers, "q8", "float16", 32, 24, silu, "transposed"),
              (pointers * 0, *f32, 32, 24, silu, "rows"), (p, *f32, 32, 24, silu, "rows"),
              (pointers, *f32, 32, 24, None, "rows"), (pointers, *f32, 32, 24, silu[:3],
              "rows"), (pointers, *f32, 32, 24, ("silu", -1.0, 1.0, 0.0), "rows"),
              (pointers, *f32, 32, 24, silu, "nope"), (pointers,)],
    "Watch": [([(held, "a"), (held, "b")], [held], [layer, x]), ([(held, [])], [held], []),
              ([(held, "a"), (1, 2)], [], []), ([], [held, x], []), ([], [], x), ([(held,)], [],
              []), ([], [])],
    "route": [(z, made, 2, True), (z, made, 2, False), (bad_row, made, 1, True), (z, spec, 1,
              True), (p, made, 1, True), (short, made, 1, True), (z,)],
    "choice_logits": [(z, made), (bad_row, made), (z, spec), (z[:, :3], made), (1, 2)],
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
    "dense": [(x, w.ctypes.data, 24, 0, *f32, 2), (x, 0, 24, 0, *f32, 2),
              (x, w.ctypes.data, 24, 0, "nope", "float32", 2), (p, w.ctypes.data, 24, 0, *f32, 1),
              (x, coded.ctypes.data, 24, 0, "q8", "float32", 2), ()],
    "encode": [(w, "float32", "q8", 2), (w.T, "float32", "q4", 1), (w, "float16", "q8", 1),
               (w * np.nan, "float32", "q4", 1), (w, "float32", "float32", 1), (w[0], "float32",
               "q8", 1), (w[:0], "float32", "q8", 1), (None, "float32", "q8", 1), ()],
    "decode": [(coded, 24, 32, "q8"), (coded, 24, 32, "q4"), (coded, 0, 32, "q8"), (p, 24, 32,
               "q8"), (coded, 24, 32, "nope"), ()],
    "quantize": [(x,), (p,), (None,)],
    "gemm": [(x, index, w, "float32"), (x, index + 99, w, "float32"), (x, index, short,
             "float32"), (x, index, w, "nope"), (x,)],
    "transposed": [(x, index, w.T.copy(), 0, 24, "float32"), (x, index + 99, w.T.copy(), 0, 24,
                   "float32"), (x, index, w.T.copy(), 9, 24, "float32"), (x, index, short, 0, 5,
                   "float32"), (x, index, w.T.copy(), 0, 24, "nope"), (x,)],
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


@every_binding
def test_a_wrong_number_of_arguments(module, name):
    with pytest.raises(TypeError, match="argument"):
        getattr(module, name)(*[None] * 20)
