"""The extension under callers that change arrays meanwhile, with small stacks, with odd shapes."""

import platform
import re
import struct
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import util

from moeprof import _C

NORMAL = ("normal", "logit", None)


def spec(alpha=0.1, temperature=1.0, max_k=4):
    return ("bh", (alpha,), 1, max_k, temperature, "sum", 1, NORMAL, None)


# ---- arrays that change ----


def test_ids_may_change_while_experts_run():
    """A thread writes ids far outside while the experts run: an error or a result, no crash."""
    code = """if True:
        import threading
        import numpy as np
        from moeprof import _C
        T, E, H, I = 64, 4, 32, 32
        weights = np.ones((3, E, I, H), np.float32)
        pointers = np.array([[m.ctypes.data for m in kind] for kind in weights], np.uint64)
        x, ids = np.ones((T, H), np.float32), np.zeros((T, 4), np.int32)
        w, stop = np.ones((T, 4), np.float32), threading.Event()
        def change():
            while not stop.is_set():
                ids[:] = 1 << 30
                ids[:] = 0
        thread = threading.Thread(target=change)
        thread.start()
        done = refused = 0
        while done < 300 or refused < 20:
            try:
                _C.experts(x, ids, w, "float32", pointers, I, 1)
                done += 1
            except ValueError:
                refused += 1
            if done + refused > 20000:
                break
        stop.set(); thread.join()
        print(done > 0)"""
    assert util.run_python(code).stdout.split() == ["True"]


def test_ids_are_those_of_one_moment():
    """The first and the last token get the same expert, however often a thread changes both
    while the tokens between them run."""
    T, E, H = 8192, 2, 64
    weights = np.ones((3, E, H, H), np.float32)
    weights[:, 1] = 2
    pointers = np.array([[m.ctypes.data for m in kind] for kind in weights], np.uint64)
    x, w = np.ones((T, H), np.float32), np.ones((T, 4), np.float32)
    for _ in range(20):
        ids, going = np.zeros((T, 4), np.int32), threading.Event()

        def change(ids=ids, going=going):
            going.set()
            while going.is_set():
                ids[:: T - 1] ^= 1  # so few that NumPy keeps the GIL

        thread = threading.Thread(target=change)
        thread.start()
        going.wait()
        out = _C.experts(x, ids, w, "float32", pointers, H, 1)
        going.clear()
        thread.join()
        assert (out[0] == out[-1]).all()


class Meddling:
    """A number whose reading changes the shape of an array that the call was given."""

    def __init__(self, array, value):
        self.array, self.value = array, value

    def __float__(self):
        self.array.shape = (1, self.array.size)
        return self.value

    def __index__(self):
        self.array.shape = (1, self.array.size)
        return int(self.value)


@pytest.mark.filterwarnings("ignore:Setting the shape")
@pytest.mark.parametrize("place", ("parameter", "temperature", "max_k"))
def test_a_spec_is_read_before_the_arrays(place):
    """Whatever a number in it does to the arrays is done before their shapes are taken."""
    T, E, H = 8, 4, 16
    weights = np.zeros((3, E, H, H), np.float32)
    pointers = np.array([[m.ctypes.data for m in kind] for kind in weights], np.uint64)

    def given(array, value):
        number = Meddling(array, value)
        return spec(**{{"parameter": "alpha"}.get(place, place): number})

    value = 2 if place == "max_k" else 0.5
    logits = np.zeros((T, E), np.float32)
    routed = _C.route(logits, "float32", given(logits, value), 1, True)
    assert routed[2].shape == (1,) and routed[4].shape == (1, T * E)
    logits = np.zeros((64, 64), np.float32)  # 4,096 experts then, more than there is room for
    with pytest.raises(ValueError, match="router_logits: expected 1 to 1024 experts, got 4096"):
        _C.route(logits, "float32", given(logits, value), 1, False)
    logits, x = np.zeros((T, E), np.float32), np.zeros((T, H), np.float32)
    with pytest.raises(ValueError, match="router_logits: expected shape"):
        _C.moe(x, logits, "float32", pointers, H, given(logits, value), 1)
    with pytest.raises(ValueError, match="router_logits: expected shape"):
        logits = np.zeros((T, E), np.float32)
        _C.moe(x, logits, "float32", pointers, H, given(x, value), 1)


