"""Values of max_k that gave the same results, as one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

SAME = ("avg_experts", "avg_experts_heldout", "perplexity")


def merged(results: Iterable[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """[(name, results)]: those of one alpha that are equal share a name, bh_k{16,32,64}_a020."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for result in results:
        key = (result["routing_type"], result["alpha"], *(result[name] for name in SAME))
        groups.setdefault(key, []).append(result)
    return [(_name(group), group) for group in groups.values()]


def _name(group: list[dict[str, Any]]) -> str:
    first = group[0]["config"]
    if len(group) == 1:
        return first
    caps = ",".join(str(result["max_k"]) for result in group)
    start, _, end = first.partition(f"_k{group[0]['max_k']}_")
    return f"{start}_k{{{caps}}}_{end}"


def same_results(groups: Iterable[tuple[str, list[dict[str, Any]]]]) -> list[str]:
    """A sentence for every set of max_k that gave the same results, with the alphas for which."""
    alphas: dict[tuple[int, ...], list[str]] = {}
    for _, group in groups:
        if len(group) > 1:
            caps = tuple(result["max_k"] for result in group)
            alphas.setdefault(caps, []).append(f"{group[0]['alpha']:g}")
    return [
        f"At alpha {', '.join(at)} the configurations with max_k {', '.join(map(str, caps))} gave "
        f"the same results: no token had more than {min(caps)} rejections, so these caps had "
        "nothing to cut."
        for caps, at in alphas.items()
    ]
