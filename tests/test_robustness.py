"""The extension under callers that change arrays meanwhile, with small stacks, with odd shapes."""

import platform
import re
import struct
import subprocess
import sys
import threading
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import util

from moeprof import _C, _kernels

pytestmark = pytest.mark.once

NORMAL = ("normal", "logit", None)


def spec(alpha=0.1, temperature=1.0, max_k=4):
    return ("bh", (alpha,), 1, max_k, temperature, "sum", 1, NORMAL, None)


# ---- arrays that change ----

FLIPPING = """
import threading
import numpy as np
import util
from moeprof import _C

stop = threading.Event()

def flip(array, good, bad):
    while not stop.is_set():
        array[...] = bad
        array[...] = good

def during(array, good, bad, call, times):
    thread = threading.Thread(target=flip, args=(array, good, bad))
    thread.start()
    try:
        for _ in range(times):
            try:
                call()
            except ValueError:
                pass
    finally:
        stop.set()
        thread.join()
        stop.clear()
"""


@pytest.mark.parametrize("dtype", ("int32", "int64"))
def test_ids_that_change_during_a_call_are_read_once(dtype):
    code = f"""
layer, (ids, weights) = util.Layer(4, 16, 16), util.random_slots(5_000, 2, 4)
ids, hidden = ids.astype("{dtype}"), layer.hidden(5_000)
last = ids[-1:, -1:]  # read at the end of each pass over the ids
during(last, last.copy(), 10**9, lambda: layer(hidden, ids, weights, 2), 500)
places = _C.tally_layout(4, True)
counts, sums = (np.zeros(sum(r * c for _, r, c in part.values()), t)
                for part, t in zip(places, (np.int64, float), strict=True))
recent = np.full(4, -1, "i")
tally = lambda: _C.tally(counts, sums, recent, ids, None, "float32", None, ids, 1, False)
during(last, last.copy(), 10**9, tally, 100)
"""
    util.run_python(FLIPPING + code)


@pytest.mark.parametrize("form", ("table", "conformal"))
@pytest.mark.parametrize("dtype", ("float32", "float16"))
def test_logits_that_become_nan_during_a_call(dtype, form):
    """What was checked is what is looked up in the tables."""
    code = f"""
logits = util.narrow(np.random.default_rng(0).standard_normal((50_000, 8)), "{dtype}")
table = util.table_of(3.5) if "{form}" == "table" else np.full(9218, 5000.0)
spec = ("bh", (0.3,), 1, 4, 1.0, "sum", 1, ("{form}", "logit", table), None)
bad = np.uint16(0x7fff) if logits.dtype == np.uint16 else np.nan
_C.limit_cpu("scalar")
first = logits[:, 0]
during(first, first.copy(), bad, lambda: util.route(logits, "{dtype}", spec, 2, True), 40)
"""
    util.run_python(FLIPPING + code)


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
        out = _C.experts(
            x, ids, w, _C.Layer(pointers, "float32", "float32", H, H, util.SWIGLU, "rows"), 1
        )
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
def test_a_spec_is_read_before_its_tables(place):
    """Whatever a number in it does to the arrays is done before their shapes are taken."""
    tables = np.tile(util.table_of(3.5), (4, 1))
    number = Meddling(tables, 2 if place == "max_k" else 0.5)
    given = list(spec(**{{"parameter": "alpha"}.get(place, place): number}))
    given[7] = ("table", "logit", tables)
    with pytest.raises(ValueError, match="p_table: expected 8196 values, got 32784"):
        _C.RouteSpec(tuple(given), "float32", 4)