# ---- shapes ----


def test_rows_of_no_columns_take_no_time():
    empty = np.empty((1 << 40, 0), np.float32)
    for result in (_C.order(None, empty), _C.softmax(empty, 1.0), _C.logprob(empty)):
        assert result.shape == empty.shape
    wide = np.empty((1 << 40, 0), np.float64)
    assert _C.order(wide, empty).shape == empty.shape


# ---- stacks ----


@pytest.mark.skipif(sys.platform != "linux", reason="stack sizes are set as on Linux")
@pytest.mark.parametrize("level", ["scalar", *_C.cpu_features()])
def test_routing_needs_little_stack(level):
    """E = 1,024, every router, in a thread of 96 KB."""
    code = f"""if True:
        import threading
        import numpy as np
        from moeprof import _C
        from moeprof.routers import REGISTRY
        _C.limit_cpu({level!r})
        E = 1024
        logits = np.random.default_rng(0).normal(size=(70, E)).astype(np.float32)
        specs, ran = [], []
        for name, cls in REGISTRY.items():
            router = cls(0.1) if name in ("fixed_p", "bh", "by") else None
            if router is not None:
                specs.append(router.spec(E, norm="mass", norm_k=8))
        for name in ("topk", "top_p", "entropy", "kneedle", "gap_ratio", "higher_criticism"):
            specs.append(REGISTRY[name]().spec(E, norm="mass", norm_k=8))
        def run():
            for spec in specs:
                _C.route(logits, "float32", spec, 1, True)
            ran.append(len(specs))
        threading.stack_size(96 << 10)
        thread = threading.Thread(target=run)
        thread.start(); thread.join()
        print(ran)"""
    assert util.run_python(code).stdout.strip() == "[9]"


def test_threads_share_no_scratch():
    """Routings of several threads at once are those of one alone."""
    rng = np.random.default_rng(0)
    inputs = [rng.normal(size=(300, 64)).astype(np.float32) for _ in range(4)]
    alone = [_C.route(z, "float32", spec(), 1, True) for z in inputs]
    wrong = []

    def run(z, expected):
        for _ in range(30):
            found = _C.route(z, "float32", spec(), 2, True)
            if not all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True)):
                wrong.append(z)

    threads = [threading.Thread(target=run, args=pair) for pair in zip(inputs, alone, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- the built file ----

ELF = Path(_C.__file__)


@pytest.mark.skipif(
    sys.platform != "linux" or platform.architecture()[0] != "64bit", reason="reads 64-bit ELF"
)
def test_the_file_is_hardened():
    """Full RELRO and a stack protector."""
    data = ELF.read_bytes()
    if b"__asan_init" in data:
        pytest.skip("built with MOEPROF_SANITIZE, which brings checks of its own")
    (offset,), (size, count) = (struct.unpack_from(*at) for at in (("<Q", data, 32),
                                                                   ("<HH", data, 54)))
    headers = [struct.unpack_from("<IIQQQQQQ", data, offset + i * size) for i in range(count)]
    relro, dynamic = 0x6474E552, 2
    assert relro in [h[0] for h in headers]
    at, length = next((h[2], h[5]) for h in headers if h[0] == dynamic)
    tags = dict(struct.iter_unpack("<QQ", data[at : at + length // 16 * 16]))
    flags, flags_1 = tags.get(30, 0), tags.get(0x6FFFFFFB, 0)
    assert flags & 8 or flags_1 & 1 or 24 in tags, "symbols are bound lazily"
    assert b"__stack_chk_fail" in data
    if re.search(r"glibc", platform.libc_ver()[0]):
        assert re.search(rb"__mem(cpy|set|move)_chk", data), "_FORTIFY_SOURCE had no effect"
