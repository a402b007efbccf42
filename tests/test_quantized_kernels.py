"""Weights in 8 and 4 bits: how they are encoded, and the kernels that multiply them.

Scalar against NumPy in float64 and against what csrc/quantized.h says, then every other variant
against scalar: bit for bit, but for activations in float32.
"""

import sys
from functools import cache, partial

import numpy as np
import pytest
import util

from moeprof import _C, _kernels

pytestmark = pytest.mark.once

BITS = {"q8": 8, "q4": 4}
LIMITS = {"q8": (-127, 127), "q4": (-8, 7)}
CANDIDATES = [-8, *np.arange(-10, -8, 0.25), *np.arange(-7.75, -5.75, 0.25), -5.5, 6.5, 7, 7.5]
GROUP, PANEL, LINE = 32, 16, 64
OF_FORMATS = [
    (format, variant) for format in BITS for variant in util.variants_of(f"linear_{format}")
]
of_formats = pytest.mark.parametrize(("format", "variant"), OF_FORMATS)
OF_EXACT = [
    (format, variant) for format in BITS for variant in util.variants_of(f"linear_{format}_exact")
]
OF_ENCODERS = [
    (format, variant) for format in BITS for variant in util.variants_of(f"encode_{format}")
]
posix = pytest.mark.skipif(sys.platform != "linux", reason="mprotect is Linux's")


@pytest.fixture(autouse=True)
def every_kernel_again():
    yield
    util.restore_cpu()