@pytest.mark.filterwarnings("ignore:Setting the shape")
def test_a_number_of_threads_is_read_before_the_arrays():
    T, E, H = 8, 4, 16
    weights = np.zeros((3, E, H, H), np.float32)
    pointers = np.array([[m.ctypes.data for m in kind] for kind in weights], np.uint64)
    layer = _C.Layer(pointers, "float32", "float32", H, H, util.SWIGLU, "rows")
    few, many = (_C.RouteSpec(spec(), "float32", experts) for experts in (E, T * E))

    def logits():
        return np.zeros((T, E), np.float32)

    z, x = logits(), np.zeros((T, H), np.float32)
    routed = _C.route(z, many, Meddling(z, 1), True)
    assert routed[2].shape == (1,) and routed[4].shape == (1, T * E)
    z = logits()
    with pytest.raises(ValueError, match="router_logits: expected 4 experts.* got 32"):
        _C.route(z, few, Meddling(z, 1), False)
    z = logits()
    with pytest.raises(ValueError, match="router_logits: expected shape"):
        _C.moe(x, z, layer, few, Meddling(z, 1))
    with pytest.raises(ValueError, match="hidden: expected"):
        _C.moe(x, logits(), layer, few, Meddling(x, 1))


# ---- Python that a call itself runs ----

CALLBACKS = """
import numpy as np
import util
from moeprof import _C, _kernels

E, made = 1024, []

class Number:
    '''A number that shrinks arrays while it is read.'''

    def __init__(self, value, *arrays):
        self.value, self.arrays = value, arrays

    def shrink(self):
        for array in self.arrays:
            array.resize((1,) * array.ndim, refcheck=False)
        made.extend(np.zeros(100) for _ in range(10))  # what was freed is used again

    def __float__(self):
        self.shrink()
        return float(self.value)

    def __index__(self):
        self.shrink()
        return int(self.value)

def spec_with(place, *arrays, null=("normal", "logit", None)):
    spec = ["bh", (0.3,), 1, 4, 1.0, "sum", 1, null, None]
    if place == 1:
        spec[1] = (Number(0.3, *arrays),)
    else:
        spec[place] = Number(spec[place], *arrays)
    return tuple(spec)

def refused(call):
    try:
        call()
    except (TypeError, ValueError) as error:
        return print(error)
    raise AssertionError("a row of 1 expert was taken for one of 1,024")
"""


PLACES = (1, 2, 3, 4, 6)


@lru_cache
def places_done():
    """The places of a number in the spec that the process got through, and how it ended."""
    code = f"""
for place, threads in [(place, threads) for place in {PLACES} for threads in (1, 2)]:
    z = np.ones((20_000, E), "f4")
    refused(lambda: util.route(z, "float32", spec_with(place, z), threads, True))
    assert z.shape == (1, 1)
    layer = util.Layer(4, 16, 16)
    hidden, z = layer.hidden(20_000), np.ones((20_000, 4), "f4")
    refused(lambda: layer.moe(hidden, z, spec_with(place, z, hidden), threads))
    hidden, z = layer.hidden(20_000), np.ones((20_000, 4), "f4")
    refused(lambda: layer.moe(hidden, z, spec_with(place, hidden), threads))
    hidden, pointers = layer.hidden(20), layer.pointers.copy()
    f32, sixteen = ("float32", "float32"), Number(16, pointers)
    refused(lambda: _C.Layer(pointers, *f32, sixteen, 16, util.SWIGLU, "rows"))
    pointers = layer.pointers.copy()
    silu = ("silu", Number(1.0, pointers), 1.0, 0.0)
    refused(lambda: _C.Layer(pointers, "float32", "float32", 16, 16, silu, "rows"))
    z, table = np.ones((20_000, 64), "f4"), np.tile(util.table_of(3.5), (64, 1))
    null = "table", "logit", table
    refused(lambda: util.route(z, "float32", spec_with(place, table, null=null), threads, True))
    print(f"place {{place}} on {{threads}}", flush=True)
"""
    return util.run_python(CALLBACKS + code, check=False)


@pytest.mark.parametrize("place", PLACES)
def test_a_number_of_the_spec_may_change_arrays(place):
    done = places_done()
    printed = done.stdout.splitlines()
    assert {f"place {place} on 1", f"place {place} on 2"} <= {*printed}, done.stderr[-3000:]


