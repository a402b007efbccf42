"""The two roofs of a model on this machine: how fast its weights can be read, and multiplied."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..checks import check_model
from ..models.find import find_sites
from ..models.sizes import weights_of
from .bits import words_of
from .limits import SIZE
from .machine import cache_bytes

LIMIT = 1 << 30  # bytes read in a round, more only where caches are larger
PIECE = 64 << 20  # bytes in one call
SMALL = 1 << 20  # bytes: below, the calls would be measured
READ_SECONDS, FIRST_SECONDS, GEMM_SECONDS = 1.2, 1.2, 0.8
ROUNDS = 20

_measured: WeakKeyDictionary[nn.Module, dict[tuple[torch.dtype, int], Roofline]] = (
    WeakKeyDictionary()
)


class Roofline(NamedTuple):
    """What bounds the speed of a model, measured on its own weights.

    read_gbs : 1e9 bytes per second, the weights read by all threads
    gemm_gflops : 1e9 operations per second of torch's dense matrix product in the weights'
        dtype; float16 in float32, as it is computed, and quantised weights too
    dtype : of the weights, "bfloat16"; "uint8" of quantised ones
    weight_bytes : of the weights that the rate is of: the experts', or all without experts
    seconds : that the measurement took
    threads : torch's
    note : what to know about the numbers; "" if nothing
    """

    read_gbs: float
    gemm_gflops: float
    dtype: str
    weight_bytes: int
    seconds: float
    threads: int = 0
    note: str = ""


def roofline(model: nn.Module) -> Roofline:
    """Measure the read bandwidth of a model's own weights, and torch's peak in their dtype.

    Both are the best of several rounds: limits, not averages. The experts' weights are read
    where they are (those of less than 1 MiB, where the calls would be measured, from one copy
    of at most 64 MiB); of a large model evenly spread parts, 1 GiB or eight times the caches.
    Measured once per process, model, dtype and number of threads; a second call costs nothing.
    It takes less than 5 s, however large the model is.

    Parameters
    ----------
    model : torch.nn.Module
        On the CPU. Its weights may be mapped from a file; nothing is written.

    Returns
    -------
    Roofline
        In GB/s and GFLOP/s (1e9). `note` says so where the weights fit the caches: their rate
        is then that of the caches, and a larger model's is lower.

    Raises
    ------
    TypeError
        If `model` is no module.
    ValueError
        If it has no weights, or weights that are not in this machine's memory (meta, cuda).

    Example
    -------
    >>> moeprof.roofline(model).read_gbs  # doctest: +SKIP
    34.2
    """
    check_model("roofline", model)
    weights = _weights(model)
    key = _key(weights)
    known = _measured.setdefault(model, {})
    if key not in known:
        with torch.inference_mode():
            known[key] = _measure(weights, *key)
    return known[key]


def known_roofline(model: nn.Module) -> Roofline | None:
    """What `roofline` measured for this model as it is now; None if it did not. Costs nothing."""
    known = _measured.get(model)
    if not known or any(parameter.device.type != "cpu" for parameter in model.parameters()):
        return None
    return known.get(_key(_weights(model)))


def _key(weights: list[Tensor]) -> tuple[torch.dtype, int]:
    """What a measurement is good for: the dtype of the largest weights, and torch's threads."""
    return max(weights, key=lambda tensor: tensor.nbytes).dtype, torch.get_num_threads()


