"""The two roofs of a model on its device: how fast its weights can be read, and multiplied."""

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
from ..models.decoding import only_device_of
from ..models.find import find_sites
from ..models.sizes import weights_of
from ..patching.span import Span
from .bits import words_of
from .limits import SIZE
from .machine import cache_bytes

LIMIT = 1 << 30  # bytes read in a round, more only where caches are larger
READ_SECONDS, FIRST_SECONDS, GEMM_SECONDS = 1.2, 1.2, 0.8
ROUNDS = 20


class Sizes(NamedTuple):
    """How much one call reads or multiplies, so that it isn't the calls that are measured."""

    piece: int  # bytes that it reads at most
    small: int  # bytes: tensors with less are read from a copy of several
    gemm: int  # rows of the largest product
    dtypes: tuple[torch.dtype, ...]  # that are multiplied as they are; others as float32


_FULL = (torch.float32, torch.float64, torch.bfloat16)
CPU = Sizes(64 << 20, 1 << 20, SIZE, _FULL)
# A GPU reads 256 MiB in some 50 to 1,000 us; a call of torch takes the host some 10.
DEVICE = Sizes(256 << 20, 256 << 20, 4 * SIZE, (*_FULL, torch.float16))

Key = tuple[torch.dtype, torch.device, int]
_measured: WeakKeyDictionary[nn.Module, dict[Key, Roofline]] = WeakKeyDictionary()


class Roofline(NamedTuple):
    """What bounds the speed of a model, measured on its own weights.

    read_gbs : 1e9 bytes per second, the weights read by all threads
    gemm_gflops : 1e9 operations per second of torch's dense matrix product in the weights'
        dtype; on a CPU float16 in float32, as it is computed, and quantised weights too
    dtype : of the weights, "bfloat16"; "uint8" of quantised ones
    weight_bytes : of the weights that the rate is of: the experts', or all without experts
    seconds : that the measurement took
    threads : torch's, on a CPU
    note : what to know about the numbers; "" if nothing
    device : that the weights are on, "cpu" or "cuda:0"
    """

    read_gbs: float
    gemm_gflops: float
    dtype: str
    weight_bytes: int
    seconds: float
    threads: int = 0
    note: str = ""
    device: str = "cpu"

    @property
    def conditions(self) -> str:
        """What the rates are of: "bfloat16", "bfloat16 on cuda:0"."""
        return self.dtype if self.device == "cpu" else f"{self.dtype} on {self.device}"


def roofline(model: nn.Module) -> Roofline:
    """Measure the read bandwidth of a model's own weights, and torch's peak in their dtype.

    Both are the best of several rounds: limits, not averages. The experts' weights are read
    where they are; of a large model evenly spread parts, 1 GiB or eight times the caches. Where
    all are so small that the calls would be measured (less than 1 MiB on a CPU, 256 MiB on
    another device) one copy of several is read, of at most 64 or 256 MiB. A CPU is timed by the
    host's clock, another device by its own events. Measured once per process, model, dtype,
    device and number of threads; a second call costs nothing. It takes less than 5 s, however
    large the model is.

    Parameters
    ----------
    model : torch.nn.Module
        All of it on one device. On a CPU its weights may be mapped from a file; nothing is
        written.

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
        If it has no weights, weights on several devices, or weights that are in no memory (meta).

    Example
    -------
    >>> moeprof.roofline(model).read_gbs  # doctest: +SKIP
    34.2
    """
    check_model("roofline", model)
    device = _device(model)
    weights = _weights(model)
    key = _key(weights, device)
    known = _measured.setdefault(model, {})
    if key not in known:
        with torch.inference_mode():
            known[key] = _measure(weights, *key)
    return known[key]


def known_roofline(model: nn.Module) -> Roofline | None:
    """What `roofline` measured for this model as it is now; None if it did not. Costs nothing."""
    known, device = _measured.get(model), only_device_of(model)
    if not known or device is None:
        return None
    return known.get(_key(_weights(model), device))


def _key(weights: list[Tensor], device: torch.device) -> Key:
    """What a measurement is good for: the dtype of the largest weights, their device, and on a
    CPU torch's threads."""
    dtype = max(weights, key=lambda tensor: tensor.nbytes).dtype
    return dtype, device, torch.get_num_threads() if device.type == "cpu" else 0