def test_other_numbers_that_change_arrays():
    code = """
layer = util.Layer(4, 16, 16)
ids, weights = util.random_slots(20_000, 2, 4)
for place in range(3):
    arrays = [layer.hidden(20_000), ids.copy(), weights.copy()]
    number = Number(1, arrays[place])
    refused(lambda: _C.experts(*arrays, layer.layer, number))
z = np.ones((20_000, E), "f4")
assert _kernels.softmax(z, Number(1, z)).shape == (1, 1)
p = np.ones((20_000, E))
assert _C.step_up(p, Number(0.5, p)).shape == (1,)
x, w = np.ones((200, 64), "f4"), np.ones((4, 64), "f4")
assert _C.dense(x, w.ctypes.data, 4, 0, "float32", "float32", Number(2, x)).shape == (1, 4)
z = np.ones((20_000, E), "f4")
assert _C.p_values(z, ("normal", "logit", None), Number(1, z)).shape == (1, 1)
for field in range(3):
    counts = _C.tally_layout(4, True)
    state = [*(np.zeros(sum(r * c for _, r, c in part.values()), t)
               for part, t in zip(counts, (np.int64, float), strict=True)), np.full(4, -1, "i")]
    number = Number(5, state[field])
    refused(lambda: _C.tally(*state, ids, None, "float32", None, None, number, False))
"""
    util.run_python(CALLBACKS + code)


# ---- shapes without elements: nothing to do is done at once ----

MANY = 2**40
EMPTY = {
    "order": f"_kernels.order(None, none(({MANY}, 0)))",
    "order with p": f"_kernels.order(none(({MANY}, 0), float), none(({MANY}, 0)))",
    "softmax": f"_kernels.softmax(none(({MANY}, 0)), 1.0)",
    "logprob": f"_kernels.logprob(none(({MANY}, 0)))",
    "step_up": f"_C.step_up(none(({MANY}, 0), float), 0.1)",
    "step_up, memory that is there": "_C.step_up(none((2**28, 0), float), 0.1)",
    "linear": f"_kernels.linear(none(({MANY}, 0)), none(0, 'i'), none((3, 0)), 'float32')",
    "dense": f"_C.dense(none((0, 4)), 64, {MANY}, 0, 'float32', 'float32', 2)",
    "route": f"util.route(none((0, {MANY})), 'float32', SPEC, 2, True)",
    "route without experts": f"util.route(none(({MANY}, 0)), 'float32', SPEC, 2, True)",
    "p_values": f"_C.p_values(none(({MANY}, 0)), SPEC[7], 2)",
    "experts": f"layer(none((0, 16)), none((0, {MANY}), 'i'), none((0, {MANY})), 2)",
    "moe": "layer.moe(none((0, 16)), none((0, 4)), SPEC, 2)",
    "tally": f"tally(none(({MANY}, 0), 'i'))",
    "tally with what was before": f"tally(none(({MANY}, 0), 'i'), none(({MANY}, 0), 'i'))",
    "benjamini_hochberg": f"moeprof.benjamini_hochberg(none(({MANY}, 0)), 0.1)",
}


@lru_cache
def empty_cases_done():
    """Which of them came to an end, in a process that takes one after the other."""
    code = f"""
import traceback
import numpy as np, moeprof, util
from moeprof import _C, _kernels
SPEC = ("bh", (0.3,), 1, 4, 1.0, "sum", 1, ("normal", "logit", None), None)
layer, none = util.Layer(4, 16, 16), lambda shape, dtype="f4": np.empty(shape, dtype)

def tally(ids, before=None):
    counts, sums = (np.zeros(sum(r * c for _, r, c in part.values()), t)
                    for part, t in zip(_C.tally_layout(4, False), (np.int64, float), strict=True))
    _C.tally(counts, sums, np.full(4, -1, "i"), ids, None, "float32", None, before, 1, False)

for what, code in {EMPTY!r}.items():
    try:
        eval(code)
    except (ValueError, MemoryError):
        pass
    except BaseException:
        traceback.print_exc()
        continue
    print(what, flush=True)
"""
    try:
        return util.run_python(code, timeout=60, check=False)
    except subprocess.TimeoutExpired as error:
        return subprocess.CompletedProcess(error.cmd, -1, (error.stdout or b"").decode(), "hangs")


