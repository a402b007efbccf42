"""The configurations of a grid on a model with E experts, of which its own routers take k."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

from ...routers import REGISTRY
from ...show.console import printed
from ...show.tables import table as make_table
from ..sweep.grid import digits

if TYPE_CHECKING:
    from ...routers.base import Router


SIZES = ("k", "min_k", "max_k")  # parameters that count experts
RESERVED = ("router", "budgets", "null")  # keys of a table that are no parameters
SHARE = re.compile(r"(\d+)?k(?:/(\d+))?")  # "k", "k/2", "3k/4"


@dataclass(frozen=True)
class Configuration:
    """One way to route.

    router : a Router; None for the model's own top-k
    parameters : those that the grid gives, by name
    budget : the experts per token that the router's main parameter is set to, or None
    null : the null by the grid's name for it; None for a router without p-values
    """

    name: str
    router: Router | None
    parameters: Mapping[str, Any]
    budget: float | None = None
    null: str | None = None


class Planned(NamedTuple):
    """What a grid runs on a model; printed, it is a table.

    configurations : the model's own top-k first, which all are compared with
    dropped : what the model can't have, in words
    """

    configurations: list[Configuration]
    dropped: list[str]

    def __str__(self) -> str:
        columns = dict.fromkeys(("configuration", "router", "parameters", "budget", "null"), "{}")
        rows = (
            (
                one.name,
                "the model's own" if one.router is None else one.router.name,
                written(one.parameters),
                None if one.budget is None else f"{one.budget:g}",
                one.null,
            )
            for one in self.configurations
        )
        left_out = [f"Left out: {line}" for line in self.dropped]
        return printed([make_table(columns, rows), *left_out])


def plan(
    tables: Iterable[Mapping[str, Any]], nulls: Sequence[str], num_experts: int, top_k: int
) -> Planned:
    """Planned of tables as `Grid.routers` has them."""
    own = Configuration(f"topk_{top_k}_baseline", None, {"k": top_k})
    found, dropped = [own], Counter[str]()
    for table in tables:
        default = {"k": top_k} if table["router"] == "topk" else {}
        for values in combinations(table):
            try:
                values = {key: _size(key, value, top_k) for key, value in values.items()}
                router = REGISTRY[table["router"]](**default | values)
                router.limits(num_experts)
            except ValueError as error:
                dropped[str(error)] += max(len(table.get("budgets", ())), 1)
                continue
            for budget in table.get("budgets", (None,)):
                if budget is None and router.name == "topk" and default | values == default:
                    continue  # the model's own
                experts = None if budget is None else float(experts_of(budget, top_k))
                name = _name(router.name, values, experts)
                for null in table.get("null", nulls) if router.wants_null else (None,):
                    found.append(Configuration(name, router, values, experts, null))
    words = [f"{n} configuration{'s' * (n > 1)}: {why}" for why, n in dropped.items()]
    return Planned(list(_distinct(found)), words)


def combinations(table: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Of a table {parameter: values}: each combination, the last parameter varying first."""
    keys = [key for key in table if key not in RESERVED]
    for values in product(*(table[key] for key in keys)):
        yield dict(zip(keys, values, strict=True))


def experts_of(size: float | str, top_k: int) -> float | Fraction:
    """A number of experts: as it is, "own", or a share of the model's own k as "k/2", "3k/4"."""
    if not isinstance(size, str):
        return size
    found = SHARE.fullmatch("k" if size == "own" else size)
    if not found or found[2] and not int(found[2]) or found[1] and not int(found[1]):
        raise ValueError(size)
    return Fraction(int(found[1] or 1) * top_k, int(found[2] or 1))


def _size(key: str, value: Any, top_k: int) -> Any:
    if key not in SIZES:
        return value
    experts = experts_of(value, top_k)
    if experts != int(experts):
        raise ValueError(f"{key}: {value} of the model's own {top_k} is no whole number")
    return int(experts)


def written(parameters: Mapping[str, Any]) -> str:
    """ "alpha=0.05, max_k=8"."""
    return ", ".join(f"{key}={value}" for key, value in parameters.items())


def _name(router: str, values: Mapping[str, Any], budget: float | None) -> str:
    """As the sweep's: "bh_k8_a005" is BH with max_k 8 and alpha 0.05, "topk_4" top-4."""
    short = {"max_k": "k", "alpha": "a"} | ({"k": ""} if router == "topk" else {})
    parts = [router]
    for key, value in sorted(values.items(), key=lambda item: item[0] not in SIZES):
        if isinstance(value, str):
            parts.append(value)
        else:
            number = digits(value) if 0 < value < 1 else f"{value:g}"
            parts.append(f"{short.get(key, key)}{number}")
    return "_".join(parts) + ("" if budget is None else f"@{budget:g}")


def _distinct(configurations: list[Configuration]) -> Iterator[Configuration]:
    """Each once; where a name is used with several nulls, it says with which."""
    once = [one for n, one in enumerate(configurations) if one not in configurations[:n]]
    uses = Counter(one.name for one in once)
    for one in once:
        name = f"{one.name} on {one.null}" if uses[one.name] > 1 and one.null else one.name
        yield Configuration(name, one.router, one.parameters, one.budget, one.null)
