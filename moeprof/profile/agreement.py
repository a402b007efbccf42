"""How far two routings of the same tokens choose the same experts."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas
    from numpy.typing import NDArray


_AT_ONCE = 1 << 24  # comparisons held in memory


def router_agreement(
    first: Any, second: Any, *, k: int | None = None, num_experts: int | None = None
) -> Any:
    """The share of one routing's experts that another chose too, token by token.

    That is |S ∩ S'| / k, with S a token's experts in the first and S' those in the second.

    Parameters
    ----------
    first, second : integer arrays or tensors (T, k) and (T, k'), or paths or frames of records
        The experts of the same T tokens in any order; -1 is an empty slot, an expert that stands
        twice in a row counts once. Records: what `MoEProfiler(model, records=...)` wrote, as
        paths or as the frames of `read_records`.
    k : int, optional
        What to divide by; the number of experts of each token in `first` unless given.
    num_experts : int, optional
        E: an expert beyond it is an error.

    Returns
    -------
    numpy.ndarray
        (T,) float64; nan for a token that has no expert in `first`.
    pandas.DataFrame
        For records, a row per layer, over real tokens (padding is left out): layer; tokens,
        those that have an expert in `first`; agreement, their mean; equal, the share of them
        with the same experts in both.

    Raises
    ------
    ValueError
        Different numbers of tokens; no (T, k) array; experts outside of -1 to E - 1; records of
        other layers, steps or input ids.
    TypeError
        Floats, a bool k, records beside an array.

    Example
    -------
    >>> router_agreement([[3, 1], [0, -1], [-1, -1]], [[1, 2], [0, 4], [5, 6]])
    array([0.5, 1. , nan])
    """
    if k is not None and (isinstance(k, bool) or not isinstance(k, Integral)):
        raise TypeError(f"k: expected an integer, got {k!r}")
    if k is not None and k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    recorded = [_is_records(routing) for routing in (first, second)]
    if all(recorded):
        return _of_records(_frame(first), _frame(second), k, num_experts)
    if any(recorded):
        raise TypeError("router_agreement: expected two arrays or two records, got one of each")
    first, second = _experts("first", first, num_experts), _experts("second", second, num_experts)
    if len(first) != len(second):
        raise ValueError(
            f"router_agreement: expected the same tokens, got {len(first)} and {len(second)}"
        )
    return _shares(first, second, k)[0]


def _experts(name: str, routing: Any, num_experts: int | None) -> NDArray[np.int64]:
    experts = np.asarray(routing)
    if experts.ndim != 2:
        raise ValueError(f"{name}: expected experts (T, k), got shape {experts.shape}")
    if experts.size and not np.issubdtype(experts.dtype, np.integer):
        raise TypeError(f"{name}: expected integers, got {experts.dtype}")
    most = np.inf if num_experts is None else num_experts - 1
    if experts.size and (experts.min() < -1 or experts.max() > most):
        raise ValueError(
            f"{name}: expected experts from -1 to {most}, got {experts.min()} to {experts.max()}"
        )
    return experts.astype(np.int64, copy=False)


def _shares(
    first: NDArray[np.int64], second: NDArray[np.int64], k: int | None
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """(share (T,), whether both have the same experts (T,)) of (T, k1) and (T, k2)."""
    share, equal = np.empty(len(first)), np.empty(len(first), bool)
    width = first.shape[1] + second.shape[1]
    rows = max(1, _AT_ONCE // max(1, width * width))
    for start in range(0, len(first), rows):
        part = slice(start, start + rows)
        share[part], equal[part] = _compare(_distinct(first[part]), _distinct(second[part]), k)
    return share, equal


def _distinct(experts: NDArray[np.int64]) -> NDArray[np.int64]:
    """(T, k) sorted, with -1 in place of what stands twice."""
    experts = np.sort(experts, axis=1)
    return np.where(np.diff(experts, axis=1, prepend=-1) == 0, -1, experts)


def _compare(
    first: NDArray[np.int64], second: NDArray[np.int64], k: int | None
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    both = (first[:, :, None] == second[:, None, :]) & (first >= 0)[:, :, None]
    common, own = both.sum((1, 2)), (first >= 0).sum(1)
    equal = (common == own) & (common == (second >= 0).sum(1))
    share = np.full(len(first), np.nan)
    np.divide(common, own if k is None else k, out=share, where=own > 0)
    return share, equal


# ---- records ----


def _is_records(routing: object) -> bool:
    return isinstance(routing, str | os.PathLike) or hasattr(routing, "columns")


def _frame(records: Any) -> pandas.DataFrame:
    from ..profiler.records import read_records

    return records if hasattr(records, "columns") else read_records(records)


def _of_records(
    first: pandas.DataFrame, second: pandas.DataFrame, k: int | None, num_experts: int | None
) -> pandas.DataFrame:
    import pandas

    keys = ["layer", "step", "token"]
    first, second = (f.sort_values(keys, ignore_index=True) for f in (first, second))
    for column in [*keys, "input_id"]:
        if not first[column].equals(second[column]):
            raise ValueError(
                f"router_agreement: the records are of other tokens ({len(first)} and "
                f"{len(second)} rows, different in the column {column!r})"
            )
    rows = []
    for layer, mine in first[first["real"] & second["real"]].groupby("layer"):
        share, equal = _shares(
            _experts("first", _padded(mine["experts"]), num_experts),
            _experts("second", _padded(second.loc[mine.index, "experts"]), num_experts),
            k,
        )
        known = ~np.isnan(share)
        agreement, same = (
            float(values[known].mean()) if known.any() else np.nan for values in (share, equal)
        )
        rows.append((layer, int(known.sum()), agreement, same))
    return pandas.DataFrame(rows, columns=["layer", "tokens", "agreement", "equal"])


def _padded(lists: Collection[Sequence[int]]) -> NDArray[np.int64]:
    """(T, k) of T lists, filled up with -1."""
    lengths = np.fromiter(map(len, lists), np.int64, len(lists))
    experts = np.full((len(lengths), lengths.max(initial=0)), -1, np.int64)
    experts[np.arange(experts.shape[1]) < lengths[:, None]] = [e for row in lists for e in row]
    return experts
