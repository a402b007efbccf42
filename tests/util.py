"""Shared by the tests of the C core: forced kernels, 16-bit floats, nasty rows, guard pages.

No torch here: these also run in processes that have NumPy alone.
"""

import ctypes
import math
import mmap
import os
import re
import subprocess
import sys
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np

from moeprof import _C, _kernels

EPS32, TINY32 = float(np.finfo(np.float32).eps), float(np.finfo(np.float32).tiny)
EPS64 = float(np.finfo(np.float64).eps)
DTYPES = ("float32", "bfloat16", "float16")
# largest relative error of one rounding to the dtype
HALF_ULP = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}


# ---- comparing ----


def assert_close(got, ref, tol, what=""):
    """|got - ref| <= tol; NaN where ref is NaN, the same infinities."""
    got, ref = np.asarray(got, np.float64), np.asarray(ref, np.float64)
    assert got.shape == ref.shape, what
    np.testing.assert_array_equal(np.isnan(got), np.isnan(ref), err_msg=f"NaN {what}")
    same = (got == ref) | np.isnan(ref)
    error = np.abs(np.subtract(got, ref, out=np.zeros_like(ref), where=~same))
    excess = np.where(same, 0, error - tol)
    worst = np.unravel_index(excess.argmax(), excess.shape) if excess.size else None
    assert worst is None or excess[worst] <= 0, (
        f"{what}: at {worst} got {got[worst]}, expected {ref[worst]} "
        f"within {np.broadcast_to(tol, ref.shape)[worst]}"
    )


# ---- kernels, forced ----


def level_names():
    """The levels of MOEPROF_CPU, poorest first, as its error message lists them."""
    try:
        _C.limit_cpu("no such level")
    except ValueError as error:
        listed = re.search(r"expected (.*), got", str(error))[1]
        return re.findall(r"\w+", listed.replace(" or ", " "))
    raise AssertionError("limit_cpu took an unknown name")


def variants_of(kernel):
    return [variant for name, variant, _, _ in _C.variants() if name == kernel]


def in_use():
    return {kernel: variant for kernel, variant, _, used in _C.variants() if used}


def limit_cpu(level):
    """In both extensions."""
    _C.limit_cpu(level)
    _kernels.limit_cpu(level)
    assert _C.variants() == _kernels.variants()


def restore_cpu():
    limit_cpu(os.environ.get("MOEPROF_CPU") or None)


def force(kernel, variant):
    """Makes a variant the one in use, or skips, naming the feature that the CPU lacks."""
    import pytest

    usable = {(k, v): has for k, v, has, _ in _C.variants()}[kernel, variant]
    if not usable:
        pytest.skip(f"{kernel}: this CPU lacks {variant} (it has {_C.cpu_features()})")
    for level in level_names():
        limit_cpu(level)
        if in_use()[kernel] == variant:
            return
    pytest.fail(
        f"{kernel}: no level of MOEPROF_CPU selects {variant}, which this CPU has. "
        "Does a later line of csrc/kernels.def need the same features?"
    )


def force_level(level):
    """limit_cpu(level), or skips, naming the level that the CPU lacks."""
    import pytest

    if level not in ("scalar", "openblas", *_C.cpu_features()):
        pytest.skip(f"this CPU lacks {level} (it has {_C.cpu_features()})")
    limit_cpu(level)


# ---- 16-bit floats, which travel as uint16 ----


def bf16_from_f32(values):
    """Round to nearest, ties to even; NaN quiet."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    kept, rest = bits >> 16, bits & 0xFFFF
    up = (rest > 0x8000) | ((rest == 0x8000) & (kept % 2 == 1))
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(nan, kept | 0x40, kept + up).astype(np.uint16)


def narrow(values, dtype):
    """float values in the form that the extension takes for `dtype`."""
    values = np.ascontiguousarray(values, np.float32)
    if dtype == "bfloat16":
        return bf16_from_f32(values)
    with np.errstate(over="ignore"):
        return values.astype(np.float16).view(np.uint16) if dtype == "float16" else values


def widen(array, dtype):
    """The float32 values of what `narrow` gives."""
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.view(np.float16).astype(np.float32) if dtype == "float16" else array


# ---- oracles ----

EDGES = -32 + np.arange(8192) / 128  # of the bins of a table


def below_top(z):
    """z less its row's maximum, float64; 0 where it is the maximum, also at +inf."""
    z = np.asarray(z, np.float64)
    top = z.max(axis=-1, keepdims=True)
    return np.subtract(z, top, out=np.zeros_like(z), where=z != top)


