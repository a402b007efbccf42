"""gemm_amx.c by emulated tiles, wherever there is AVX-512: its logic, not its instructions.

The kernel's source is compiled as it is, with tests/amx_emulation.h in the place of
csrc/x86/amx.h. Where the CPU has AMX, test_kernels.py holds the kernel that ships.
"""

import ctypes
import sys
from concurrent.futures import ThreadPoolExecutor

import compiled
import numpy as np
import pytest
import util
from compiled import SOURCES, TESTS, Matrix, Rows
from util import TINY32, narrow, widen

from moeprof import _C

pytestmark = pytest.mark.once

CANARY = np.float32(-12345.0)
posix = pytest.mark.skipif(sys.platform != "linux", reason="mprotect is Linux's")


@pytest.fixture(scope="module")
def amx(tmp_path_factory):
    """The kernel, pack_bf16 and the emulated instructions as a library."""
    if "avx512" not in _C.cpu_features():
        pytest.skip(f"this CPU lacks avx512 (it has {_C.cpu_features()})")
    x86 = SOURCES / "x86"
    files = [x86 / "gemm_amx.c", x86 / "pack_avx512.c", TESTS / "amx_emulation.c"]
    library = compiled.library(tmp_path_factory.mktemp("amx"), "amx_emulation.h", files)
    size, at = ctypes.c_ssize_t, ctypes.c_void_p
    library.mp_pack_bf16_avx512.argtypes = [at, size, size, size, at]
    library.mp_gemm_bf16_amx.argtypes = [at, size, at, size, size, at, at, at, size, at]
    library.amx_load.argtypes = library.amx_store.argtypes = [ctypes.c_int, at, size]
    library.amx_config.argtypes = [at]
    library.amx_fault.restype = ctypes.c_char_p
    library.amx_products.restype = ctypes.c_long
    return library