def groups_of(k):
    return -(-k // GROUP)


def parts(encoded, format):
    """(q (N,K) int, d (N,groups) float64) by the layout of csrc/quantized.h, in plain NumPy."""
    rows, groups = len(encoded), encoded.shape[1] // (2 + 4 * BITS[format])
    tiles = encoded.reshape(rows // PANEL, groups, -1)
    lines = tiles[:, :, : -2 * PANEL].reshape(rows // PANEL, groups, -1, PANEL, 4)
    if BITS[format] == 8:
        q = lines.astype(int) - 128
    else:
        halves = [(lines & 15).astype(int) - 8, (lines >> 4).astype(int) - 8]
        q = np.concatenate(halves, axis=-1)  # of row r, columns 8 i .. 8 i + 7
    q = q.transpose(0, 3, 1, 2, 4).reshape(rows, groups * GROUP)
    d = tiles[:, :, -2 * PANEL :].copy().view(np.float16).astype(np.float64)
    return q, d.transpose(0, 2, 1).reshape(rows, groups)


def widened(q, d):
    return q * np.repeat(d, GROUP, axis=1)


def groups_of_activations(x):
    """(q (M,K) int, scale (M,groups), minus_sum (M,groups)) of what `quantize` gives."""
    records = x.reshape(len(x), -1, GROUP + 8)
    q = records[:, :, :GROUP].view(np.int8).astype(int).reshape(len(x), -1)
    scale = np.ascontiguousarray(records[:, :, GROUP : GROUP + 4]).view(np.float32)[..., 0]
    sums = np.ascontiguousarray(records[:, :, GROUP + 4 :]).view(np.int32)[..., 0]
    return q, scale, sums


# ---- encoding ----


def encode_group(w, format):
    """(q, d) of 32 float32 weights, as csrc/quantized.h says it."""
    low, high = LIMITS[format]
    largest = np.abs(w).max()
    if format == "q8":
        d = np.float16(largest / np.float32(127))
        return (np.clip(np.rint(w / np.float32(d)), low, high) if d else 0 * w), d
    best, found = 0, (0 * w, np.float16(0))
    m = w[np.argmax(np.abs(w))]
    for c in CANDIDATES if largest >= 2.0**-100 else []:
        q = np.clip(np.rint(w * (np.float32(c) / m)), low, high)
        sums = []
        for with_q in (q * w, q * q):
            s = with_q.reshape(4, 8)
            s = ((s[0] + s[1]) + s[2]) + s[3]
            sums.append(((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7])))
        qw, qq = sums
        d = np.float16(qw / qq)
        gain = np.float32(d) * (2 * qw - np.float32(d) * qq)
        if gain > best:
            best, found = gain, (q, d)
    return found


def weights_to_encode():
    rng = np.random.default_rng(0)
    w = rng.standard_normal((40, GROUP))
    w[1] *= 1e-6  # scales that are subnormal
    w[2] *= 1e-9  # that are 0
    w[3] = 0
    w[4, 5] = 3e4  # one huge outlier
    w[5] = np.abs(w[5])
    w[6] = -np.abs(w[6])
    w[7] = np.arange(GROUP) - 16
    w[8] = 5.0  # all equal
    w[9, ::2], w[9, 1::2] = -1, 1
    w[10] *= 2.0**-110
    w[11] = rng.integers(-8, 8, GROUP)
    w[12, 0] = 65504 * 5.0
    return w.astype(np.float32)


@pytest.mark.parametrize(("format", "variant"), OF_ENCODERS)
def test_weights_are_encoded_as_the_header_says(format, variant):
    util.force(f"encode_{format}", variant)
    w = weights_to_encode()
    q, d = parts(_C.encode(w, "float32", format, 1), format)
    with np.errstate(under="ignore"):
        expected = [encode_group(row, format) for row in w]
    np.testing.assert_array_equal(d[: len(w), 0], [scale for _, scale in expected])
    np.testing.assert_array_equal(q[: len(w)], [row for row, _ in expected])
    low, high = LIMITS[format]
    assert q.min() >= low and q.max() <= high


@pytest.mark.parametrize("format", BITS)
def test_the_error_of_a_group_is_that_of_the_format(format):
    """Half a step of the largest weight, but where the scale is too small for a float16."""
    w = np.random.default_rng(1).standard_normal((64, 96)).astype(np.float32)
    back = _C.decode(_C.encode(w, "float32", format, 2), 64, 96, format)
    largest = np.abs(w.reshape(64, 3, GROUP)).max(axis=2, keepdims=True)
    error = np.abs(back - w).reshape(64, 3, GROUP)
    assert (error <= largest * (0.51 / 127 if format == "q8" else 0.17)).all()
    # By least squares 4 bits are nearer than by the largest weight alone, as Q4_0 has it.
    if format == "q4":
        m = np.take_along_axis(
            w.reshape(64, 3, GROUP),
            np.abs(w.reshape(64, 3, GROUP)).argmax(axis=2)[..., None],
            axis=2,
        )
        plain = np.clip(np.rint(w.reshape(64, 3, GROUP) / (m / -8)), -8, 7) * (m / -8)
        assert (error**2).sum() < 0.95 * ((plain - w.reshape(64, 3, GROUP)) ** 2).sum()


@pytest.mark.parametrize("format", BITS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 48), (16, 32), (17, 33), (40, 100)])
def test_a_short_group_is_a_group_and_the_rest_is_zero(format, n, k):
    w = np.random.default_rng(2).standard_normal((n, k)).astype(np.float32)
    encoded = _C.encode(w, "float32", format, 2)
    assert encoded.shape == (-(-n // PANEL) * PANEL, groups_of(k) * (2 + 4 * BITS[format]))
    q, d = parts(encoded, format)
    np.testing.assert_array_equal(widened(q, d)[:n, :k], _C.decode(encoded, n, k, format))
    padded = np.zeros((n, groups_of(k) * GROUP), np.float32)
    padded[:, :k] = w
    for row in range(n):
        for group in range(groups_of(k)):
            at = slice(group * GROUP, (group + 1) * GROUP)
            expected, scale = encode_group(padded[row, at], format)
            np.testing.assert_array_equal(q[row, at], expected)
            assert d[row, group] == scale
    assert (q[n:] == 0).all() and (d[n:] == 0).all() and (q[:, k:] == 0).all()


@pytest.mark.parametrize("format", BITS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_of_any_dtype_and_order_of_memory(format, dtype):
    w = util.narrow(np.random.default_rng(3).standard_normal((40, 70)), dtype)
    expected = _C.encode(util.widen(w, dtype).astype(np.float32), "float32", format, 1)
    views = [w, np.asfortranarray(w), np.repeat(w, 2, axis=1)[:, ::2], w[::-1][::-1]]
    for view in views:
        for threads in (1, 2, 4):
            encoded = _C.encode(view, dtype, format, threads)
            np.testing.assert_array_equal(encoded, expected)


@pytest.mark.parametrize(("format", "variant"), OF_ENCODERS)
@pytest.mark.parametrize("bad", [np.nan, -np.inf, 3e38])
def test_weights_that_have_no_scale_are_refused(format, variant, bad):
    util.force(f"encode_{format}", variant)
    w = np.ones((40, 70), np.float32)
    w[33, 69] = w[37, 2] = bad
    for threads in (1, 3):
        with pytest.raises(ValueError, match="row 33 is NaN, infinite or too large"):
            _C.encode(w, "float32", format, threads)


# ---- activations ----


def quantized(x):
    """(q, scale) of activations (M,K), as csrc/kernels.h says it."""
    x = np.pad(x, ((0, 0), (0, -x.shape[1] % GROUP))).reshape(len(x), -1, GROUP)
    largest = np.abs(x).max(axis=2, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        q = np.rint(x * (np.float32(127) / largest))
    none = ~(largest >= 2.0**-100) | ~np.isfinite(largest)
    scale = np.where(largest < 2.0**-100, np.float32(0), largest / np.float32(127))
    scale = np.where(np.isfinite(largest), scale, np.nan)
    return np.where(none, 0, q).reshape(len(x), -1), scale[..., 0]


@pytest.mark.parametrize("variant", util.variants_of("quantize"))
def test_activations_are_rounded_group_by_group(variant):
    util.force("quantize", variant)
    rng = np.random.default_rng(0)
    for k in (1, 7, 31, 32, 33, 64, 100):
        x = rng.standard_normal((20, k)).astype(np.float32)
        x[1] *= 1e30
        x[2] *= 1e-33
        x[3] = 0
        x[4, 0] = 1e6
        x[5, k // 2], x[6, 0], x[7, k - 1] = np.nan, np.inf, -np.inf
        x[8] = np.arange(k) % 3 - 1.5  # ties of rounding
        x[9] = 127 * (np.arange(k) % 2) + 0.5
        q, scale, minus_sum = groups_of_activations(_kernels.quantize(x))
        expected, scales = quantized(x)
        np.testing.assert_array_equal(q, expected)
        np.testing.assert_array_equal(scale, scales)
        np.testing.assert_array_equal(minus_sum, -q.reshape(*scale.shape, GROUP).sum(axis=2))


# ---- products ----


def product(x, encoded, format, index=None):
    index = np.arange(len(x), dtype=np.int32) if index is None else index
    return _kernels.linear(x, index, encoded, format)


def matrices(format, m, n, k, seed=0):
    rng = np.random.default_rng([seed, m, n, k])
    x = rng.standard_normal((m + 3, k)).astype(np.float32)
    x[:, :: max(k // 5, 1)] *= 20  # channels that stand out
    index = rng.integers(0, m + 3, m).astype(np.int32)
    w = rng.standard_normal((n, k)).astype(np.float32)
    return x, index, _C.encode(w, "float32", format, 1)


SHAPES = [
    (m, n, k) for m in (*range(1, 19), 33, 50) for n in (16, 32, 48, 64, 80, 130) for k in (32, 96)
] + [(3, n, k) for n in (1, 16) for k in (1, 31, 33, 64, 2048)]


@cache
def scalar_products(format):
    """(x, index, w, product) of each shape."""
    util.force(f"linear_{format}", "scalar")
    found = []
    for m, n, k in SHAPES:
        x, index, w = matrices(format, m, n, k)
        x = _kernels.quantize(x)
        found.append((x, index, w, product(x, w, format, index)))
    return found


@pytest.mark.parametrize("format", BITS)
def test_scalar_products_are_those_of_the_formula(format):
    for x, index, w, got in scalar_products(format):
        q, scale, _ = groups_of_activations(x[index])
        of_w, d = parts(w, format)
        sums = np.einsum(
            "mgi,ngi->mng",
            q.reshape(*scale.shape, GROUP),
            of_w.reshape(*d.shape, GROUP),
        )
        terms = sums * scale[:, None].astype(np.float64) * d[None]
        tol = util.EPS32 * (2 + sums.shape[2]) * np.abs(terms).sum(axis=2)
        util.assert_close(got, terms.sum(axis=2), tol)


@of_formats
def test_every_variant_gives_the_bits_of_the_scalar_one(format, variant):
    expected = scalar_products(format)
    util.force(f"linear_{format}", variant)
    for x, index, w, scalar in expected:
        np.testing.assert_array_equal(product(x, w, format, index), scalar)


@pytest.mark.parametrize(("format", "variant"), OF_EXACT)
def test_activations_in_float32(format, variant):
    exact = f"{format}_exact"
    util.force(f"linear_{exact}", variant)
    for m, n, k in SHAPES[::3]:
        x, index, w = matrices(format, m, n, -(-k // GROUP) * GROUP)
        expected, tol = util.matmul(x[index], _C.decode(w, len(w), x.shape[1], format))
        util.assert_close(product(x, w, exact, index), expected, 2 * tol, f"{m, n, k}")


def full(format, weight, activation):
    """All weights and activations are these q, of both scales 1."""
    rows = np.full((2, 2, GROUP + 8), activation & 0xFF, np.uint8)
    rows[:, :, GROUP : GROUP + 4] = np.array([1.0], np.float32).view(np.uint8)
    rows[:, :, GROUP + 4 :] = np.array([-GROUP * activation], np.int32).view(np.uint8)
    value = weight + 128 if format == "q8" else (weight + 8) * 17
    tile = np.full((2, PANEL * (2 + 4 * BITS[format])), value, np.uint8)
    tile[:, -2 * PANEL :] = np.ones(PANEL, np.float16).view(np.uint8)
    return rows.reshape(2, -1), tile.reshape(PANEL, -1)


@of_formats
def test_sums_that_16_bits_could_not_hold(format, variant):
    """All at their limits: maddubs would be cut off at 32767 by q + 128, and so would the sum of
    a whole group of 8 bits. -128 is no weight that is encoded; a file may hold it."""
    util.force(f"linear_{format}", variant)
    weights = (-128, -127, 127) if format == "q8" else (-8, 7)
    for weight in weights:
        for activation in (-127, 127):
            x, w = full(format, weight, activation)
            np.testing.assert_array_equal(
                product(x, w, format), np.full((2, PANEL), 2.0 * GROUP * weight * activation)
            )


@of_formats
def test_alternating_signs_cancel(format, variant):
    util.force(f"linear_{format}", variant)
    x, w = full(format, LIMITS[format][1], 127)
    x.reshape(2, 2, -1)[:, :, 1:GROUP:2] = -127 & 0xFF
    x.reshape(2, 2, -1)[:, :, GROUP + 4 :] = 0
    np.testing.assert_array_equal(product(x, w, format), np.zeros((2, PANEL)))


@of_formats
def test_what_is_not_finite_in_a_row_is_nan_and_stays_there(format, variant):
    util.force(f"linear_{format}", variant)
    x, _, w = matrices(format, 6, 32, 96)
    x[1, 50], x[3, 95] = np.nan, np.inf
    got = product(_kernels.quantize(x), w, format)
    assert np.isnan(got[[1, 3]]).all() and np.isfinite(np.delete(got, [1, 3], axis=0)).all()


@of_formats
def test_a_row_alone_is_a_row_in_a_batch(format, variant):
    util.force(f"linear_{format}", variant)
    x, index, w = matrices(format, 40, 64, 96)
    x = _kernels.quantize(x)
    together = product(x, w, format, index)
    for rows in (1, 2, 3, 5, 8, 9, 17, 33):
        np.testing.assert_array_equal(product(x, w, format, index[:rows]), together[:rows])


@of_formats
@pytest.mark.parametrize("offset", (1, 2, 3))
def test_weights_at_any_address(format, variant, offset):
    util.force(f"linear_{format}", variant)
    x, index, w = matrices(format, 9, 48, 64)
    for suffix, rows in (("", _kernels.quantize(x)), ("_exact", x)):
        expected = product(rows, w, format + suffix, index)
        moved = product(rows, util.shifted(w, offset), format + suffix, index)
        np.testing.assert_array_equal(moved, expected)


@posix
@of_formats
@pytest.mark.parametrize("side", ("start", "end"))
def test_nothing_is_read_beyond_the_matrices(format, variant, side):
    util.force(f"linear_{format}", variant)
    place = partial(util.guarded, side=side)
    for m, n, k in ((1, 16, 32), (4, 32, 64), (9, 48, 96), (17, 64, 33), (3, 80, 1)):
        x, index, w = matrices(format, m, n, k)
        wide = np.pad(x, ((0, 0), (0, -k % GROUP)))
        for suffix, rows in (("", _kernels.quantize(place(x))), ("_exact", wide)):
            expected = product(rows, w, format + suffix, index)
            got = product(place(rows), place(w), format + suffix, place(index))
            np.testing.assert_array_equal(got, expected)


# ---- layers ----


class Quantized:
    """A layer of random experts in a format: `plain` has what was encoded, in float32."""

    def __init__(self, experts, hidden, inner, format, dtype="float32", place=np.array, **how):
        self.plain = plain = util.Layer(experts, hidden, inner, "float32", **how)
        self.format, self.dtype, self.shape = format, dtype, (experts, hidden, inner)
        self.encoded = [
            [place(_C.encode(matrix, "float32", format, 1)) for matrix in kind]
            for kind in plain.matrices
        ]
        for kind, encoded in zip(plain.matrices, self.encoded, strict=True):
            for matrix, e in zip(kind, encoded, strict=True):
                matrix[...] = _C.decode(e, *matrix.shape, format)
        self.biases = [[util.narrow(b, dtype) for b in kind] for kind in plain.biases]
        for kind, narrow in zip(plain.biases, self.biases, strict=True):
            for bias, b in zip(kind, narrow, strict=True):
                bias[...] = util.widen(b, dtype)
        rows = [[a.ctypes.data for a in kind] for kind in (*self.encoded, *self.biases)]
        self.pointers = np.array(rows, np.uint64)
        self.layers = {
            name: _C.Layer(self.pointers, name, dtype, hidden, inner, plain.activation, "rows")
            for name in (format, f"{format}_exact")
        }

    def hidden(self, tokens):
        return util.narrow(util.widen(self.plain.hidden(tokens), "float32"), self.dtype)

    def __call__(self, hidden, ids, weights, suffix="", threads=1):
        return _C.experts(hidden, ids, weights, self.layers[self.format + suffix], threads)

    def by_kernels(self, hidden, ids, weights):
        """The same, kernel by kernel, expert by expert, in float32 until the end."""
        x = _kernels.quantize(util.widen(hidden, self.dtype).astype(np.float32))
        out = np.zeros(hidden.shape, np.float32)
        for e in range(self.shape[0]):
            *into, down = (kind[e] for kind in self.encoded)
            biases = [util.widen(kind[e], self.dtype).astype(np.float32) for kind in self.biases]
            rows, slots = np.nonzero(ids == e)
            index = rows.astype(np.int32)
            products = [product(x, w, self.format, index)[:, : self.shape[2]] for w in into]
            for number, bias in enumerate(biases[:-1]):
                products[number] = products[number] + bias
            g, u = products if len(products) == 2 else (None, *products)
            act = [
                _kernels.glu(self.plain.activation, None if g is None else g[r], u[r], "float32")
                for r in range(len(rows))
            ]
            act = np.array(act, np.float32).reshape(len(rows), self.shape[2])
            y = product(_kernels.quantize(act), down, self.format)[:, : self.shape[1]]
            y = y + biases[-1] if biases else y
            for row, slot, value in zip(rows, slots, y, strict=True):
                out[row] = out[row] + weights[row, slot] * value
        return util.narrow(out, self.dtype)


LAYERS = {
    # name: (E, H, I, T, slots), what else
    "whole groups": ((4, 64, 96, 9, 2), {}),
    "odd sizes": ((3, 41, 71, 40, 2), {}),
    "one group": ((1, 32, 32, 1, 1), {}),
    "less than a group": ((2, 5, 3, 4, 2), {}),
    "many rows of an expert": ((2, 48, 33, 600, 1), {}),
    "biases": ((3, 40, 50, 12, 2), {"biased": True}),
    "as GPT-OSS": (
        (3, 40, 50, 12, 2),
        {"biased": True, "activation": ("silu", 1.702, 0.75, 1.0)},
    ),
    "without gate": (
        (3, 40, 50, 12, 2),
        {"gated": False, "activation": ("relu2", 1.0, np.inf, 0.0)},
    ),
}


def layer_of(name, format, dtype="float32", **place):
    (E, H, I, T, slots), how = LAYERS[name]  # noqa: E741
    ids, weights = util.random_slots(T, slots, E, skipped=0.0 if E == 1 else 0.25)
    layer = Quantized(E, H, I, format, dtype, **how, **place)
    return layer, layer.hidden(T), ids, weights


@pytest.mark.parametrize("level", util.level_names())
@pytest.mark.parametrize("format", BITS)
@pytest.mark.parametrize("name", LAYERS)
def test_layers(level, format, name):
    util.force_level(level)
    for dtype in util.DTYPES:
        layer, hidden, ids, weights = layer_of(name, format, dtype)
        np.testing.assert_array_equal(
            layer(hidden, ids, weights), layer.by_kernels(hidden, ids, weights)
        )
        ref, tol = layer.plain.reference(util.widen(hidden, dtype).astype(np.float32), ids, weights)
        exact = util.widen(layer(hidden, ids, weights, "_exact"), dtype)
        least = 2.0**-25 if dtype == "float16" else 0
        tol = tol + util.HALF_ULP[dtype] * (np.abs(ref) + tol) + least
        util.assert_close(exact, ref, tol, f"{dtype} exact")
        # int8 activations: within what their rounding, half a step in 127, may do
        near = util.widen(layer(hidden, ids, weights), dtype)
        assert np.linalg.norm(near - ref) <= 0.03 * np.linalg.norm(ref), dtype


@pytest.mark.parametrize("format", BITS)
def test_threads_do_not_change_a_bit(format):
    for name in LAYERS:
        layer, *arrays = layer_of(name, format)
        for suffix in ("", "_exact"):
            one = layer(*arrays, suffix)
            for threads in (2, 4):
                np.testing.assert_array_equal(layer(*arrays, suffix, threads), one)


@posix
@pytest.mark.parametrize("format", BITS)
@pytest.mark.parametrize("side", ("start", "end"))
def test_nothing_is_read_beyond_the_experts(format, side):
    place = partial(util.guarded, side=side)
    for name in ("whole groups", "odd sizes", "less than a group", "biases"):
        layer, hidden, ids, weights = layer_of(name, format, place=place)
        expected = layer.by_kernels(hidden, ids, weights)
        np.testing.assert_array_equal(layer(place(hidden), ids, weights, threads=2), expected)
        assert np.isfinite(layer(place(hidden), ids, weights, "_exact", 2)).all()


@pytest.mark.parametrize("format", BITS)
@pytest.mark.parametrize("dtype", util.DTYPES)
def test_a_linear_layer(format, dtype):
    rng = np.random.default_rng(0)
    for m, n, k in ((1, 5, 7), (3, 70, 96), (40, 64, 33)):
        w = _C.encode(rng.standard_normal((n, k)).astype(np.float32), "float32", format, 1)
        x = util.narrow(rng.standard_normal((m, k)), dtype)
        bias = util.narrow(rng.standard_normal(n), dtype)
        rows = _kernels.quantize(util.widen(x, dtype).astype(np.float32))
        wide = product(rows, w, format)[:, :n] + util.widen(bias, dtype).astype(np.float32)
        for threads in (1, 3):
            out = _C.dense(x, w.ctypes.data, n, bias.ctypes.data, format, dtype, threads)
            np.testing.assert_array_equal(out, util.narrow(wide, dtype))
