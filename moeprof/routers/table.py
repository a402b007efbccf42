"""What the routers take: parameters, defaults and ranges, read off the dataclasses.

The same table stands in the help of ``moeprof.patch``, of each router and of each routing
function, and in docs/routers.md.
"""

from collections.abc import Callable
from dataclasses import Field
from inspect import cleandoc
from typing import Any, NamedTuple

from .base import CAP, REGISTRY, Router, own_fields, parameters_of


class Row(NamedTuple):
    """One parameter of a router, in words."""

    name: str
    default: str
    values: str  # what it may be


def rows_of(cls: type[Router]) -> list[Row]:
    """The parameters of a router: its own, then those that all share."""
    own = [Row(f.name, _short(f.default), _values(cls, f)) for f in own_fields(cls)]
    return [
        *own,
        Row("min_k", "1", "an integer, 1 <= min_k <= max_k"),
        Row("max_k", "None", f"an integer, min_k <= max_k <= E; None is {no_max_k(cls)}"),
        Row("temperature", "1.0", "a number > 0; acts on the weights only"),
    ]


def no_max_k(cls: type[Router]) -> str:
    """What max_k=None means to a router."""
    if "max_k" in cls.notes:
        return cls.notes["max_k"]
    return f"min({CAP}, E)" if cls.wants_null else "E, no cap"


def _short(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def _values(cls: type[Router], f: Field[Any]) -> str:
    rule = f.metadata
    if not rule:  # read by the router itself
        return cls.notes[f.name]
    kind = "an integer" if rule["integer"] else "a number"
    allowed = [f"{kind} in {rule['interval']}"] if rule["interval"] else []
    allowed += map(_short, rule["words"])
    return " or ".join(allowed) + ("; or one per layer" if rule["per_layer"] else "")


# ---- as text ----


def lines_of(cls: type[Router]) -> str:
    """The parameters of one router as aligned lines of text."""
    rows = rows_of(cls)
    name, default = (max(len(row[i]) for row in rows) for i in (0, 1))
    return "\n".join(f"{r.name:<{name}} = {r.default:<{default}}  {r.values}" for r in rows)


def all_lines() -> str:
    """The parameters of every router, with those that all share once."""
    parts = [
        "Every router also takes min_k = 1 (an integer, 1 <= min_k <= max_k), max_k = None (an",
        "integer, min_k <= max_k <= E) and temperature = 1.0 (> 0; acts on the weights only).",
        "* marks the parameter that sets how many experts a token gets.",
        "",
    ]
    for cls in REGISTRY.values():
        parts.append(f"{cls.name} ({cls.__name__}); max_k None is {no_max_k(cls)}")
        for row in rows_of(cls)[: len(own_fields(cls))]:
            mark = "*" if row.name == cls.main else " "
            parts.append(f"  {mark} {row.name} = {row.default}: {row.values}")
    return "\n".join(parts)


def page() -> str:
    """docs/routers.md."""
    text = cleandoc(_HEAD).format(cap=CAP)
    lines = [text, ""]
    lines.append("| router | class, function | parameter | default | range; max_k: what None is |")
    lines.append("|---|---|---|---|---|")
    for cls in REGISTRY.values():
        forms = f"`{cls.__name__}`, `{cls.name}_routing`"
        rows = [*rows_of(cls)[: len(own_fields(cls))], Row("max_k", "None", no_max_k(cls))]
        for row in rows:
            name = f"**{row.name}**" if row.name == cls.main else row.name
            lines.append(f"| `{cls.name}` | {forms} | {name} | `{row.default}` | {row.values} |")
            forms = ""
    return "\n".join(lines) + "\n"


_HEAD = """
    # Routers

    The routers that `moeprof.patch(model, "name", parameter=value)` takes, and their
    parameters; what each selects stands at [The fifteen routers](routing.md#the-fifteen-routers).
    E is the number of experts. The parameter in bold sets how many experts a token
    gets; `router.with_budget(model, ...)` finds its value for an average that you name.

    Every router also takes `min_k` (default 1, an integer, 1 <= min_k <= max_k) and
    `temperature` (default 1.0, > 0: it acts on the weights only, never on the selection).

    `max_k` caps the experts of a token. None, the default, means no cap (E) for routers that
    go by the logits, and min({cap}, E) for those that go by a null: p-values, e-values or local
    false discovery rates. There a warning says so where the cap cuts more than 1 % of the
    tokens; `max_k=E` with the model's number of experts lifts it, any number keeps it silent.

    `python -c "from moeprof.routers.table import page; print(page(), end='')"` writes this
    page from the routers themselves.
"""


def document(cls: type[Router]) -> None:
    """Append the table of its parameters to a router's help."""
    if cls.__doc__:  # python -OO leaves none
        cls.__doc__ = f"{cleandoc(cls.__doc__)}\n\nDefaults and ranges, E experts:\n\n" + indented(
            lines_of(cls)
        )


def indented(text: str) -> str:
    """The lines of a text, each four spaces further in."""
    return "\n".join(f"    {line}" if line else "" for line in text.splitlines())


# ---- of routers that are in use ----


def describe(routers: list[Any]) -> str:
    """One phrase for the routers of some layers: "bh alpha=0.05 max_k=8".

    routers: of each layer a Router, a callable, or None for the model's own top-k. What differs
    between layers is said to be "per layer".
    """
    if not routers:
        return "no router"
    kinds = {type(r) for r in routers}
    if all(isinstance(r, Router) for r in routers) and len(kinds) == 1:
        return _describe_alike(routers)
    names = dict.fromkeys(map(_name, routers))  # in order, each once
    return next(iter(names)) if len(names) == 1 else f"{', '.join(names)}: one per layer"


def _describe_alike(routers: list[Router]) -> str:
    """Routers of one class: the main parameter, and what differs from the defaults."""
    words = [routers[0].name]
    own = own_fields(type(routers[0]))
    for f in [*own, *(f for f in parameters_of(type(routers[0])) if f not in own)]:
        values = [getattr(r, f.name) for r in routers]
        if any(v != values[0] for v in values):
            words.append(f"{f.name} per layer")
        elif f.name == routers[0].main or values[0] != f.default:
            if not (f.name == "max_k" and values[0] == getattr(routers[0], "k", None)):
                words.append(f"{f.name}={_brief(values[0])}")
    return " ".join(words)


def _brief(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({len(value)} values)"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _name(router: Router | Callable[..., Any] | None) -> str:
    if router is None:
        return "the model's own top-k"
    if isinstance(router, Router):
        return router.name
    return f"{getattr(router, '__name__', type(router).__name__)} (in Python)"
