"""Putting a patch into a module's own attributes, and taking it out."""

import types
from collections.abc import Callable
from typing import Any

from torch import nn

from .observers import rehook
from .state import STATE, Absent, Patched, wait_until_left

UNPATCHED = "_moeprof_forward"  # the instance attribute: the forward that it had before any patch


def install(
    patched: nn.Module, state: Patched, changes: list[tuple[nn.Module, Callable[..., Any]]]
) -> None:
    """Put `state` on a module, and on the modules of `changes` the forwards beside them.

    The first of these modules is `patched` itself.
    """
    attributes: list[dict[str, Any]] = [
        {
            "forward": types.MethodType(forward, module),
            UNPATCHED: vars(module).get(UNPATCHED, vars(module).get("forward", Absent)),
        }
        for module, forward in changes
    ]
    attributes[0][STATE] = state
    for (module, _), own in zip(changes, attributes, strict=True):
        state.saved.append((module, {n: vars(module).get(n, Absent) for n in own}))
    # The block comes last, since another thread may run it from then on.
    for (module, _), own in reversed([*zip(changes, attributes, strict=True)]):
        vars(module).update(own)
    rehook(patched)


def restore(patched: nn.Module) -> None:
    """Undo the last patch of a module."""
    state = vars(patched)[STATE]
    block, *parts = state.saved
    _put_back(*block)  # from now on no call of it begins
    wait_until_left(state)
    for part in parts:
        _put_back(*part)
    rehook(patched)


def run_stock(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call the forward that a module had before any patch."""
    if UNPATCHED not in vars(module):  # another thread unpatched it since
        return module.forward(*args, **kwargs)
    forward = vars(module)[UNPATCHED]
    if forward is Absent:
        return type(module).forward(module, *args, **kwargs)
    return forward(*args, **kwargs)


def _put_back(module: nn.Module, attributes: dict[str, Any]) -> None:
    for name, value in attributes.items():
        if value is Absent:
            vars(module).pop(name, None)
        else:
            vars(module)[name] = value
