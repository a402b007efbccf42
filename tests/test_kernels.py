"""The kernels, in two steps: scalar against NumPy float64, every other variant against scalar.

Which kernels and variants there are is asked of the extension: a new variant needs no edit here.
"""

import signal
import sys
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache, partial

import numpy as np
import pytest
import util
from commands import forks
from util import EPS32, EPS64, TINY32, narrow, widen

from moeprof import _C, _kernels
from moeprof.null import normal_reference

pytestmark = pytest.mark.once

# Those of weights in 8 and 4 bits are in test_quantized_kernels.py.
VARIANTS = [
    (kernel, variant)
    for kernel, variant, _, _ in _C.variants()
    if not kernel.startswith(("linear_q", "quantize", "encode_"))
]
KERNELS = list(dict.fromkeys(kernel for kernel, _ in VARIANTS))
CONTRACTS = ("linear", "gemm", "transposed")  # of the products with weights
DTYPE = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}  # of the weights
MATRIX_VARIANTS = [
    kv for kv in VARIANTS if kv[0].startswith(("linear_", "pack_", "gemm_", "transposed_"))
]
all_variants = pytest.mark.parametrize(("kernel", "variant"), VARIANTS)
matrix_variants = pytest.mark.parametrize(("kernel", "variant"), MATRIX_VARIANTS)
posix = pytest.mark.skipif(sys.platform != "linux", reason="mprotect and /proc are Linux's")


@pytest.fixture(autouse=True)
def every_kernel_again():
    yield
    util.restore_cpu()


# ---- a case: what is computed, what it should be, and how near ----


@dataclass
class Case:
    what: str
    run: object  # () -> array
    ref: np.ndarray  # float64
    tol: np.ndarray | float = 0.0
    scalar: np.ndarray | None = None  # what the scalar kernel gave, once it ran


def hold(kernel, variant, cases):
    """scalar to the float64 reference, any other variant to scalar; returns its results."""
    util.force(kernel, "scalar")
    for case in cases:
        if case.scalar is None:
            case.scalar = case.run()
    results = [case.scalar for case in cases]
    if variant != "scalar":
        util.force(kernel, variant)
        results = [case.run() for case in cases]
    assert util.in_use()[kernel] == variant
    for case, got in zip(cases, results, strict=True):
        what = f"{kernel} {variant}: {case.what}"
        if variant == "scalar":
            util.assert_close(got, case.ref, case.tol, what)
        else:  # each may be tol away from the exact value
            util.assert_close(got, case.scalar, 2 * np.asarray(case.tol), what)
    return results


# ---- linear, pack and gemm ----


def act_type(dtype):
    """The activations' type: bf16 for bf16 weights, else float32."""
    return "bfloat16" if dtype == "bfloat16" else "float32"


def product_of(contract):
    """(x, index, w (N,K), dtype) -> x[index] w^T by the kernels of a contract."""
    if contract == "transposed":
        return by_columns
    return _kernels.linear if contract == "linear" else _kernels.gemm


def by_columns(x, index, w, dtype):
    """By weights stored transposed; without a copy where w is a view of such."""
    return _kernels.transposed(x, index, np.ascontiguousarray(w.T), 0, len(w), dtype)


def placed(kernel, w, place):
    """w where `place` copies it to, as the kernel reads it."""
    return place(np.ascontiguousarray(w.T)).T if kernel.startswith("transposed_") else place(w)