def softmax(z):
    """Over the last axis, float64; several +inf share equally."""
    below = below_top(z)
    return np.exp(below) / np.exp(below).sum(axis=-1, keepdims=True)


def logprob(z):
    below = below_top(z)
    return below - np.log(np.exp(below).sum(axis=-1, keepdims=True))


def table_of(x_max, p_max=1e-3, beta=0.3):
    """A table of the form of LayerNull.table, its survival function a straight line."""
    edges = -32 + np.arange(8193) / 128
    line = np.clip((x_max - edges) / (x_max + 32), 0, 1)
    return np.concatenate([[x_max, p_max, beta], p_max + (1 - p_max) * line])


def table_p(s, table):
    """The rule of moeprof/null.py by np.interp: independent of it and of the kernel."""
    x_max, p_max, beta = table[:3]
    seen = np.searchsorted(EDGES, x_max)  # those below it
    x, y = np.append(EDGES[:seen], x_max), np.append(table[3 : 3 + seen], p_max)
    beyond = np.where(s > x_max, s - x_max, 0)
    tail = np.maximum(p_max * np.exp(-beyond / beta), np.finfo(np.float64).tiny)
    return np.where(s <= -32, 1.0, np.where(s > x_max, tail, np.interp(s, x, y)))


def step_up_exact(row, alpha):
    """max{r : p_(r) E <= alpha r} in exact fractions."""
    ordered, alpha = sorted(map(Fraction, row.tolist())), Fraction(alpha)
    holds = [p * len(ordered) <= alpha * r for r, p in enumerate(ordered, 1)]
    return len(ordered) - holds[::-1].index(True) if any(holds) else 0


# ---- inputs ----


