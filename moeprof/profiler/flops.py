"""The FLOPs of grouped matrix products, which torch's FlopCounterMode does not know.

transformers 5 runs its experts by ``torch.nn.functional.grouped_mm``. FlopCounterMode takes its
formulas from one dictionary when it is made, and counts an operation that is not there as 0.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import flop_counter

_active = 0
_added: list[Any] = []  # the operations whose formula is ours


def count_grouped_mm() -> Callable[[], None]:
    """Let counters made from now on count grouped products; returns what undoes it.

    May be called again while active: the formula goes with the last undo. A formula that torch
    has is left alone. An undo called twice does nothing the second time.
    """
    global _active
    missing = [op for op in _operations() if op not in flop_counter.flop_registry]
    flop_counter.flop_registry.update(dict.fromkeys(missing, _grouped_mm_flop))
    _added.extend(missing)
    _active += 1
    done = False

    def undo() -> None:
        global _active
        nonlocal done
        if done:
            return
        done = True
        _active -= 1
        if not _active:
            for op in _added:
                if flop_counter.flop_registry.get(op) is _grouped_mm_flop:
                    del flop_counter.flop_registry[op]
            _added.clear()

    return undo


def _operations() -> list[Any]:
    """The grouped products that this torch and this transformers have."""
    names = ((torch.ops.aten, "_grouped_mm"), (torch.ops.transformers, "grouped_mm_fallback"))
    return [getattr(space, name) for space, name in names if hasattr(space, name)]


def _grouped_mm_flop(
    a: torch.Tensor, b: torch.Tensor, *args: Any, out_val: Any = None, **kwargs: Any
) -> int:
    """2 M K N of each group, of tensors as torch hands them to a raw formula.

    (T, K) x (G, K, N): the T rows that lie in a group; (G, M, K) x (K, T'): columns likewise;
    (M, T) x (T, N): the inner dimension is what is grouped; (G, M, K) x (G, K, N): as bmm.
    """
    rows, inner, columns = a.shape[-2], a.shape[-1], b.shape[-1]
    if a.dim() == 3 and b.dim() == 3:
        return 2 * a.shape[0] * rows * inner * columns
    offsets = kwargs.get("offs")
    if offsets is None:
        offsets = next((v for v in args if _is_offsets(v)), None)
    if a.dim() == 2 and b.dim() == 3:
        rows = _inside(offsets, rows)
    elif a.dim() == 3:
        columns = _inside(offsets, columns)
    else:
        inner = _inside(offsets, inner)
    return 2 * rows * inner * columns


# FlopCounterMode gives shapes only, unless a formula asks.
_grouped_mm_flop._get_raw = True  # type: ignore[attr-defined]  # of a function


def _is_offsets(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in (torch.int32, torch.int64)


def _inside(offsets: torch.Tensor | None, size: int) -> int:
    """How many of `size` rows lie in a group: up to the last offset, where it has a value."""
    if offsets is None or not offsets.numel() or offsets.is_meta or _is_fake(offsets):
        return size
    return min(size, int(offsets[-1]))


def _is_fake(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, torch._subclasses.FakeTensor)