def matrix_case(kernel, x, index, w, what=""):
    """x[index] w^T in the form the extension takes; pack is seen through its gemm."""
    contract, _, suffix = kernel.rpartition("_")
    dtype = DTYPE[suffix]
    rows = widen(x, act_type(dtype))[index].astype(np.float64)
    run = partial(product_of(contract), x, index, w, dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        return Case(what, run, *util.matmul(rows, widen(w, dtype)))


def matrices(kernel, m, n, k, seed=0):
    """x with more rows than are asked for, a ragged index, and the weights."""
    dtype = DTYPE[kernel.rpartition("_")[2]]
    rng = np.random.default_rng([seed, m, n, k])
    x = narrow(rng.standard_normal((m + 3, k)), act_type(dtype))
    index = rng.integers(0, m + 3, m).astype(np.int32)
    return x, index, narrow(rng.standard_normal((n, k)), dtype)


def random_case(kernel, m, n, k, seed=0):
    return matrix_case(kernel, *matrices(kernel, m, n, k, seed), what=f"M={m} N={n} K={k}")


LANES = range(1, 2 * 16 + 2)
SHAPES = {
    # A third of them: each pair of what n and k leave over of 16 lanes, or of fewer, is there.
    "n and k around the lanes": [(5, n, k) for n in LANES for k in LANES if (n + k) % 3 == 0],
    # Each m with each n, and both with each k.
    "m and n around the tiles": [
        (m, n, (1, 17, 48)[(i + j) % 3])
        for i, m in enumerate(
            (*range(1, 18), 24, 25, 31, 32, 33, 40, 47, 48, 49, 56, 57, 64, 65, 72, 129, 200)
        )
        for j, n in enumerate((1, 16, 17, 63, 64, 65))
    ],
    "whole models": [(m, n, k) for m in (1, 2, 8) for n in (3, 48) for k in (48, 96, 2048)],
}


@cache
def shape_cases(kernel, shapes):
    return [random_case(kernel, *shape) for shape in SHAPES[shapes]]


@matrix_variants
@pytest.mark.parametrize("shapes", SHAPES)
def test_matrix_shapes(kernel, variant, shapes):
    hold(kernel, variant, shape_cases(kernel, shapes))


@cache
def moved_cases(kernel, offset):
    cases = []
    for m, n, k in ((1, 5, 7), (8, 33, 48), (129, 65, 31)):
        x, index, w = matrices(kernel, m, n, k)
        moved = placed(kernel, w, partial(util.shifted, offset=offset))
        cases.append(matrix_case(kernel, x, index, moved, what=f"+{offset} {m, n, k}"))
    return cases


@matrix_variants
@pytest.mark.parametrize("offset", (1, 2, 3))
def test_weights_at_any_address(kernel, variant, offset):
    hold(kernel, variant, moved_cases(kernel, offset))


@lru_cache(maxsize=2)  # both sides of one kernel: a process may have so many guard pages only
def guarded_cases(kernel, side):
    """Half of the pairs of n and k: each k with n and not with n + 16, or the other way round."""
    cases = []
    widths = 1, 2, 7, 8, 15, 16, 17, 31, 32, 33
    pairs = [(n, i) for n in (*LANES, 64, 65) for i in range(10) if (n + n // 16 + i) % 2 == 0]
    for n, k in [(n, widths[i]) for n, i in pairs]:
        x, index, w = matrices(kernel, n % 5 + 1, n, k)
        place = partial(util.guarded, side=side)
        arrays = place(x), place(index), placed(kernel, w, place)
        cases.append(matrix_case(kernel, *arrays, what=f"guarded {side} N={n} K={k}"))
    return cases


@posix
@matrix_variants
@pytest.mark.parametrize("side", ("start", "end"))
def test_nothing_is_read_beyond_the_matrices(kernel, variant, side):
    hold(kernel, variant, guarded_cases(kernel, side))


@posix
@pytest.mark.parametrize("beyond", (-1, 64))
def test_a_guard_page_kills(beyond):
    code = f"""if True:
        import ctypes, numpy as np, util
        array = util.guarded(np.zeros(64, np.uint8), {"start" if beyond < 0 else "end"!r})
        ctypes.string_at(array.ctypes.data + {beyond}, 1)"""
    assert util.run_python(code, check=False).returncode == -signal.SIGSEGV


@cache
def nan_and_inf_cases(kernel):
    cases = []
    for k in (1, 8, 17, 48):
        x, _, w = matrices(kernel, 9, 7, k)
        index, dtype = np.arange(9, dtype=np.int32), DTYPE[kernel.rpartition("_")[2]]
        wide_x, wide_w = widen(x, act_type(dtype)).copy(), widen(w, dtype).copy()
        wide_x[1, k // 2], wide_x[2, 0], wide_x[3, k - 1] = np.nan, np.inf, -np.inf
        wide_x[4, 0], wide_x[4, k - 1] = np.inf, -np.inf
        wide_x[5] = 0  # 0 * inf is NaN
        wide_w[3, k // 2], wide_w[4, 0], wide_w[5, k - 1] = np.nan, np.inf, -np.inf
        x, w = narrow(wide_x, act_type(dtype)), narrow(wide_w, dtype)
        cases.append(matrix_case(kernel, x, index, w, what=f"K={k}"))
    return cases


@matrix_variants
def test_nan_and_inf_go_where_ieee_sends_them(kernel, variant):
    cases = nan_and_inf_cases(kernel)
    for case, got in zip(cases, hold(kernel, variant, cases), strict=True):
        clean = np.ix_([0, 6, 7, 8], [0, 1, 2, 6])
        assert np.isfinite(got[clean]).all(), case.what
        assert np.isnan(got[1]).all() and np.isnan(got[:, 3]).all(), case.what


@pytest.mark.parametrize(
    ("kernel", "variant"),  # OpenBLAS chooses its kernels by the number of rows
    [kv for kv in MATRIX_VARIANTS if kv[1] != "openblas"],
)
def test_a_row_alone_is_a_row_in_a_batch(kernel, variant):
    """Bit for bit: what is summed in which order depends on K alone, in AVX-512's gemm also on
    whether the rows are more than a panel of 16."""
    x, index, w = matrices(kernel, 80, 19, 100)
    util.force(kernel, variant)
    contract, _, suffix = kernel.rpartition("_")
    dtype, product = DTYPE[suffix], product_of(contract)
    batches = ((1, 2, 5, 8, 9, 16), (17, 24, 32, 33, 48, 63, 80))
    by_panels = contract in ("pack", "gemm") and variant.startswith("avx512")
    for counts in batches if by_panels else [sum(batches, ())]:
        together = product(x, index[: counts[-1]], w, dtype)
        for rows in counts:
            np.testing.assert_array_equal(product(x, index[:rows], w, dtype), together[:rows])
            part = np.ascontiguousarray(w[: rows % 19 + 1])
            np.testing.assert_array_equal(
                product(x, index[:rows], part, dtype), together[:rows, : len(part)]
            )


@pytest.mark.parametrize(
    ("kernel", "variant"), [kv for kv in MATRIX_VARIANTS if kv[0].endswith(("_bf16", "_f16"))]
)
def test_each_16_bit_pattern_is_widened_as_it_is(kernel, variant):
    contract, _, suffix = kernel.rpartition("_")
    dtype, product = DTYPE[suffix], product_of(contract)
    every = np.arange(65536, dtype=np.uint16)[:, None]
    one = narrow(np.ones((1, 1)), act_type(dtype))
    exact = 0.0 if variant == "scalar" or dtype == "float16" else TINY32  # see util.matmul
    rows, none = np.arange(65536, dtype=np.int32), np.zeros(1, np.int32)
    with np.errstate(invalid="ignore"):  # signalling NaN
        value = widen(every, dtype).astype(np.float64)
    cases = [Case("weights", partial(product, one, none, every, dtype), value.T, exact)]
    if dtype == "bfloat16":
        run = partial(product, every, rows, one, dtype)
        cases.append(Case("activations", run, value, exact))
    hold(kernel, variant, cases)


@pytest.mark.parametrize(
    ("kernel", "variant"), [kv for kv in MATRIX_VARIANTS if kv[0].startswith("transposed_")]
)
def test_columns_of_a_wider_matrix(kernel, variant):
    """Bit for bit as by themselves, whatever stands beside them."""
    x, index, w = matrices(kernel, 7, 90, 33)
    dtype = DTYPE[kernel.rpartition("_")[2]]
    util.force(kernel, variant)
    for first, n in ((0, 90), (0, 64), (3, 65), (17, 1), (90, 0)):
        alone = _kernels.transposed(x, index, w[first : first + n].T.copy(), 0, n, dtype)
        beside = _kernels.transposed(x, index, w.T.copy(), first, n, dtype)
        np.testing.assert_array_equal(beside, alone)


# ---- glu ----


def glu_cases(kernel):
    dtype = act_type(DTYPE[kernel.rpartition("_")[2]])
    rng, edges = np.random.default_rng(0), [0, -0.0, 1e-30, 20, 87, 88, 89, 104, 150, 1e30, 3e38]
    around = np.array([*edges, *np.linspace(0, 110, 4001), *np.linspace(0, 16, 2001), np.inf])
    g = np.concatenate([around, -around, [np.nan]]).astype(np.float32)
    inputs = [(f"N={n}", *rng.standard_normal((2, n)).astype(np.float32)) for n in LANES]
    inputs += [("edges", g, u) for u in (np.ones_like(g), np.full_like(g, -0.37), g[::-1].copy())]
    for name, (activation, gated) in util.ACTIVATIONS.items():
        for what, g, u in inputs if gated else [(what, None, g) for what, g, _ in inputs]:
            with np.errstate(over="ignore", invalid="ignore"):
                ref, tol = util.glu(activation, *[(x, 0.0) for x in (g, u) if x is not None])
                if dtype == "bfloat16":
                    tol = tol + util.HALF_ULP["bfloat16"] * (np.abs(ref) + tol)
                # what float32 can't hold is inf
                ref = np.where(np.abs(ref) < 3.4e38, ref, np.sign(ref) * np.inf)
            run = partial(_kernels.glu, activation, g, u, dtype)
            tol = np.nan_to_num(tol, posinf=0)
            yield Case(f"{name} {what}", lambda run=run: widen(run(), dtype), ref, tol)


def bf16_roundings():
    """float32 values on and around every kind of tie."""
    mantissas = 1 + np.arange(128) / 128  # all: even and odd last bits
    steps = np.array([0, 2.0**-8, 2.0**-8 - 2.0**-23, 2.0**-8 + 2.0**-23, 2.0**-9])
    values = (mantissas[:, None] + steps).ravel()
    scales = [1, -1, 2.0**-30, 2.0**60, 2.0**127]  # the last reaches inf
    return np.concatenate([values * scale for scale in scales]).astype(np.float32)


@pytest.mark.parametrize("variant", util.variants_of("glu_bf16"))
def test_act_is_rounded_once_to_nearest_even(variant):
    u = bf16_roundings() / 128
    g = np.full_like(u, 128.0)  # silu(128) is 128 in fp32, and the product exact
    util.force("glu_bf16", variant)
    with np.errstate(over="ignore"):
        expected = narrow(128 * u, "bfloat16")
    np.testing.assert_array_equal(_kernels.glu(util.SWIGLU, g, u, "bfloat16"), expected)


# ---- softmax, logprob, p-values, order, step_up ----

WIDTHS = (*LANES, 48, 60, 64, 65, 128, 256, 1024)


def softmax_cases():
    for experts in WIDTHS:
        z = util.nasty_rows(experts, experts)
        for temperature in (0.125, 1.0, 8.0):
            below = util.below_top(z) / temperature
            ref = util.softmax(below)
            # two roundings of the argument, one of exp, E of the sum
            tol = ref * EPS32 * (experts + 8 + 2 * np.abs(np.maximum(below, -200))) + 2 * TINY32
            run = partial(_kernels.softmax, z, temperature)
            yield Case(f"E={experts} temperature={temperature}", run, ref, tol)


def logprob_tol(score, experts):
    return 4 * EPS64 * (experts + np.abs(np.where(np.isfinite(score), score, 0)))


def logprob_cases():
    for experts in WIDTHS:
        z = util.nasty_rows(experts, experts)
        ref = util.logprob(z)
        yield Case(f"E={experts}", partial(_kernels.logprob, z), ref, logprob_tol(ref, experts))


def p_table_cases():
    around = np.concatenate([[x - 1e-6, x, x + 1e-6] for x in (-32, -1, 0, 3.5, 31.9921875, 32)])
    edges = np.append(around, [-1e9, 1e9, 40, 33]).astype(np.float32)[None]
    for x_max in (3.5, 3.501, -5.25, 31.999, 32.0, 40.0):
        table = util.table_of(x_max)
        for experts in (*LANES, 64, 257):
            for score in ("logit", "logprob"):
                z = util.nasty_rows(experts, experts) * np.float32(1 / 3)
                yield p_table_case(z, score, table, f"x_max={x_max} E={experts}")
        yield p_table_case(edges, "logit", table, f"x_max={x_max} at the edges")


def p_table_case(z, score, table, what):
    s = z.astype(np.float64) if score == "logit" else util.logprob(z)
    off = 0.0 if score == "logit" else logprob_tol(s, z.shape[1])
    ref = util.table_p(s, table)
    # p falls: what an error of the score does lies between p(s + off) and p(s - off); the
    # interpolation rounds relative to the left end of the bin
    tol = 1e-12 * ref + 8 * EPS64 * util.table_p(s - 1 / 128, table)
    tol += util.table_p(s - off, table) - util.table_p(s + off, table)
    return Case(f"{what} {score}", partial(_C.p_values, z, ("table", score, table)), ref, tol)


def p_normal_cases():
    for experts in WIDTHS:
        z = util.nasty_rows(experts, experts)
        ref = normal_reference(z)
        # erfc(x) at the far end: relative error x^2 eps, and x^2 <= -2 ln p
        size = 8 - 8 * np.log(np.maximum(ref, np.finfo(np.float64).tiny))
        run = partial(_C.p_values, z, ("normal", "logit", None))
        yield Case(f"E={experts}", run, ref, EPS64 * ref * size + 1e-320)


def order_cases():
    for experts in WIDTHS:
        z = util.nasty_rows(experts, experts)
        ids = np.broadcast_to(np.arange(experts), z.shape)
        rng = np.random.default_rng(experts)
        by_logit, ties = np.zeros(z.shape), rng.integers(0, 4, z.shape) / 4
        for what, p in (("no p", None), ("ties", ties), ("p", rng.random(z.shape))):
            ref = np.lexsort((ids, -z, by_logit if p is None else p), axis=1)
            yield Case(f"E={experts} {what}", partial(_kernels.order, p, z), ref)


def step_up_rows(experts, alpha, rng):
    """Random p-values, and such at, just below and just above alpha r/E, as doubles go."""
    boundary = np.array([float(Fraction(alpha) * r / experts) for r in range(1, experts + 1)])
    rows = [rng.random(experts), rng.random(experts) * alpha, rng.random(experts) ** 8]
    rows += [np.nextafter(boundary, side) for side in (0, boundary, 1)]
    rows += [np.where(np.arange(experts) == experts // 2, boundary, 1.0), np.zeros(experts)]
    rows += [np.ones(experts), np.full(experts, 5e-324), np.full(experts, alpha)]
    return rng.permuted(np.array(rows), axis=1)


def step_up_cases():
    rng = np.random.default_rng(0)
    for experts in (*range(1, 18), 60, 64, 65, 130):
        for alpha in (5e-324, 0.05, 0.1, 0.25, 0.5, 1 - 2.0**-53):
            rows = step_up_rows(experts, alpha, rng)
            ref = [util.step_up_exact(row, alpha) for row in rows]
            yield Case(f"E={experts} alpha={alpha}", partial(_C.step_up, rows, alpha), ref)


ROW_CASES = {
    "softmax": softmax_cases,
    "logprob": logprob_cases,
    "p_table": p_table_cases,
    "p_normal": p_normal_cases,
    "order": order_cases,
    "step_up": step_up_cases,
}


@cache
def cases_of(kernel):
    if kernel in ROW_CASES:
        return list(ROW_CASES[kernel]())
    if kernel.startswith("glu_"):
        return list(glu_cases(kernel))
    return [random_case(kernel, 8, 33, 48)]  # the shapes have tests of their own


@all_variants
def test_kernel(kernel, variant):
    hold(kernel, variant, cases_of(kernel))


def row_variants(*kernels):
    return pytest.mark.parametrize(
        ("kernel", "variant"), [kv for kv in VARIANTS if kv[0] in (kernels or ROW_CASES)]
    )


@row_variants("order")
def test_order_of_any_number_of_experts(kernel, variant):
    """p that falls with the logit, in steps; the same with two experts exchanged; any p."""
    util.force(kernel, variant)
    for experts in (
        *range(1, 131),
        *range(137, 1020, 7),
        *range(254, 259),
        *range(510, 515),
        *range(1020, 1026),
        3000,
    ):
        rng = np.random.default_rng(experts)
        z = rng.integers(-experts, experts, (3, experts)).astype(np.float32) / 8
        p = np.exp(-np.floor(z.astype(np.float64) / experts))
        a, b = rng.integers(0, experts, 2)
        p[1, [a, b]] = p[1, [b, a]]
        p[2] = rng.random(experts)
        ids = np.broadcast_to(np.arange(experts), z.shape)
        for p_or_none, first in ((None, np.zeros(z.shape)), (p, p)):
            expected = np.lexsort((ids, -z, first), axis=1)
            np.testing.assert_array_equal(_kernels.order(p_or_none, z), expected, f"E={experts}")


@posix
@row_variants()
@pytest.mark.parametrize("side", ("start", "end"))
def test_nothing_is_read_beyond_the_rows(kernel, variant, side):
    util.force(kernel, variant)
    place = partial(util.guarded, side=side)
    run = {
        "softmax": lambda z, p: _kernels.softmax(z, 1.0),
        "logprob": lambda z, p: _kernels.logprob(z),
        "p_table": lambda z, p: _C.p_values(z, ("table", "logit", place(util.table_of(32.0)))),
        "p_normal": lambda z, p: _C.p_values(z, ("normal", "logit", None)),
        "order": lambda z, p: _kernels.order(p, z),
        "step_up": lambda z, p: _C.step_up(p, 0.5),
    }[kernel]
    for experts in (*LANES, 64, 65, 257):
        z = util.nasty_rows(experts)[-3:]
        p = np.random.default_rng(0).random(z.shape)
        np.testing.assert_array_equal(run(place(z), place(p)), run(z, p))


@pytest.mark.parametrize("kernel", KERNELS)
def test_zeros_do_not_pass(kernel):
    rejected = 0
    for case in cases_of(kernel):
        try:
            util.assert_close(np.zeros(np.shape(case.ref)), case.ref, 2 * np.asarray(case.tol))
        except AssertionError:
            rejected += 1
    assert rejected > 0.6 * len(cases_of(kernel))


@pytest.mark.parametrize("change", (np.nan, np.inf, 1e-3))
def test_the_checker_sees_one_wrong_value(change):
    ref = np.linspace(1, 2, 50)
    wrong = ref.copy()
    wrong[17] += change
    with pytest.raises(AssertionError):
        util.assert_close(wrong, ref, 1e-4)


# ---- which variant runs ----


def test_every_format_has_its_kernels():
    """Scalar first: else a pointer in the table of kernels would be empty."""
    formats = {name: text for text, (name, *_) in _kernels.formats().items()}
    assert {name: text for name, text in formats.items() if name in DTYPE} == DTYPE
    expected = {f"{kind}_{name}" for kind in CONTRACTS for name in DTYPE}
    expected |= {f"linear_{name}" for name in formats}  # others are quantised
    kernels = {kernel for kernel, *_ in _C.variants()}
    assert {k for k in kernels if k.partition("_")[0] in CONTRACTS} == expected
    for kernel in expected:
        assert util.variants_of(kernel)[0] == "scalar", kernel


@pytest.mark.parametrize("level", util.level_names())
@pytest.mark.parametrize("kernel", [k for k in KERNELS if k.startswith("gemm_")])
def test_a_gemm_reads_the_panels_that_pack_makes_at_its_level(kernel, level):
    util.force_level(level)
    case = random_case(kernel, 20, 33, 48)
    util.assert_close(case.run(), case.ref, case.tol, f"{kernel} at {level}")


def test_levels_only_ever_add_variants():
    """Each level chooses one variant of each kernel, no worse than the level below did."""
    at = [-1] * len(KERNELS)
    for level in util.level_names():
        util.limit_cpu(level)
        chosen = [[line for line in _C.variants() if line[0] == k and line[3]] for k in KERNELS]
        assert all(len(lines) == 1 and lines[0][2] for lines in chosen), level
        now = [util.variants_of(lines[0][0]).index(lines[0][1]) for lines in chosen]
        assert all(b >= a for a, b in zip(at, now, strict=True)), level
        at = now
    util.limit_cpu("scalar")
    assert set(util.in_use().values()) == {"scalar"}
    util.limit_cpu(None)
    for kernel, variant in util.in_use().items():
        assert variant == [v for k, v, usable, _ in _C.variants() if k == kernel and usable][-1]


def test_levels_are_the_features_in_order():
    names = util.level_names()
    assert names[:3] == ["scalar", "openblas", "avx2"] and names[-1] == "amxint8"
    assert [n for n in names if n in _C.cpu_features()] == _C.cpu_features()


@pytest.fixture(scope="module")
def bare():
    """Forks of a process that has imported NumPy, and not moeprof."""
    with forks("import numpy") as started:
        yield started


@pytest.mark.parametrize("level", util.level_names())
def test_moeprof_cpu_caps_at_import(bare, level):
    code = "import moeprof; print(sorted(moeprof.cpu_info()['kernels'].items()))"
    printed = bare.run(f"import os; os.environ['MOEPROF_CPU'] = {level!r}; {code}").stdout
    util.limit_cpu(level)
    assert printed.strip() == str(sorted(util.in_use().items()))


def test_unknown_moeprof_cpu_is_an_error():
    done = util.run_python("import moeprof", check=False, MOEPROF_CPU="avx1024")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("ValueError: MOEPROF_CPU")
    assert "avx1024" in last and all(name in last for name in util.level_names())


def test_limit_cpu_wants_a_name():
    with pytest.raises(TypeError):
        _C.limit_cpu(3)
    with pytest.raises(ValueError, match="MOEPROF_CPU: expected scalar, openblas, avx2.*got AVX2"):
        _C.limit_cpu("AVX2")


# ---- routing ----


def test_mass_is_of_the_largest_logits_where_p_goes_another_way():
    """A null whose p rises with the score: no fit gives one, but a table can."""
    table = util.table_of(32.0, p_max=1.0)
    table[3:] = np.linspace(0.01, 1, 8193)
    z = np.random.default_rng(0).permuted(np.tile(np.arange(32) / 8, (20, 1)), axis=1)
    spec = ("bh", (0.05,), 3, 3, 1.0, "mass", 4, ("table", "logit", table), None)
    weights, experts, *_ = util.route(z.astype(np.float32), "float32", spec, 1, False)
    np.testing.assert_array_equal(experts, np.argsort(z, axis=1)[:, :3])
    top = np.sort(util.softmax(z), axis=1)[:, -4:].sum(axis=1)
    np.testing.assert_allclose(weights.sum(axis=1), top, rtol=1e-5)