def pack(amx, x):
    """The panels of x (M,K), in memory that was full of NaN."""
    (m, k), width = x.shape, x.shape[1] + x.shape[1] % 2
    panels = util.shifted(np.full((m + 15) // 16 * 16 * width, 0x7FC0, np.uint16), 64)
    rows = Rows(x.ctypes.data, k, None, m)
    amx.mp_pack_bf16_avx512(ctypes.addressof(rows), k, 0, k, panels.ctypes)
    return panels


def gemm(amx, panels, m, w, next_w=None, next_panels=None):
    """The kernel's (M,N); nothing around it is written, and no tile stays configured."""
    n, k = w.shape
    out, scratch = np.full((m + 1, n + 3), CANARY), np.full((k + 32) * 128, np.nan, np.float32)
    following = [None if a is None else a.ctypes for a in (next_w, next_panels)]
    matrix = Matrix(0, w.ctypes.data, 2 * k)
    amx.mp_gemm_bf16_amx(
        panels.ctypes,
        m,
        ctypes.addressof(matrix),
        n,
        k,
        *following,
        out.ctypes,
        n + 3,
        scratch.ctypes,
    )
    assert amx.amx_fault() is None
    assert not amx.amx_is_configured()
    assert (out[m] == CANARY).all() and (out[:, n:] == CANARY).all()
    return out[:m, :n]


def matrices(m, n, k, seed=0):
    rng = np.random.default_rng([seed, m, n, k])
    x, w = rng.standard_normal((m, k)), rng.standard_normal((n, k))
    return narrow(x, "bfloat16"), narrow(w, "bfloat16")


def expected(x, w):
    with np.errstate(invalid="ignore", over="ignore"):
        return util.matmul(widen(x, "bfloat16"), widen(w, "bfloat16"))


def hold(amx, x, w, what="", **following):
    got = gemm(amx, pack(amx, x), len(x), w, **following)
    util.assert_close(got, *expected(x, w), f"{what} M={len(x)} N={len(w)} K={x.shape[1]}")
    return got


def random_shapes(count):
    rng = np.random.default_rng(1)
    return [tuple(map(int, rng.integers(1, (71, 65, 131)))) for _ in range(count)]


SHAPES = {
    "every m": [(m, n, 33) for m in range(1, 71) for n in (1, 15, 16, 17, 31, 33, 63, 64)],
    "every n": [(m, n, 34) for m in (1, 15, 16, 17, 33, 70) for n in range(1, 65)],
    "every k": [(m, n, k) for m, n in ((5, 5), (16, 16), (33, 49)) for k in range(1, 131)],
    "some of all": random_shapes(400),
    "whole models": [(m, n, k) for m in (7, 40, 200) for n in (8, 64) for k in (768, 1408, 2048)],
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_shapes(amx, shapes):
    for shape in shapes:
        hold(amx, *matrices(*shape))


def test_zeros_do_not_pass():
    ref, tol = expected(*matrices(33, 49, 100))
    with pytest.raises(AssertionError):
        util.assert_close(np.zeros_like(ref), ref, tol)


@pytest.mark.parametrize(
    ("m", "n", "products"),
    [
        (32, 32, 4),
        (32, 64, 8),
        (16, 16, 1),
        (7, 64, 4),
        (33, 32, 6),
        (32, 33, 6),
        (64, 8, 4),
    ],
)
def test_no_tile_is_multiplied_in_vain(amx, m, n, products):
    """As many instructions as 16 x 16 x 32 blocks cover the shape."""
    for k, steps in ((32, 1), (2, 1), (96, 3), (97, 4)):
        before = amx.amx_products()
        hold(amx, *matrices(m, n, k))
        assert amx.amx_products() - before == products * steps


@pytest.mark.parametrize("offset", (1, 2, 3, 33))
def test_weights_at_any_address(amx, offset):
    for m, n, k in ((8, 5, 7), (8, 33, 48), (40, 64, 95)):
        x, w = matrices(m, n, k)
        hold(amx, x, util.shifted(w, offset))


@posix
@pytest.mark.parametrize("side", ("start", "end"))
def test_nothing_is_read_beyond_weights_and_panels(amx, side):
    for n in (*range(1, 36), 47, 48, 49, 63, 64):
        for k in (1, 2, 31, 32, 33, 62, 63, 64, 65, 129):
            m = 1 + (5 * n + k) % 49
            x, w = matrices(m, n, k)
            panels, w = util.guarded(pack(amx, x), side), util.guarded(w, side)
            got = gemm(amx, panels, m, w, next_w=w[-1:], next_panels=panels[-32:])
            util.assert_close(got, *expected(x, w), f"guarded {side} M={m} N={n} K={k}")


@pytest.mark.parametrize("k", (1, 2, 17, 31, 32, 33, 48, 63, 95))
def test_nan_around_the_weights_stays_there(amx, k):
    """Nor does that of the panels behind: the odd half of the last pair is 0 in both."""
    for n in (1, 15, 16, 17, 33, 49):
        x, w = matrices(40, n, k)
        memory = np.full((n + 64, k), 0x7FC0, np.uint16)
        memory[32:-32] = w
        panels = np.concatenate([pack(amx, x), np.full(4096, 0x7FC0, np.uint16)])
        got = gemm(amx, util.shifted(panels, 64), 40, memory[32:-32])
        util.assert_close(got, *expected(x, w), f"N={n} K={k}")


@pytest.mark.parametrize("k", (1, 8, 17, 31, 32, 48, 65))
@pytest.mark.parametrize("n", (7, 16, 23, 40))
def test_nan_and_inf_go_where_ieee_sends_them(amx, n, k):
    x, w = (widen(a, "bfloat16").copy() for a in matrices(21, n, k))
    x[1, k // 2], x[2, 0], x[3, k - 1] = np.nan, np.inf, -np.inf
    x[4, 0], x[4, k - 1] = np.inf, -np.inf
    x[5], x[18, k - 1] = 0, np.nan  # 0 * inf is NaN
    w[3, k // 2], w[4, 0], w[5, k - 1], w[n - 1, 0] = np.nan, np.inf, -np.inf, np.inf
    got = hold(amx, narrow(x, "bfloat16"), narrow(w, "bfloat16"))
    clean = np.ix_([0, *range(6, 18), 19, 20], [0, 1, 2])
    assert np.isfinite(got[clean]).all()
    assert np.isnan(got[[1, 18]]).all() and np.isnan(got[:, 3]).all()


@pytest.mark.parametrize("k", (31, 32, 100))
def test_a_row_alone_is_a_row_in_a_batch(amx, k):
    """Bit for bit, and a row of weights likewise, wherever its tile starts."""
    x, w = matrices(70, 64, k)
    together = gemm(amx, pack(amx, x), 70, w)
    for row in range(70):
        alone = gemm(amx, pack(amx, x[row : row + 1]), 1, w)
        np.testing.assert_array_equal(alone, together[row : row + 1])
    for n in range(1, 65):
        part = gemm(amx, pack(amx, x[: n + 6]), n + 6, np.ascontiguousarray(w[:n]))
        np.testing.assert_array_equal(part, together[: n + 6, :n])


def test_each_thread_has_tiles_of_its_own(amx):
    def work(n):
        for m in range(1, 40, 3):
            hold(amx, *matrices(m, n, 70))
        return True

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(work, (1, 5, 16, 17, 31, 33, 48, 64) * 2))


# ---- the emulation itself ----


def config_of(tiles, palette=1, reserved=0):
    """The 64 bytes of ldtilecfg for tiles of (rows, bytes of a row)."""
    config = np.zeros(64, np.uint8)
    config[0], config[2] = palette, reserved
    for number, (rows, row_bytes) in enumerate(tiles):
        config[16 + 2 * number], config[48 + number] = row_bytes, rows
    return config


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (config_of([(16, 64)] * 8, palette=2), b"palette"),
        (config_of([(16, 64)] * 8, reserved=1), b"reserved"),
        (config_of([(16, 64)] * 9), b"reserved"),
        (config_of([(17, 64)]), b"too large"),
        (config_of([(16, 68)]), b"too large"),
        (config_of([(0, 64)]), b"are 0"),
    ],
)
def test_the_emulation_refuses_a_bad_configuration(amx, config, what):
    amx.amx_config(config.ctypes)
    assert what in amx.amx_fault()
    assert not amx.amx_is_configured()


def test_the_emulation_refuses_tiles_that_do_not_fit(amx):
    memory = np.zeros(1024, np.uint8)
    for use in (lambda: amx.amx_zero(0), lambda: amx.amx_load(0, memory.ctypes, 64)):
        use()
        assert b"not configured" in amx.amx_fault()
    amx.amx_config(config_of([(5, 64), (5, 64), (16, 64), (16, 64), (5, 32)]).ctypes)
    faults = {
        (0, 1, 2): None,
        (0, 1, 1): b"twice",
        (3, 1, 2): b"fit",
        (0, 4, 2): b"fit",
        (0, 1, 4): b"fit",
        (0, 1, 7): b"not configured",
    }
    for tiles, what in faults.items():
        amx.amx_dpbf16(*tiles)
        fault = amx.amx_fault()
        assert fault is None if what is None else what in fault, tiles
    amx.amx_release()
    amx.amx_store(0, memory.ctypes, 64)
    assert b"not configured" in amx.amx_fault()


def test_the_emulation_multiplies_as_the_manual_says(amx):
    """Even and odd products in sums of their own, added to each other and then to C."""
    big, one = np.float32(2**24), np.float32(1)
    a, b, c = (np.zeros((16, 16, 2), np.float32) for _ in range(3))
    a[0, :3, 0], b[:3, 0, 0] = (big, one, -big), one  # big + 1 is big: the sum is 0
    a[1, :2, 0], a[1, 0, 1], b[:2, 1, 0], b[0, 1, 1] = (big, -big), one, one, one  # 1
    a[2, 0, 0], b[0, 2, 0] = 2.0**-100, 2.0**-27  # subnormal: 0
    a[3, 0, 0], b[0, 3, 0] = 2.0**-130, 2.0**100  # of a subnormal number: 0
    a[4, 0, 0], b[0, 4, 0] = 2.0**-100, 2.0**-26  # the smallest normal number
    tiles, got = [narrow(v, "bfloat16") for v in (a, b)], np.zeros((16, 16), np.float32)
    amx.amx_config(config_of([(16, 64)] * 3).ctypes)
    amx.amx_load(1, tiles[0].ctypes, 64)
    amx.amx_load(2, tiles[1].ctypes, 64)
    amx.amx_dpbf16(0, 1, 2)
    amx.amx_store(0, got.ctypes, 64)
    amx.amx_release()
    assert amx.amx_fault() is None
    assert got.diagonal()[:5].tolist() == [0, 1, 0, 0, TINY32]