def _device(model: nn.Module) -> torch.device:
    """The one that the model is on."""
    if (device := only_device_of(model)) is not None:
        return device
    places: dict[torch.device, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        places.setdefault(tensor.device, name)
    if not places:
        raise ValueError(f"roofline: {type(model).__name__} has no weights")
    found = " and ".join(f"{name} is on the device {device}" for device, name in places.items())
    raise ValueError(
        f"roofline: {found}; measured is how fast one device reads its memory: load the model onto "
        "one"
    )


def _weights(model: nn.Module) -> list[Tensor]:
    """The experts' weights, or all of a model without experts."""
    try:
        modules = [site.experts for site in find_sites(model) if site.experts is not None]
    except ValueError:  # no MoE layers
        modules = []
    parts = [part for module in modules or [model] for part in module.modules()]
    weights = [*dict.fromkeys(t for part in parts for t in weights_of(part) if t.numel())]
    if not weights:
        raise ValueError(f"roofline: {type(model).__name__} has no weights")
    for tensor in weights:
        if tensor.is_quantized or tensor.layout is not torch.strided:
            kind = tensor.dtype if tensor.is_quantized else tensor.layout
            raise ValueError(
                f"roofline: its weights are {kind}, which has no plain memory to read; load the "
                "model in plain numbers"
            )
    return weights


def _measure(
    weights: list[Tensor], dtype: torch.dtype, device: torch.device, threads: int
) -> Roofline:
    begun = time.perf_counter()
    sizes = CPU if device.type == "cpu" else DEVICE
    total, caches = sum(tensor.nbytes for tensor in weights), _all_caches(device)
    pieces = _touched(_spread(_pieces(weights, sizes), max(LIMIT, 8 * caches)))
    read = sum(piece.nbytes for piece in pieces)
    seconds = _best(lambda: [piece.max() for piece in pieces], weights[0], READ_SECONDS)
    return Roofline(
        read / seconds / 1e9,
        _gemm_gflops(dtype, device, sizes),
        str(dtype).removeprefix("torch."),
        total,
        time.perf_counter() - begun,
        threads,
        _note(total, read, caches),
        str(device),
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


def _pieces(weights: list[Tensor], sizes: Sizes) -> list[Tensor]:
    """The memory of the weights as 1-D tensors of integers.

    A tensor that is not in one piece is left out.
    """
    flat = [words_of(tensor).reshape(-1) for tensor in weights if tensor.is_contiguous()]
    pieces = [
        part
        for words in flat
        if words.nbytes >= sizes.small
        for part in words.split(sizes.piece // words.itemsize)
    ]
    if not pieces:  # small ones only
        few, size = [], 0
        for tensor in weights:
            if size < sizes.piece:
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


def _best(call: Callable[[], object], near: Tensor, limit: float) -> float:
    """The shortest time of several calls on the device of a tensor, in s; `limit` s of them at
    most, but two."""
    times: list[int] = []
    begun = time.perf_counter()
    while len(times) < 2 or (len(times) < ROUNDS and time.perf_counter() - begun < limit):
        span = Span(near)
        call()
        times.append(span.stop().nanoseconds)
    return min(times) / 1e9


def _gemm_gflops(dtype: torch.dtype, device: torch.device, sizes: Sizes) -> float:
    """The best rate of square products, larger and larger ones while they take little time."""
    dtype = dtype if dtype in sizes.dtypes else torch.float32
    generator = torch.Generator(device).manual_seed(0)  # the user's own stays as it is
    best, size, seconds = 0.0, 256, 0.0
    # Twice the size is eight times the work.
    while size <= sizes.gemm and 8 * 2 * seconds < GEMM_SECONDS:
        try:
            a, b = (
                torch.randn(size, size, generator=generator, device=device).to(dtype)
                for _ in range(2)
            )
            seconds = _best(partial(torch.matmul, a, b), a, GEMM_SECONDS / 4)
        except torch.OutOfMemoryError:  # the model fills the device
            if not best:
                raise
            break
        best, size = max(best, 2 * size**3 / seconds / 1e9), 2 * size
    return best


def _all_caches(device: torch.device) -> int:
    """Bytes of a device's second-level cache, 0 where torch doesn't tell; on a CPU those of the
    last-level caches of the CPUs that this process may use."""
    if device.type != "cpu":
        tell = getattr(torch.get_device_module(device), "get_device_properties", None)
        return getattr(tell(device), "L2_cache_size", 0) if tell else 0
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    shared = set()
    for cpu in cpus:
        indices = Path(f"/sys/devices/system/cpu/cpu{cpu}/cache").glob("index*")
        last = max(indices, default=None, key=lambda index: index.name)
        if last is not None and (last / "shared_cpu_list").exists():
            shared.add((last / "shared_cpu_list").read_text())
    return cache_bytes() * max(1, len(shared))
