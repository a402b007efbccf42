"""quantized_avx512vnni.c and quantized_avxvnni.c by emulated instructions: their logic.

The sources are compiled as they are, with tests/lanes16.h or tests/vnni256.h before them. Where
the CPU has VNNI, test_quantized_kernels.py holds the kernels that ship.
"""

import ctypes

import numpy as np
import pytest
import test_quantized_kernels as quantized
import util
from compiled import SOURCES, Matrix, Rows, library

from moeprof import _C, _kernels

pytestmark = pytest.mark.once

CANARY = np.float32(-12345.0)
EMULATIONS = {"avx512vnni": "lanes16.h", "avxvnni": "vnni256.h"}


@pytest.fixture(scope="module", params=EMULATIONS)
def vnni(request, tmp_path_factory):
    """(the library, the variant)"""
    variant = request.param
    if variant == "avxvnni" and "avx2" not in _C.cpu_features():
        pytest.skip(f"this CPU lacks avx2 (it has {_C.cpu_features()})")
    files = [SOURCES / "x86" / f"quantized_{variant}.c", SOURCES / "formats.c"]
    # Unoptimised: a compiler takes minutes to make plain C of vectors of 16.
    flags = ["-O0", "-Wno-psabi"]
    folder = tmp_path_factory.mktemp(variant)
    return library(folder, EMULATIONS[variant], files, flags), variant


def linear(vnni, format, x, index, w, n):
    """The kernel's (M,n) of n rows of weights; nothing beside it is written."""
    kernels, variant = vnni
    groups = x.shape[1] // (quantized.GROUP + 8)
    out = np.full((len(index) + 1, n + 3), CANARY)
    rows = Rows(x.ctypes.data, groups, index.ctypes.data, len(index))
    matrix = Matrix(0, w.ctypes.data, w.shape[1])
    size, at = ctypes.c_ssize_t, ctypes.c_void_p
    kernel = getattr(kernels, f"mp_linear_{format}_{variant}")
    kernel.argtypes = [at, at, size, size, at, at, size, at]
    kernel(
        ctypes.addressof(rows),
        ctypes.addressof(matrix),
        n,
        groups * quantized.GROUP,
        None,
        out.ctypes,
        n + 3,
        None,
    )
    assert (out[len(index)] == CANARY).all() and (out[:, n:] == CANARY).all()
    return out[: len(index), :n]


@pytest.mark.parametrize("format", quantized.BITS)
def test_products_are_the_scalar_ones(vnni, format):
    for x, index, w, scalar in quantized.scalar_products(format):
        for n in {len(w), len(w) - 15, len(w) - 16} - {0}:
            if n <= 64:
                np.testing.assert_array_equal(
                    linear(vnni, format, x, index, w, n), scalar[:, :n], f"{len(index)} {n}"
                )


@pytest.mark.parametrize("format", quantized.BITS)
@pytest.mark.parametrize("side", ("start", "end"))
def test_nothing_is_read_beyond_the_matrices(vnni, format, side):
    for m, n, k in ((1, 16, 32), (9, 48, 96), (17, 64, 33), (10, 33, 64)):
        x, index, w = quantized.matrices(format, m, n, k)
        x = _kernels.quantize(x)
        arrays = (util.guarded(a, side) for a in (x, index, w))
        expected = quantized.product(x, w, format, index)[:, :n]
        np.testing.assert_array_equal(linear(vnni, format, *arrays, n), expected)


@pytest.mark.parametrize("format", quantized.BITS)
def test_sums_at_their_limits(vnni, format):
    for weight in (-128, -127, 127) if format == "q8" else (-8, 7):
        for activation in (-127, 127):
            x, w = quantized.full(format, weight, activation)
            got = linear(vnni, format, x, np.arange(2, dtype=np.int32), w, 16)
            np.testing.assert_array_equal(got, 2.0 * quantized.GROUP * weight * activation)
