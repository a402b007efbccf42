"""Routers as a person writes them in a command or a file."""

from __future__ import annotations

import ast
import math
from typing import Any

from ..checks import nearest
from .base import REGISTRY, Router, parameters_of

FORM = (
    "a router and its parameters (bh:alpha=0.3,max_k=16), or a router and the experts per token "
    "that its main parameter is set to (bh@6, or bh@6:max_k=16)"
)


def written_router(text: str) -> tuple[Router, float | None]:
    """(router, budget) of NAME[@BUDGET][:KEY=VALUE,...]; the budget is None where none is named.

    A value is an integer, a number, None, or a word of the router ("kneedle:on=log"); one for all
    layers. BUDGET is experts per token, on average; the router's main parameter is then still at
    its default, for `Router.with_budget` to set.

    ValueError in one line for what isn't one: an unknown name or key is named, with the nearest
    that there is.
    """
    head, colon, rest = text.partition(":")
    name, at, size = (part.strip() for part in head.partition("@"))
    if not name or (colon and not rest.strip()) or (at and not size):
        raise ValueError(f"router {text!r}: expected {FORM}")
    if name not in REGISTRY:
        raise ValueError(f"router {text!r}: there is no {name!r}; {nearest(name, REGISTRY)}")
    cls = REGISTRY[name]
    known = [field.name for field in parameters_of(cls)]
    parameters: dict[str, Any] = {}
    for part in rest.split(",") if colon else ():
        key, equals, value = (word.strip() for word in part.partition("="))
        if not (equals and value):
            raise ValueError(f"router {text!r}: expected KEY=VALUE, got {part.strip()!r}")
        if key not in known:
            raise ValueError(f"router {text!r}: {name} takes no {key!r}; {nearest(key, known)}")
        if key in parameters:
            raise ValueError(f"router {text!r}: {key} is there twice")
        parameters[key] = _value(value)
    budget = _budget(text, size) if at else None
    if budget is not None and cls.main in parameters:
        raise ValueError(f"router {text!r}: {cls.main} is what the budget sets; leave one out")
    try:
        return cls(**parameters), budget
    except ValueError as error:
        raise ValueError(f"router {text!r}: {error}") from None


def _value(text: str) -> Any:
    """What a user means by it: an integer, a number, None, else a word."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def _budget(text: str, size: str) -> float:
    try:
        value = float(size)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(f"router {text!r}: expected experts per token after @, got {size!r}")
    return value
