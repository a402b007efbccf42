"""What a patched module carries, whatever was patched."""

import copy
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

STATE = "_moeprof"  # the instance attribute by which a patched module knows its Patched


class Absent:
    """Stands for "there was no such attribute"; a class, so that copies keep its identity."""


def is_patched(module: nn.Module) -> bool:
    """True while a patch is on this very module."""
    return STATE in vars(module)


@dataclass(eq=False)
class Patched:
    """The state of one patch of one module. A copy of the model carries a copy of it.

    name: the module's qualified name; saved: (module, its instance attributes before), the
    patched module first; unpatched: (module, its forward before any patch, None for its class's).
    """

    made_anew: ClassVar[tuple[str, ...]] = ()  # by a copy, for its own model

    name: str
    ends_by_itself: bool = field(default=False, kw_only=True, repr=False)  # in a `with` block
    saved: list[tuple[nn.Module, dict[str, Any]]] = field(
        default_factory=list, kw_only=True, repr=False
    )
    unpatched: list[tuple[nn.Module, Any]] = field(default_factory=list, kw_only=True, repr=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Patched":
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        own = {k: None if k in self.made_anew else v for k, v in vars(self).items()}
        vars(copied).update(copy.deepcopy(own, memo))
        return copied

    def __reduce__(self) -> Any:
        # The bound methods of a patch could be written but not be read again.
        raise RuntimeError(
            f"{self.name}: a patched model can't be pickled (torch.save): unpatch it first, or "
            "use save_pretrained or state_dict"
        )


_INSIDE: list[tuple[Patched, int]] = []  # (patch, thread) of the calls whose parts are ours


@contextmanager
def inside(state: Patched) -> Iterator[None]:
    """Around a call whose parts are ours: `wait_until_left` waits for its end."""
    call = state, threading.get_ident()
    _INSIDE.append(call)
    try:
        yield
    finally:
        _INSIDE.remove(call)


def wait_until_left(state: Patched) -> None:
    """Return when no other thread is in a call whose parts are of this patch."""
    here = threading.get_ident()
    while any(patch is state and thread != here for patch, thread in [*_INSIDE]):
        time.sleep(1e-4)


def chain(module: nn.Module) -> list[Any]:
    """The patches of a module, the last one first."""
    state = vars(module).get(STATE)
    return [] if state is None else earlier(state)


def earlier(state: Any) -> list[Any]:
    """A patch and those that it was put upon, itself first."""
    states = []
    while state is not Absent:
        states.append(state)
        state = state.saved[0][1][STATE]
    return states
