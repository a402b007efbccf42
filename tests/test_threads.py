"""Threads: how many, on whose runtime, from several Python threads, after fork.

Each pool is tried in a process of its own: "openmp" where torch is imported, "pthreads" where
NumPy is alone.
"""

import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import util
from commands import Forks

import moeprof
from moeprof import _C

pytestmark = pytest.mark.once

POOLS = {"openmp": "import torch; torch.ones(300, 300) @ torch.ones(300, 300)", "pthreads": ""}
linux = pytest.mark.skipif(sys.platform != "linux", reason="fork and /proc/self/task")
every_pool = pytest.mark.parametrize("pool", POOLS)

# In the child: a layer, a routing, and what one thread makes of them.
WORK = """
import hashlib, os, sys, threading
import numpy as np
import moeprof, util
from moeprof import _C

spec = ("bh", (0.3,), 1, 4, 1.0, "sum", 1, ("normal", "logit", None), None)
logits = np.random.default_rng(0).standard_normal((500, 8)).astype(np.float32)
layer = util.Layer(8, 96, 80)
hidden, (ids, weights) = layer.hidden(500), util.random_slots(500, 3, 8)

def run(threads, seed=0):
    return [layer(np.roll(hidden, seed), ids, weights, threads),
            *layer.moe(np.roll(hidden, seed), logits, spec, threads),
            *util.route(logits, "float32", spec, threads, True),
            _C.p_values(logits, ("table", "logprob", util.table_of(3.5)), threads)]

def digest(arrays):
    return hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()

def tasks():
    return len(os.listdir("/proc/self/task"))

moeprof.get_num_threads()  # what every call of moeprof asks first: it looks for OpenMP
"""


def in_pool(pool, code):
    """What a process with that pool prints; NumPy's and the wheel's OpenBLAS on one thread."""
    code = f"{POOLS[pool]}\n{WORK}\n{code}"
    if pool == "openmp" and sys.platform == "linux":
        return forked_with_torch(code)
    return util.run_python(code, OPENBLAS_NUM_THREADS="1").stdout.split()


@lru_cache
def begun():
    """Has imported torch, which takes seconds, and calculated nothing: what it forks is as a
    process that has just begun. It has no thread and not moeprof, which tells a fork by its own
    handler."""
    return Forks("import numpy, torch", OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="2")


@pytest.fixture(autouse=True, scope="module")
def _what_has_begun_ends():
    yield
    if begun.cache_info().currsize:
        begun().close()
        begun.cache_clear()


def forked_with_torch(code):
    done = begun().run(code, folder=Path(__file__).parent)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()


# ---- how many ----


@pytest.fixture
def thread_settings():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    moeprof.set_num_threads(None)


def test_threads_follow_torch_unless_told_otherwise(thread_settings):
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert moeprof.get_num_threads() == count == moeprof.cpu_info()["threads"]
    moeprof.set_num_threads(5)
    torch.set_num_threads(2)
    assert moeprof.get_num_threads() == 5
    assert torch.get_num_threads() == 2  # torch's own stay as they are
    moeprof.set_num_threads(None)
    assert moeprof.get_num_threads() == 2


@pytest.mark.parametrize("threads", (0, -1))
def test_too_few_threads(thread_settings, threads):
    moeprof.set_num_threads(2)
    with pytest.raises(ValueError, match=f"set_num_threads: expected at least 1, got {threads}"):
        moeprof.set_num_threads(threads)
    assert moeprof.get_num_threads() == 2


@pytest.mark.parametrize("threads", ("2", 2.5))
def test_threads_of_the_wrong_kind(thread_settings, threads):
    with pytest.raises(TypeError):
        moeprof.set_num_threads(threads)
    assert moeprof.get_num_threads() == torch.get_num_threads()


def test_more_threads_than_anyone_has(thread_settings):
    moeprof.set_num_threads(10**6)
    layer, (ids, weights) = util.Layer(4, 16, 16), util.random_slots(5, 2, 4)
    out = layer(layer.hidden(5), ids, weights, moeprof.get_num_threads())
    assert (out == layer(layer.hidden(5), ids, weights, 1)).all()


@linux
def test_without_torch_there_is_one_thread_for_each_cpu():
    code = """
assert "torch" not in sys.modules
print(moeprof.get_num_threads(), len(os.sched_getaffinity(0)), moeprof.cpu_info()["pool"])
moeprof.set_num_threads(3); print(moeprof.get_num_threads())"""
    threads, cpus, pool, then = in_pool("pthreads", code)
    assert threads == cpus and pool == "pthreads" and then == "3"