def nasty_rows(experts, seed=0):
    """(T,E) float32 logits that have broken routers: ties, infinities, extremes; no NaN."""
    rng = np.random.default_rng(seed)
    inf, ids = np.inf, np.arange(experts)
    normal = rng.standard_normal((4, experts))
    rows = [
        *normal,
        *30 * normal,
        *np.round(normal),  # the last are full of ties
        ids,
        -ids,
        ids % 3,
        np.zeros(experts),
        np.full(experts, -7.5),
        np.full(experts, inf),
        np.where(ids == experts // 2, inf, normal[0]),
        np.where(ids % 3 == 0, inf, normal[1]),
        np.where(ids % 2 == 1, -inf, normal[2]),
        np.where(ids == experts - 1, 0.5, -inf),
        np.where(ids % 3 == 0, inf, np.where(ids % 3 == 1, -inf, normal[3])),
        np.where(ids % 2 == 1, -3e38, 3e38),
        ids * 1e-42,
        np.where(ids % 2 == 1, -0.0, 0.0),
    ]
    return np.array(rows).astype(np.float32)


def guarded(array, side):
    """A copy directly behind ("start") or before ("end") a page that no one may touch."""
    page = mmap.PAGESIZE
    inner = max(1, -(-array.nbytes // page)) * page
    memory = mmap.mmap(-1, inner + 2 * page)
    base = np.frombuffer(memory, np.uint8).ctypes.data
    for at in (base, base + page + inner):
        if _mprotect()(at, page, 0):  # PROT_NONE
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = page if side == "start" else page + inner - array.nbytes
    copy = np.frombuffer(memory, array.dtype, array.size, offset).reshape(array.shape)
    copy[...] = array
    return copy


@cache
def _mprotect():
    function = ctypes.CDLL(None, use_errno=True).mprotect
    function.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return function


def shifted(array, offset):
    """A copy that starts `offset` bytes behind an aligned address."""
    memory = np.zeros(array.nbytes + 64 + offset, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    copy = np.frombuffer(memory, array.dtype, array.size, start).reshape(array.shape)
    copy[...] = array
    return copy


SWIGLU = ("silu", 1.0, np.inf, 0.0)
# What experts compute between their matrices: (name, alpha, limit, shift), and have they a gate?
ACTIVATIONS = {
    "SwiGLU": (SWIGLU, True),
    "silu, its alpha, limits and a shift": (("silu", 1.702, 0.75, 1.0), True),
    "silu with limits": (("silu", 1.0, 1.5, 0.0), True),
    "gelu": (("gelu", 1.0, np.inf, 0.0), True),
    "gelu with limits and a shift": (("gelu", 1.0, 0.5, -0.25), True),
    "gelu_tanh": (("gelu_tanh", 1.0, np.inf, 0.0), True),
    "relu": (("relu", 1.0, np.inf, 0.0), True),
    "relu2": (("relu2", 1.0, np.inf, 0.0), True),
    "relu2 without gate": (("relu2", 1.0, np.inf, 0.0), False),
    "relu without gate": (("relu", 1.0, np.inf, 0.0), False),
    "gelu without gate": (("gelu", 1.0, np.inf, 0.0), False),
    "gelu_tanh without gate": (("gelu_tanh", 1.0, np.inf, 0.0), False),
    "silu without gate, its alpha": (("silu", 1.702, np.inf, 0.0), False),
}


class Layer:
    """Random experts of one layer: gate (unless there is none), up (E,I,H), down (E,H,I), and
    `biases` for each of them if `biased`.

    They are stored as `storage` says; `place` copies what is stored together to where it should
    lie.
    """

    def __init__(
        self,
        experts,
        hidden,
        inner,
        dtype="float32",
        *,
        seed=0,
        place=np.array,
        activation=SWIGLU,
        gated=True,
        storage="rows",
        biased=False,
    ):
        rng = np.random.default_rng(seed)
        self.shape, self.dtype, self.activation = (experts, hidden, inner), dtype, activation
        shapes = [*[(inner, hidden)] * (2 if gated else 1), (hidden, inner)]
        kinds = [[], []]  # what each expert has: matrices, biases
        for _ in range(experts):
            matrices = [narrow(rng.standard_normal(s) / np.sqrt(s[1]), dtype) for s in shapes]
            biases = [narrow(rng.standard_normal(s[0]), dtype) for s in shapes]
            for own, (*into, down) in zip(kinds, (matrices, biases), strict=True):
                own.append([*_stored(into, storage, place), *_stored([down], storage, place)])
        self.matrices, self.biases = (
            [list(kind) for kind in zip(*own, strict=True)] for own in kinds
        )
        if not biased:
            self.biases = []
        self.pointers = np.array(
            [[m.ctypes.data for m in kind] for kind in (*self.matrices, *self.biases)], np.uint64
        ).reshape(-1, experts)
        self.layer = _C.Layer(self.pointers, dtype, dtype, hidden, inner, activation, storage)

    def hidden(self, tokens, seed=1):
        values = np.random.default_rng(seed).standard_normal((tokens, self.shape[1]))
        return narrow(values, self.dtype)

    def __call__(self, hidden, experts, weights, threads=1):
        return _C.experts(hidden, experts, weights, self.layer, threads)

    def moe(self, hidden, logits, spec, threads=1):
        return moe(hidden, logits, self.layer, spec, threads, self.dtype)

    def reference(self, hidden, experts, weights):
        """The output in float64, and how far fp32 sums and one rounding may be from it."""
        x = widen(hidden, self.dtype).astype(np.float64)
        out, tol = np.zeros_like(x), np.zeros_like(x)
        for e in range(self.shape[0]):
            *into, down = (widen(kind[e], self.dtype) for kind in self.matrices)
            biases = [widen(kind[e], self.dtype) for kind in self.biases] or [0.0] * 3
            rows, slots = np.nonzero(experts == e)
            products = [
                plus(*matmul(x[rows], w), bias) for w, bias in zip(into, biases, strict=False)
            ]
            act, act_tol = glu(self.activation, *products)
            if self.dtype == "bfloat16":
                act_tol = act_tol + HALF_ULP["bfloat16"] * (np.abs(act) + act_tol)
            y, y_tol = plus(*matmul(act, down, act_tol), biases[-1])
            w = weights[rows, slots].astype(np.float64)[:, None]
            np.add.at(out, rows, w * y)
            margin = (experts.shape[1] + 1) * EPS32 * np.abs(w * y)
            np.add.at(tol, rows, np.abs(w) * y_tol + margin)
        rounding = HALF_ULP[self.dtype] * (np.abs(out) + tol)
        return out, tol + rounding + (2.0**-25 if self.dtype == "float16" else TINY32)


def _stored(parts, storage, place):
    """Copies of arrays (N,K) or (N,) that lie beside each other as the storage says: views."""
    if storage == "rows":
        return [place(part) for part in parts]
    columns = [part.T for part in parts]
    if storage == "transposed":
        joined = place(np.ascontiguousarray(np.concatenate(columns, axis=-1)))
        n = len(parts[0])
        cuts = [slice(first * n, (first + 1) * n) for first in range(len(parts))]
    else:
        stacked = np.stack(columns, axis=-1)
        joined = place(np.ascontiguousarray(stacked.reshape(*stacked.shape[:-2], -1)))
        cuts = [slice(first, None, len(parts)) for first in range(len(parts))]
    return [joined[..., cut].T for cut in cuts]


def plus(y, tol, bias):
    """y + bias in fp32."""
    y = y + bias
    return y, tol + EPS32 * (np.abs(y) + tol)


def route(logits, dtype, spec, threads, want_p):
    """_C.route of the tuple that Router.spec() gives, for as many experts as the logits have."""
    return _C.route(logits, _C.RouteSpec(spec, dtype, logits.shape[1]), threads, want_p)


def moe(hidden, logits, layer, spec, threads, dtype="float32"):
    """_C.moe of such a tuple."""
    spec = _C.RouteSpec(spec, dtype, logits.shape[1])
    return _C.moe(hidden, logits, layer, spec, threads)


def matmul(x, w, x_tol=0.0):
    """x w^T in float64 and the contract's bound (kernels.h): eps32 K sum|x w|."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    # Instructions for bf16 dot products take subnormal numbers for 0.
    subnormal = TINY32 * (1 + np.abs(x).sum(axis=1)[:, None] + np.abs(w).sum(axis=1))
    size = (np.abs(x) + x_tol) @ np.abs(w).T
    carried = (np.zeros_like(x) + x_tol) @ np.abs(w).T
    return x @ w.T, EPS32 * w.shape[1] * size + carried + subnormal


erfc = np.vectorize(math.erfc, otypes=[float])


def function(name, alpha, x):
    """f(x) in float64, the bound of f(x) * 1 (kernels.h), and one for the slope."""
    x = np.asarray(x, np.float64)
    if name.startswith("relu"):
        f = np.where(x <= 0, 0, x)
        f, slope = (f * f, 2 * np.abs(x)) if name == "relu2" else (f, np.ones_like(x))
        return f, EPS32 * f, slope
    with np.errstate(over="ignore", invalid="ignore"):
        if name == "gelu":
            f, relative = 0.5 * x * erfc(-x * np.sqrt(0.5)), 8.0
        else:
            tanh = name == "gelu_tanh"
            z = np.sqrt(8 / np.pi) * (x + 0.044715 * x**3) if tanh else alpha * x
            f = x / (1 + np.exp(-z))
            relative = 4 + (2 * np.maximum(-z, 0) if tanh or alpha != 1 else 0)
        tol = np.where(f == 0, 0, relative * EPS32 * np.abs(f)) + 2.0**-121 / alpha
    return f, tol, np.full_like(x, 1.13)


def glu(activation, *products):
    """What experts compute of (g, its bound) and (u, its bound), or of u alone: float64, bound."""
    name, alpha, limit, shift = activation
    (x, x_tol), (u, u_tol) = (*products, (1.0, 0.0))[:2]
    if len(products) == 2:
        x, u = np.minimum(x, limit), np.clip(u, -limit, limit) + shift
        u_tol = u_tol + (EPS32 * np.abs(u) if shift else 0)
    f, f_tol, slope = function(name, alpha, x)
    slope = slope + (2 * x_tol if name == "relu2" else 0)
    with np.errstate(over="ignore", invalid="ignore"):
        act = f * u
        tol = (f_tol + slope * x_tol) * (np.abs(u) + u_tol) + np.abs(f) * u_tol
    return act, tol + TINY32


def random_slots(tokens, slots, experts, seed=0, skipped=0.25):
    """(T,k) expert ids without repetition in a token, some of them -1, and float32 weights."""
    rng = np.random.default_rng(seed)
    ids = rng.permuted(np.tile(np.arange(experts), (tokens, 1)), axis=1)[:, :slots]
    ids = np.where(rng.random(ids.shape) < skipped, -1, ids)
    return ids.astype(np.int32), rng.random(ids.shape).astype(np.float32)


# ---- processes of their own ----


def run_python(code, *, timeout=120, check=True, **environment):
    """Runs code in tests/, so that it can import from there; returns the finished process."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=Path(__file__).parent,
        timeout=timeout,
        capture_output=True,
        text=True,
    )
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done
