"""The limits of the hardware, measured in the same rounds as what they limit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from .timing import over_rounds

if TYPE_CHECKING:
    from torch import Tensor

    from .timing import Ratio, Times


SIZE = 2048
WORDS = (
    f"read: all these weights read once, by all threads; GEMM: torch's dense {SIZE}^3; "
    "best of the rounds"
)


def limit_calls(words: Tensor, dtype: torch.dtype) -> dict[str, Callable[..., Tensor]]:
    """The contenders that show the limits: `read` (all of words) and `gemm`.

    float16 weights are computed with as float32, and torch has no fast GEMM of them: their
    limit is that of float32.
    """
    dtype = torch.float32 if dtype == torch.float16 else dtype
    a, b = (torch.randn(SIZE, SIZE).to(dtype) for _ in range(2))
    return {"read": lambda *_: words.max(), "gemm": lambda *_: a @ b}


def rates(times: Times, words: Tensor) -> dict[str, float]:
    """{"read_gbs", "gemm_gflops"} of the rounds that `limit_calls` took part in."""
    return {
        "read_gbs": words.nbytes / times["read"]["best_ms"] / 1e6,
        "gemm_gflops": 2 * SIZE**3 / times["gemm"]["best_ms"] / 1e6,
    }


def roof_share(times: Times, words: Tensor, nbytes: float, flop: float, name: str) -> Ratio | None:
    """How near a contender came to the roof of its own round: 1 is at it.

    None where it was once faster than the best that the limits ever were: then these were
    measured too low, and a share of them says nothing.
    """
    if roof(nbytes, flop, rates(times, words))["roof_ms"] > times[name]["best_ms"]:
        return None
    read = np.array(times["read"]["each_ms"]) * nbytes / words.nbytes
    compute = np.array(times["gemm"]["each_ms"]) * flop / (2 * SIZE**3)
    return over_rounds(np.maximum(read, compute) / times[name]["each_ms"])


def roof(nbytes: float, flop: float, rates: Mapping[str, float]) -> dict[str, float]:
    """The least time for reading `nbytes` and computing `flop`, in ms."""
    read, compute = nbytes / rates["read_gbs"] / 1e6, flop / rates["gemm_gflops"] / 1e6
    return {"read_ms": read, "gemm_ms": compute, "roof_ms": max(read, compute)}
