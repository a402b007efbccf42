"""Huge pages: memory in pieces of 2 MB, where the CPU else looks for one of 4 KB after the other.

Linux gives them to whoever asks with madvise(MADV_HUGEPAGE), if it is set so; other systems and
small tensors get usual memory.
"""

from __future__ import annotations

import math
import mmap
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


PAGE = 2 << 20  # bytes
# Bytes of a tensor that asks for them. Smaller ones may get memory that others freed, which glibc
# keeps for that up to this size: asked for anew, it would come on top.
LEAST = 32 << 20
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
MAPS = Path("/proc/self/smaps")


def huge_pages() -> str:
    """Who gets them: "always" (all), "madvise" (who asks) or "never"; "" but on Linux."""
    try:
        found = re.search(r"\[(\w+)\]", SETTING.read_text())
    except OSError:
        return ""
    return found[1] if found else ""


def advised(shape: Sequence[int]) -> Tensor:
    """An uninitialised uint8 tensor, on huge pages where the system gives them."""
    import torch

    size = math.prod(shape)
    if size < LEAST or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(tuple(shape), dtype=torch.uint8)
    memory = mmap.mmap(-1, size + PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them
        return torch.empty(tuple(shape), dtype=torch.uint8)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % PAGE
    return whole[start : start + size].view(tuple(shape))


def huge_share(tensors: Iterable[Tensor]) -> float | None:
    """The share of the tensors' bytes that lies on huge pages; None where that can't be told.

    Of a piece of memory that holds a tensor and more, its whole share is taken.
    """
    try:
        pieces = list(_pieces(MAPS.read_text()))
    except OSError:
        return None
    total = huge = 0.0
    for tensor in tensors:
        at, size = tensor.data_ptr(), tensor.nbytes
        for start, end, share in pieces:
            inside = min(end, at + size) - max(start, at)
            if inside > 0:
                total += inside
                huge += inside * share
    return huge / total if total else None


def _pieces(maps: str) -> Iterable[tuple[int, int, float]]:
    """(first byte, the one after the last, share on huge pages) of each piece of memory."""
    start = end = 0
    resident = 0
    for line in maps.splitlines():
        if head := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start, end = int(head[1], 16), int(head[2], 16)
        elif line.startswith("Rss:"):
            resident = int(line.split()[1])
        elif line.startswith("AnonHugePages:"):
            yield start, end, int(line.split()[1]) / resident if resident else 0.0
