"""The CPU, the kernels chosen for it, and the threads they run on."""

import sys
from numbers import Integral
from typing import Any

from .. import _C
from .pages import huge_pages

_MOST_THREADS = 2**31 - 1  # a C int; regions use no more than they have tasks for

_threads: int | None = None  # set_num_threads, else None


def cpu_info() -> dict[str, Any]:
    """What moeprof runs on.

    Returns
    -------
    dict
        ``features``: the CPU features kernels may use, as names of MOEPROF_CPU;
        ``kernels``: {kernel: variant in use}; ``threads``: their number;
        ``pool``: "openmp" (torch's) or "pthreads" (moeprof's own); ``huge_pages``: who gets
        memory in pieces of 2 MB, "always", "madvise" (quantised experts of moeprof do) or
        "never", "" where the system has no such setting.
    """
    threads = get_num_threads()  # looks for torch's OpenMP, which `pool` tells
    return {
        "features": _C.cpu_features(),
        "kernels": {kernel: variant for kernel, variant, _, used in _C.variants() if used},
        "threads": threads,
        "pool": _C.threads()[0],
        "huge_pages": huge_pages(),
    }


def set_num_threads(threads: int | None) -> None:
    """Use this many threads; None (the default) follows ``torch.get_num_threads()``.

    Raises
    ------
    ValueError
        If ``threads`` is below 1 or beyond a C int.
    TypeError
        If it is no integer.
    """
    global _threads
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, Integral)):
        raise TypeError(f"set_num_threads: expected an integer, got {threads!r}")
    if threads is not None and threads < 1:
        raise ValueError(f"set_num_threads: expected at least 1, got {threads}")
    if threads is not None and threads > _MOST_THREADS:
        raise ValueError(f"set_num_threads: expected at most {_MOST_THREADS}, got {threads}")
    _threads = None if threads is None else int(threads)


def get_num_threads() -> int:
    """The number of threads of the next call: as set, else torch's, else one per CPU."""
    torch = sys.modules.get("torch")
    if torch is not None:
        _C.find_openmp()
    if _threads is not None:
        return _threads
    return torch.get_num_threads() if torch is not None else _C.threads()[1]
