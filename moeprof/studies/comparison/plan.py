"""Which cells there are: tables, budgets, and how a budget is spread over the layers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

REDUCTION, WIDE = "reduction", "wide"
TABLES = (REDUCTION, WIDE)
ALLOCATIONS = ("equal", "free", "shared")


class TablePlan(NamedTuple):
    """One table.

    name : "reduction" (a token gets the model's top-k experts at most) or "wide" (twice that)
    max_k : int
    budgets : experts per token on average, integers
    allocations : "equal" (each layer's own average is the budget), "free" (split by measured
        sensitivity), "shared" (one parameter for all layers)
    """

    name: str
    max_k: int
    budgets: tuple[int, ...]
    allocations: tuple[str, ...]


class Part(NamedTuple):
    """Some budgets of a table, all spread over the layers in one way.

    targets : for each budget the experts of each layer, or one number for "shared"; None as long
        as that isn't known
    """

    table: str
    max_k: int
    allocation: str
    budgets: Sequence[int]
    targets: list[list[float] | float | None]


def plan_tables(
    top_k: int,
    num_experts: int,
    names: Collection[str] = TABLES,
    budgets: Collection[int] | None = None,
) -> list[TablePlan]:
    """The TablePlans of a model that takes top_k of num_experts experts.

    "reduction": budgets 2 to k - 1; "wide": 2 to k. budgets: only these of them. ValueError
    where nothing is left.
    """
    plans, known = [], {}
    for name in TABLES:
        if name not in names:
            continue
        wide = name == WIDE
        max_k = min(2 * top_k, num_experts) if wide else top_k
        possible = range(2, top_k + wide)
        known[name] = possible
        inside = [b for b in possible if budgets is None or b in budgets]
        allocations = ALLOCATIONS[:2] if wide else ALLOCATIONS
        if inside:
            plans.append(TablePlan(name, max_k, tuple(inside), allocations))
    if not plans:
        takes = f"budgets: this model takes {top_k} expert{'s' * (top_k != 1)} a token"
        some = [f"{', '.join(map(str, p))} (table {name})" for name, p in known.items() if p]
        if not some or budgets is None:
            raise ValueError(
                f"{takes}, so there is nothing to compare: table {REDUCTION} needs 3 or more, "
                f"table {WIDE} 2 or more"
            )
        raise ValueError(f"{takes}: expected some of {' or of '.join(some)}, got {sorted(budgets)}")
    return plans
