"""Products of quantised weights by VNNI and AMX, by emulated instructions: their logic.

The sources are compiled as they are, with headers of tests before them that stand for the
instructions. Where the CPU has them, test_quantized_kernels.py holds the kernels that ship.
"""

import ctypes
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
import test_quantized_kernels as quantized
import util
from compiled import SOURCES, TESTS, Matrix, Rows, library

from moeprof import _C, _kernels

pytestmark = pytest.mark.once

CANARY = np.float32(-12345.0)
X86 = SOURCES / "x86"
AVX512VNNI = X86 / "quantized_avx512vnni.c"
EMULATIONS = {  # variant: the header of its instructions, its sources
    "avx512vnni": ("lanes16.h", [AVX512VNNI]),
    "avxvnni": ("vnni256.h", [X86 / "quantized_avxvnni.c"]),
    "amxint8": (
        "amx_lanes16.h",
        [X86 / "quantized_amxint8.c", AVX512VNNI, TESTS / "amx_emulation.c"],
    ),
}


class Emulated(NamedTuple):
    variant: str
    library: ctypes.CDLL

    def linear(self, format, x, index, w, n):
        """The kernel's (M,n) of n rows of weights; nothing beside it is written."""
        groups = x.shape[1] // (quantized.GROUP + 8)
        k = groups * quantized.GROUP
        out = np.full((len(index) + 1, n + 3), CANARY)
        scratch = np.full((k + 32) * 64, np.nan, np.float32)
        rows = Rows(x.ctypes.data, groups, index.ctypes.data, len(index))
        matrix = Matrix(0, w.ctypes.data, w.shape[1])
        size, at = ctypes.c_ssize_t, ctypes.c_void_p
        kernel = getattr(self.library, f"mp_linear_{format}_{self.variant}")
        kernel.argtypes = [at, at, size, size, at, at, size, at]
        kernel(
            ctypes.addressof(rows),
            ctypes.addressof(matrix),
            n,
            k,
            w[-1:].ctypes,
            out.ctypes,
            n + 3,
            scratch.ctypes,
        )
        if self.variant == "amxint8":
            assert not self.library.amx_fault() and not self.library.amx_is_configured()
        assert (out[len(index)] == CANARY).all() and (out[:, n:] == CANARY).all()
        return out[: len(index), :n]


@pytest.fixture(autouse=True)
def every_kernel_again():
    yield
    util.restore_cpu()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A function of a variant: Emulated, compiled once."""

    @cache
    def of(variant):
        header, files = EMULATIONS[variant]
        # Unoptimised: a compiler takes minutes to make plain C of vectors of 16.
        flags = ["-O0", "-Wno-psabi"]
        folder = tmp_path_factory.mktemp(variant)
        made = library(folder, header, [*files, SOURCES / "formats.c"], flags)
        return Emulated(variant, made)

    return of


@pytest.fixture(params=EMULATIONS)
def emulated(request, compiled):
    if request.param == "avxvnni" and "avx2" not in _C.cpu_features():
        pytest.skip(f"this CPU lacks avx2 (it has {_C.cpu_features()})")
    return compiled(request.param)


@pytest.mark.parametrize("format", quantized.BITS)
def test_products_are_the_scalar_ones(emulated, format):
    for x, index, w, scalar in quantized.scalar_products(format):
        for n in {len(w), len(w) - 15, len(w) - 16} - {0}:
            if n <= 64:
                np.testing.assert_array_equal(
                    emulated.linear(format, x, index, w, n),
                    scalar[:, :n],
                    f"{len(index)} {n}",
                )


@pytest.mark.parametrize("format", quantized.BITS)
@pytest.mark.parametrize("side", ("start", "end"))
def test_nothing_is_read_beyond_the_matrices(emulated, format, side):
    for m, n, k in ((1, 16, 32), (9, 48, 96), (17, 64, 33), (10, 33, 64), (11, 16, 1)):
        x, index, w = quantized.matrices(format, m, n, k)
        x = _kernels.quantize(x)
        arrays = (util.guarded(a, side) for a in (x, index, w))
        expected = quantized.product(x, w, format, index)[:, :n]
        np.testing.assert_array_equal(emulated.linear(format, *arrays, n), expected)


@pytest.mark.parametrize("format", quantized.BITS)
def test_sums_at_their_limits(emulated, format):
    for weight in (-128, -127, 127) if format == "q8" else (-8, 7):
        for activation in (-127, 127):
            x, w = quantized.full(format, weight, activation)
            got = emulated.linear(format, x, np.arange(2, dtype=np.int32), w, 16)
            np.testing.assert_array_equal(got, 2.0 * quantized.GROUP * weight * activation)


@pytest.mark.parametrize("format", quantized.BITS)
def test_awkward_numbers(emulated, format):
    """Groups of zeros, scales that are subnormal, a huge outlier, NaN and infinity; few rows
    and many."""
    x, _, _ = quantized.matrices(format, 47, 48, 96)
    w = np.random.default_rng(0).standard_normal((48, 96)).astype(np.float32)
    w[0], w[1, 32:64], w[2], w[3, 40], w[4] = 0, 0, w[2] * 1e-6, 3e4, w[4] * 1e-9
    x[0], x[1, :32], x[2], x[3, 70], x[4] = 0, 0, x[2] * 1e-36, 1e30, x[4] * 1e36
    x[5, 50], x[6, 95] = np.nan, -np.inf
    x, w = _kernels.quantize(x), _C.encode(w, "float32", format, 1)
    for rows in (10, 11, 16, 17, 50):
        index = np.arange(rows, dtype=np.int32)
        util.force(f"linear_{format}", "scalar")
        expected = quantized.product(x, w, format, index)
        got = emulated.linear(format, x, index, w, 48)
        np.testing.assert_array_equal(got.view(np.int32), expected.view(np.int32))


@pytest.mark.parametrize("format", quantized.BITS)
def test_many_rows_go_to_the_tiles_and_none_is_multiplied_in_vain(compiled, format):
    amx = compiled("amxint8")
    for m, n, k, products in (
        (10, 64, 96, 0),
        (11, 64, 96, 4 * 3),
        (16, 16, 32, 1),
        (17, 33, 64, 2 * 3 * 2),
        (50, 48, 33, 4 * 3 * 2),
    ):
        x, index, w = quantized.matrices(format, m, n, k)
        before = amx.library.amx_products()
        amx.linear(format, _kernels.quantize(x), index, w, n)
        assert amx.library.amx_products() - before == products
