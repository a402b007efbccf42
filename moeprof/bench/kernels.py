"""Every variant of every kernel that the CPU has, on one thread, against scalar and its limit."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from .. import _C, _kernels
from ..backends.tables import SWIGLU, as_array
from ..measure.limits import SIZE, limit_calls
from ..measure.machine import cache_bytes
from ..measure.timing import interleave, steps
from ..show.tables import table
from . import plots
from .router import fitted_null, random_logits
from .settings import DTYPES
from .weights import random_tensors

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray
    from torch import Tensor

    from ..measure.timing import Times
    from ..show.console import Bar
    from .settings import Settings, Shape


SUFFIX = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
GEMM_WEIGHTS = 256  # rows; they stay in L2, so that the FMA units are the limit
ROUTED = 512  # tokens
GLU = 2**16  # numbers
WORDS = (
    "One call of a binding, the allocation of its result included, in gemm_* pack_*, in "
    "step_up the sorting. "
    "Limits, of one thread: for linear_* reading the same weights, which are larger than the "
    f"caches; for gemm_* the best rate seen of torch's dense {SIZE}^3 GEMM and of the kernels "
    "themselves (f16 weights: that of f32). The others work in the caches."
)


class Limit(NamedTuple):
    """What a kernel can't beat."""

    unit: str  # "GB/s" or "GFLOP/s"
    work: int  # of the kernel's call: bytes or FLOP
    call: Callable[..., object]  # shows the limit
    call_work: int
    peak: str = ""  # cases of one name share the best rate seen, their own included


class Case(NamedTuple):
    """A call that one kernel dominates."""

    kernel: str
    what: str
    call: Callable[..., object]
    limit: Limit | None = None


def rounds(settings: Settings) -> int:
    return steps([settings.repeats] * len(_cases(settings)))


def measure(settings: Settings, bar: Bar) -> dict[str, Any]:
    rows = []
    with torch.inference_mode():
        for make in _cases(settings):
            case = make()
            bar.note(f"kernels: {case.kernel}")
            rows += _rows(case, settings.repeats, bar)
    _share_peaks(rows)
    return {"contenders": sorted({row["variant"] for row in rows}), "rows": rows}


# ---- variants ----


def _limit_cpu(level: str | None) -> None:
    """In both extensions, which have their own tables of kernels."""
    _C.limit_cpu(level)
    _kernels.limit_cpu(level)


def _levels(kernel: str) -> dict[str, str]:
    """{variant: the poorest level of MOEPROF_CPU that selects it}, scalar first."""
    found: dict[str, str] = {}
    for level in ("scalar", "openblas", *_C.cpu_features()):
        _limit_cpu(level)
        for name, variant, _, used in _C.variants():
            if name == kernel and used:
                found.setdefault(variant, level)
    return found


def _rows(case: Case, repeats: int, bar: Bar) -> list[dict[str, Any]]:
    """A row for each variant; all of them, and the limit, in turn."""
    try:
        levels = _levels(case.kernel)
        calls = {"limit": case.limit.call} if case.limit else {}
        calls |= dict.fromkeys(levels, case.call)

        def prepare(name: str) -> tuple[()]:
            _limit_cpu(levels.get(name))
            return ()

        times = interleave(calls, repeats, prepare, bar)
    finally:
        _limit_cpu(os.environ.get("MOEPROF_CPU") or None)
    return [
        {
            "kernel": case.kernel,
            "what": case.what,
            "variant": variant,
            "times": {variant: times[variant]},
            "scalar_ratio": times["scalar"]["median_ms"] / times[variant]["median_ms"],
            **(_against(case.limit, times, variant) if case.limit else {}),
        }
        for variant in levels
    ]


def _against(limit: Limit, times: Times, variant: str) -> dict[str, Any]:
    own = times[variant]
    return {
        "unit": limit.unit,
        "peak": limit.peak,
        "rate": limit.work / own["median_ms"] / 1e6,
        "best_rate": limit.work / own["best_ms"] / 1e6,
        "limit_rate": limit.call_work / times["limit"]["best_ms"] / 1e6,
    }


def _share_peaks(rows: list[dict[str, Any]]) -> None:
    """Rows of one peak get its best rate as their limit, and all their share of the limit."""
    limited = [row for row in rows if "rate" in row]
    peaks: dict[str, float] = {}
    for row in limited:
        best = max(row["best_rate"], row["limit_rate"])
        peaks[row["peak"]] = max(best, peaks.get(row["peak"], 0))
    for row in limited:
        if row["peak"]:
            row["limit_rate"] = peaks[row["peak"]]
        row["of_limit"] = row["rate"] / row["limit_rate"]


# ---- the calls ----