def _weights(model: nn.Module) -> list[Tensor]:
    """The experts' weights, or all of a model without experts."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != "cpu":
            raise ValueError(
                f"roofline: {name} is on the device {tensor.device}; measured is what this "
                "machine's CPU reads from its memory"
            )
    try:
        modules = [site.experts for site in find_sites(model) if site.experts is not None]
    except ValueError:  # no MoE layers
        modules = []
    parts = [part for module in modules or [model] for part in module.modules()]
    weights = [*dict.fromkeys(t for part in parts for t in weights_of(part) if t.numel())]
    if not weights:
        raise ValueError(f"roofline: {type(model).__name__} has no weights")
    return weights


def _measure(weights: list[Tensor], dtype: torch.dtype, threads: int) -> Roofline:
    begun = time.perf_counter()
    total, caches = sum(tensor.nbytes for tensor in weights), _all_caches()
    pieces = _touched(_spread(_pieces(weights), max(LIMIT, 8 * caches)))
    read = sum(piece.nbytes for piece in pieces)
    seconds = _best(lambda: [piece.max() for piece in pieces], READ_SECONDS)
    return Roofline(
        read / seconds / 1e9,
        _gemm_gflops(dtype),
        str(dtype).removeprefix("torch."),
        total,
        time.perf_counter() - begun,
        threads,
        _note(total, read, caches),
    )


def _note(total: int, read: int, caches: int) -> str:
    if total <= caches:
        return (
            f"the weights ({total / 1e6:.1f} MB) fit the caches ({caches / 1e6:.1f} MB): this is "
            "the rate of the caches, not of the memory"
        )
    if read <= 2 * caches:
        return (
            f"only {read / 1e6:.0f} MB were read, and the caches hold {caches / 1e6:.0f} MB: the "
            "memory may be slower"
        )
    return ""


def _pieces(weights: list[Tensor]) -> list[Tensor]:
    """The memory of the weights as 1-D tensors of integers, each of 1 to 64 MiB.

    A tensor that is not in one piece is left out.
    """
    flat = [words_of(tensor).reshape(-1) for tensor in weights if tensor.is_contiguous()]
    pieces = [
        part
        for words in flat
        if words.nbytes >= SMALL
        for part in words.split(PIECE // words.itemsize)
    ]
    if not pieces:  # small ones only
        few, size = [], 0
        for tensor in weights:
            if size < PIECE:
                few.append(words_of(tensor.contiguous()).reshape(-1).view(torch.uint8))
                size += few[-1].nbytes
        pieces = [words_of(torch.cat(few))]
    return pieces


def _spread(pieces: list[Tensor], limit: float) -> list[Tensor]:
    """Evenly spaced ones of the pieces, `limit` bytes together."""
    step = max(1, sum(piece.nbytes for piece in pieces) / limit)
    return [pieces[int(i * step)] for i in range(int(len(pieces) / step))] or pieces[:1]


def _touched(pieces: list[Tensor]) -> list[Tensor]:
    """Those that a first read, which may have to fetch them from a file, gets through in time."""
    end = time.perf_counter() + FIRST_SECONDS
    for number, piece in enumerate(pieces, 1):
        piece.max()
        if time.perf_counter() > end:
            return pieces[:number]
    return pieces


def _best(call: Callable[[], object], limit: float) -> float:
    """The shortest time of several calls, in s; `limit` s of them at most, but two."""
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < 2 or (len(times) < ROUNDS and time.perf_counter() - begun < limit):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def _gemm_gflops(dtype: torch.dtype) -> float:
    """The best rate of square products, larger and larger ones while they take little time."""
    dtype = dtype if dtype in (torch.float32, torch.float64, torch.bfloat16) else torch.float32
    generator = torch.Generator().manual_seed(0)  # the user's own stays as it is
    best, size, seconds = 0.0, 256, 0.0
    while size <= SIZE and 8 * 2 * seconds < GEMM_SECONDS:  # twice the size, eight times the work
        a, b = (torch.randn(size, size, generator=generator).to(dtype) for _ in range(2))
        seconds = _best(partial(torch.matmul, a, b), GEMM_SECONDS / 4)
        best, size = max(best, 2 * size**3 / seconds / 1e9), 2 * size
    return best


def _all_caches() -> int:
    """Bytes of the last-level caches of the CPUs that this process may use."""
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    shared = set()
    for cpu in cpus:
        indices = Path(f"/sys/devices/system/cpu/cpu{cpu}/cache").glob("index*")
        last = max(indices, default=None, key=lambda index: index.name)
        if last is not None and (last / "shared_cpu_list").exists():
            shared.add((last / "shared_cpu_list").read_text())
    return cache_bytes() * max(1, len(shared))