@pytest.mark.parametrize("what", EMPTY)
def test_what_has_no_elements_takes_no_time(what):
    done = empty_cases_done()
    assert what in done.stdout.splitlines(), (done.returncode, done.stderr[-3000:])


def test_tokens_without_slots_are_counted():
    counts, sums = (
        np.zeros(sum(r * c for _, r, c in part.values()), t)
        for part, t in zip(_C.tally_layout(4, False), (np.int64, float), strict=True)
    )
    ids, real = np.empty((9, 0), np.int32), np.arange(9) < 7
    for given in (None, real):
        _C.tally(counts, sums, np.full(4, -1, "i"), ids, None, "float32", given, None, 1, True)
    at, rows, columns = _C.tally_layout(4, False)[0]["k"]
    k = counts[at : at + rows * columns].reshape(rows, columns)
    assert k[:, 0].tolist() == [9 + 7, 2] and k.sum() == 18


# ---- little stack ----


@pytest.mark.parametrize("level", util.level_names())
def test_threads_of_little_stack(level):
    """All routers, nulls and experts of the largest size, in a thread of 64 KiB."""
    util.force_level(level)
    code = f"""
import threading
import numpy as np, moeprof, util
from moeprof import _C

_C.limit_cpu("{level}")
E, rng = 1024, np.random.default_rng(0)
z = rng.standard_normal((33, E)).astype("f4")  # two tasks of a routing
nulls = [("normal", "logit", None), ("softmax", "logit", None),
         ("table", "logprob", util.table_of(3.5)), ("conformal", "centred", np.ones(9218))]
tables = {{"local_fdr": np.linspace(1, 0, 8193), "weighted_bh": np.ones(E)}}
layer, (ids, weights) = util.Layer(4, 64, 64), util.random_slots(33, 2, 4)

def work():
    for name, parameters in _C.routers().items():
        for null in nulls:
            spec = (name, (0.5,) * len(parameters), 1, 16, 1.0, "mass", 4, null, tables.get(name))
            for threads in (1, 3):
                util.route(z, "float32", spec, threads, True)
                done.append(name)
    layer(layer.hidden(33), ids, weights, 3)
    layer.moe(layer.hidden(33), z[:, :4].copy(), (*spec[:3], 2, *spec[4:7], nulls[0], None), 3)
    _C.dense(z, z.ctypes.data, 33, 0, "float32", "float32", 3)
    done.append("all")

done = []
spec = ("bh", (0.3,), 1, 4, 1.0, "sum", 1, nulls[0], None)
threading.stack_size(64 * 1024)
thread = threading.Thread(target=work)
thread.start()
thread.join()
assert done[-1] == "all", done
"""
    util.run_python(code)


def test_threads_share_no_scratch():
    """Routings of several threads at once are those of one alone."""
    rng = np.random.default_rng(0)
    inputs = [rng.normal(size=(300, 64)).astype(np.float32) for _ in range(4)]
    alone = [util.route(z, "float32", spec(), 1, True) for z in inputs]
    wrong = []

    def run(z, expected):
        for _ in range(30):
            found = util.route(z, "float32", spec(), 2, True)
            if not all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True)):
                wrong.append(z)

    threads = [threading.Thread(target=run, args=pair) for pair in zip(inputs, alone, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- the built files ----


@pytest.mark.skipif(
    sys.platform != "linux" or platform.architecture()[0] != "64bit", reason="reads 64-bit ELF"
)
@pytest.mark.parametrize("module", (_C, _kernels), ids=lambda module: module.__name__)
def test_the_file_is_hardened(module):
    """Full RELRO and a stack protector."""
    data = Path(module.__file__).read_bytes()
    if b"__asan_init" in data:
        pytest.skip("built with MOEPROF_SANITIZE, which brings checks of its own")
    (offset,), (size, count) = (
        struct.unpack_from(*at) for at in (("<Q", data, 32), ("<HH", data, 54))
    )
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