def _cases(settings: Settings) -> list[Callable[[], Case]]:
    """Functions that make a Case each."""
    dtypes = DTYPES if settings.dtype is None else (settings.dtype,)
    shape = settings.shape
    made = [partial(_linear, shape, dtype) for dtype in dtypes]
    made += [partial(_gemm, shape, dtype, rows) for dtype in dtypes for rows in settings.tokens]
    made += [partial(_glu, dtype) for dtype in dtypes if dtype != "float16"]
    kernels = ("softmax", "logprob", "p_table", "p_normal", "order", "step_up")
    return made + [partial(_routing, shape, kernel) for kernel in kernels]


def _operands(
    rows: int, out: int, inner: int, dtype: str
) -> tuple[tuple[NDArray[Any], NDArray[np.int32], NDArray[Any], str], Tensor]:
    """(x, index, w, dtype) of _kernels.linear and _kernels.gemm, and w's words."""
    torch_dtype = getattr(torch, dtype)
    words, tensors = random_tensors({"w": (out, inner)}, torch_dtype)
    x = torch.randn(rows, inner).to(torch_dtype if dtype == "bfloat16" else torch.float32)
    return (as_array(x), np.arange(rows, dtype=np.int32), as_array(tensors["w"]), dtype), words


def _linear(shape: Shape, dtype: str) -> Case:
    itemsize = getattr(torch, dtype).itemsize
    out = -(-4 * cache_bytes() // (shape.hidden * itemsize))
    operands, words = _operands(1, out, shape.hidden, dtype)
    nbytes = out * shape.hidden * itemsize
    limit = Limit("GB/s", nbytes, words.max, words.nbytes)
    what = f"1 row, {nbytes / 1e6:.0f} MB"
    return Case(f"linear_{SUFFIX[dtype]}", what, partial(_kernels.linear, *operands), limit)


def _gemm(shape: Shape, dtype: str, rows: int) -> Case:
    operands, words = _operands(rows, GEMM_WEIGHTS, shape.hidden, dtype)
    flop = 2 * rows * GEMM_WEIGHTS * shape.hidden
    dense = limit_calls(words, getattr(torch, dtype))["gemm"]
    peak = "bfloat16" if dtype == "bfloat16" else "float32"
    limit = Limit("GFLOP/s", flop, dense, 2 * SIZE**3, peak)
    what = f"{rows} rows, ({GEMM_WEIGHTS}, {shape.hidden})"
    return Case(f"gemm_{SUFFIX[dtype]}", what, partial(_kernels.gemm, *operands), limit)


def _glu(dtype: str) -> Case:
    gate, up = (torch.randn(GLU).numpy() for _ in range(2))
    call = partial(_kernels.glu, SWIGLU[:4], gate, up, dtype)
    return Case(f"glu_{SUFFIX[dtype]}", f"{GLU} numbers, SwiGLU", call)


def _routing(shape: Shape, kernel: str) -> Case:
    z, null = random_logits(ROUTED, shape.experts), fitted_null(shape)
    p = _C.p_values(z, null.spec)
    sorting = ", sorted" if kernel == "step_up" else ""
    calls: dict[str, Callable[..., object]] = {
        "softmax": partial(_kernels.softmax, z, 1.0),
        "logprob": partial(_kernels.logprob, z),
        "p_table": partial(_C.p_values, z, ("table", "logit", null.table)),
        "p_normal": partial(_C.p_values, z, ("normal", "logit", None)),
        "order": partial(_kernels.order, p, z),
        "step_up": partial(_C.step_up, p, 0.3),
    }
    return Case(kernel, f"{ROUTED} rows of {shape.experts}{sorting}", calls[kernel])


# ---- what is shown ----


def tables(result: dict[str, Any]) -> Iterator[Any]:
    columns = {
        "kernel": "{}",
        "call": "{}",
        "variant": "{}",
        "ms": "{:.3f}",
        "x scalar": "{:.1f}",
        "rate": "{:.1f}",
        "unit": "{}",
        "limit": "{:.1f}",
        "of limit": "{:.2f}",
    }
    last, cells = None, []
    for row in result["rows"]:
        case = row["kernel"], row["what"]
        own = row["times"][row["variant"]]["median_ms"]
        values = [row.get(key) for key in ("rate", "unit", "limit_rate", "of_limit")]
        named = case if case != last else (None, None)
        cells.append([*named, row["variant"], own, row["scalar_ratio"], *values])
        last = case
    yield table(columns, cells)
    yield WORDS


def figure(result: dict[str, Any]) -> Figure:
    rows = result["rows"]
    kernels = list(dict.fromkeys(row["kernel"] for row in rows))
    entries = []
    for row in rows:
        text = f"{row['scalar_ratio']:.1f}"
        if "of_limit" in row:
            text += f" ({100 * row['of_limit']:.0f} % of {row['limit_rate']:.0f} {row['unit']})"
        rows_of = row["what"].split(",")[0] if row["kernel"].startswith("gemm") else ""
        label = " ".join(filter(None, (row["kernel"], rows_of, row["variant"])))
        entries.append((label, row["scalar_ratio"], text, kernels.index(row["kernel"])))
    return plots.bars(
        result,
        entries,
        "kernels on one thread",
        "speed relative to scalar; beside the bars: the share of the limit",
    )