@linux
@pytest.mark.parametrize("asked", ([1, 1], [2, 1, 2], [4, 2, 3, 4], [3, 3, 3]))
def test_never_more_threads_than_asked_for(asked):
    code = f"""
before = tasks()
for threads in {asked}:
    for _ in range(20): run(threads)
    print(tasks() - before)"""
    for i, extra in enumerate(map(int, in_pool("pthreads", code))):
        most = max(asked[: i + 1])
        assert extra <= most - 1 and (extra > 0) == (most > 1)


@linux
def test_torchs_threads_are_used_and_no_others():
    code = """
torch.set_num_threads(2)
torch.ones(3000, 300) @ torch.ones(300, 300)
run(2)
before = tasks()
for threads in (1, 2, 2): run(threads)
print(tasks() - before, moeprof.cpu_info()["pool"])"""
    assert in_pool("openmp", code) == ["0", "openmp"]


# ---- where ----


@lru_cache
def name_and_digests(pool):
    """What the pool calls itself, and a digest of the same work on 1, 2, ... threads."""
    threads = (1, 2, 3, 4, 7, 4, 2, 1)
    return in_pool(pool, f"print(_C.threads()[0], *[digest(run(t)) for t in {threads}])")


@every_pool
def test_torch_brings_its_runtime(pool):
    if pool == "openmp" and not _C.find_openmp():
        pytest.skip("this torch has no GOMP_parallel to share")
    assert name_and_digests(pool)[0] == pool


@every_pool
def test_the_bits_depend_neither_on_the_threads_nor_on_the_pool(pool):
    assert set(name_and_digests(pool)[1:]) == {name_and_digests("pthreads")[1]}


def test_openmp_is_found_whichever_is_imported_first():
    code = "import moeprof, torch; print(moeprof.cpu_info()['pool'])"
    first = util.run_python(code).stdout.split()[0]
    assert first == name_and_digests("openmp")[0]


# ---- from several Python threads, after fork ----


@every_pool
def test_calls_from_four_python_threads(pool):
    code = """
expected = [digest(run(1, seed)) for seed in range(4)]
wrong, counts, ready, before = [], [0], threading.Barrier(4), tasks()
def caller(seed):
    ready.wait()
    for i in range(25):
        if digest(run(1 + (seed + i) % 3, seed)) != expected[seed]: wrong.append((seed, i))
        counts.append(tasks() - before - 4)  # less the callers
    ready.wait()
callers = [threading.Thread(target=caller, args=(seed,)) for seed in range(4)]
for c in callers: c.start()
for c in callers: c.join()
print(wrong == [], len(set(expected)), max(counts))"""
    right, different, extra = in_pool(pool, code)
    assert right == "True" and different == "4"
    # Regions do not run at once. Each caller may keep its two helpers on libgomp, asleep, and
    # one that leaves as its team shrinks may still be there when the next one starts.
    assert int(extra) <= (2 if pool == "pthreads" else 12)


# A child ends with 0 if it gets the same bits on threads of its own.
FORK = """
import signal
expected = digest(run(2))
def fork():
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a child that hangs dies of it
        moeprof.get_num_threads()
        same = {{digest(run(t)) for t in (1, 2, 4, 2)}} == {{expected}}
        os._exit(0 if same and tasks() == 4 else 1)
    return os.waitpid(child, 0)[1]
{before}
print({{fork() for _ in range({children})}})
{after}
print(digest(run(2)) == expected, _C.threads()[0])"""


@linux
@every_pool
def test_fork_after_use(pool):
    code = FORK.format(before="", children=1, after="")
    assert in_pool(pool, code) == ["{0}", "True", name_and_digests(pool)[0]]


@linux
@every_pool
def test_fork_while_another_thread_calculates(pool):
    """The children start with the pool marked busy, some with its lock held."""
    before = """
stop = threading.Event()
def calculate():
    few = logits[:64].copy()
    while not stop.is_set(): util.route(few, "float32", spec, 2, False)
busy = threading.Thread(target=calculate); busy.start()"""
    code = FORK.format(before=before, children=25, after="stop.set(); busy.join()")
    assert in_pool(pool, code) == ["{0}", "True", name_and_digests(pool)[0]]


@linux
@every_pool
def test_a_fork_of_a_fork(pool):
    code = """
expected = digest(run(2))
def descend(generations):
    if generations == 0: return True
    child = os.fork()
    if child == 0: os._exit(0 if digest(run(2)) == expected and descend(generations - 1) else 1)
    return os.waitpid(child, 0)[1] == 0
print(descend(3))"""
    assert in_pool(pool, code) == ["True"]
