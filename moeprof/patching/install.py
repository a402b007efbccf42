"""Putting a patch into a module's own attributes, and taking it out."""

import threading
import time
import types
from collections.abc import Callable
from typing import Any

from torch import nn

from ..models.guards import recorded_by
from .observers import rehook
from .state import STATE, Absent, Patched, wait_until_left

# Instance attributes: the forward that a module had before any patch, None for its class's own;
# and the same once the patches are gone, while something else keeps a forward of ours.
UNPATCHED, LEFT = "_moeprof_forward", "_moeprof_left"
_CHANGING = threading.RLock()  # several threads may find the same forward put back


def install(
    patched: nn.Module, state: Patched, changes: list[tuple[nn.Module, Callable[..., Any]]]
) -> None:
    """Put `state` on a module, and on the modules of `changes` the forwards beside them.

    The first of these modules is `patched` itself.
    """
    for module, _ in changes:
        wait_until_recorded(module)
        settle(module)
    with _CHANGING:
        attributes: list[dict[str, Any]] = [
            {"forward": types.MethodType(forward, module), UNPATCHED: _before_all(module)}
            for module, forward in changes
        ]
        attributes[0][STATE] = state
        for (module, _), own in zip(changes, attributes, strict=True):
            state.unpatched.append((module, own[UNPATCHED]))
            state.saved.append((module, {n: vars(module).get(n, Absent) for n in own}))
        try:
            # The block comes last, since another thread may run it from then on.
            for (module, _), own in reversed([*zip(changes, attributes, strict=True)]):
                vars(module).update(own)
        except BaseException:  # Ctrl-C, where some have been changed
            for saved in state.saved:
                _put_back(*saved)
            raise
    rehook(patched)


def _before_all(module: nn.Module) -> Any:
    """The forward that a module had before any patch, None for its class's own."""
    own = vars(module)
    return own.get(UNPATCHED, own.get(LEFT, own.get("forward")))


def restore(patched: nn.Module) -> None:
    """Undo the last patch of a module."""
    state = vars(patched)[STATE]
    block, *parts = state.saved
    _put_back(*block)  # from now on no call of it begins
    wait_until_left(state)
    for part in parts:
        _put_back(*part)
    rehook(patched)


def _put_back(module: nn.Module, attributes: dict[str, Any]) -> None:
    own = vars(module)
    with _CHANGING:
        if not _is_ours(own.get("forward")):
            # Put over ours since, as accelerate's hooks are: it stays, and calls ours.
            if attributes[UNPATCHED] is Absent:  # there is no earlier patch
                own[LEFT] = own.pop(UNPATCHED)
            attributes = {n: v for n, v in attributes.items() if n not in ("forward", UNPATCHED)}
        for name, value in attributes.items():
            if value is Absent:
                own.pop(name, None)
            else:
                own[name] = value
        settle(module)


def settle(module: nn.Module) -> None:
    """Take out a forward of ours that was put back when the patch was gone already."""
    own = vars(module)
    if LEFT not in own:
        return
    with _CHANGING:
        if LEFT not in own or UNPATCHED in own:
            return
        forward = own.get("forward")
        if _is_ours(forward):
            before = own.pop(LEFT)
            own.pop("forward")
            if before is not None:
                own["forward"] = before
        elif forward is None or getattr(forward, "__func__", None) is type(module).forward:
            own.pop(LEFT)  # nothing can call ours any more


def run_stock(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call the forward that a module had before any patch, from a forward of ours.

    Without a patch it is called where it had been looked up before, or where something has kept
    it: accelerate's hooks, or the recorder of transformers 4.
    """
    settle(module)
    own = vars(module)
    for name in (UNPATCHED, LEFT):
        if (forward := own.get(name, Absent)) is not Absent:
            return (forward or types.MethodType(type(module).forward, module))(*args, **kwargs)
    if _is_ours(own.get("forward")):  # put back by hand
        with _CHANGING:
            if UNPATCHED not in own and _is_ours(own.get("forward")):
                own.pop("forward")
    return module.forward(*args, **kwargs)


def wait_until_recorded(module: nn.Module) -> None:
    """Return when no call of transformers 4 records the outputs of this module: at its end that
    puts back the forward which it found.

    RuntimeError where this thread itself is in such a call.
    """
    while (thread := recorded_by(module)) is not None:
        if thread == threading.get_ident():
            raise RuntimeError(
                "patch: called from within a call of the model that records the outputs of its "
                "layers (output_router_logits=True and the like): patch before or after that call"
            )
        time.sleep(1e-3)


def _is_ours(forward: Any) -> bool:
    """A bound method: what wraps one may have taken its name."""
    function = getattr(forward, "__func__", None)
    return (getattr(function, "__module__", "") or "").startswith("moeprof.")
