"""What a study runs a model with: its own routing, or a router."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from ..demo.defaults import default_null
from ..models.blocks import fewest_experts, runnable_blocks
from ..routers.base import Router
from ..routers.evidence import OnNull

if TYPE_CHECKING:
    from torch import nn

    from ..checks import Tokenizer
    from ..null.resolve import AnyNull


OWN = "own routing"  # the model as it is, which each router is compared with


class Configuration(NamedTuple):
    """A router by its name in the tables.

    router : None for the model's own routing; a function, as for `moeprof.patch`, has no budget
    budget : experts per token that the router's main parameter is set to; None leaves it
    null : what the router's p-values are measured against; None where it needs none
    """

    name: str
    router: Router | Callable[..., Any] | None
    budget: float | None = None
    null: AnyNull | None = None


def with_own(model: nn.Module, configurations: Iterable[Configuration]) -> dict[str, Configuration]:
    """{name: configuration}, the model's own routing first.

    ValueError for two of one name, a router or a budget that doesn't fit the model, and a model
    that can't be patched.
    """
    runnable_blocks(model)
    experts = fewest_experts(model)
    found = {OWN: Configuration(OWN, None)}
    for one in configurations:
        if one.name in found:
            raise ValueError(f"router {one.name!r}: there are two of that name")
        if isinstance(one.router, Router):
            one.router.limits(experts)
        if one.budget is not None and one.budget > experts:
            raise ValueError(
                f"router {one.name!r}: expected a budget of at most {experts}, the model's experts"
            )
        found[one.name] = one
    return found


def null_for(
    router: Router | Callable[..., Any],
    model: nn.Module,
    tokenizer: Tokenizer,
    given: AnyNull | None,
    *,
    seed: int,
    progress: bool = True,
) -> AnyNull | None:
    """The null of a router that works on one: what is given, else the kind that it needs."""
    if not isinstance(router, OnNull):
        return None
    if given is not None:
        return given
    return default_null(model, tokenizer, progress, seed, kind=router.null_kind)
