"""Seeing what blocks route, whether they are patched or not."""

import threading
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..models.routing import Routing
from .span import Span
from .state import is_patched

_OBSERVERS = "_moeprof_observers"  # the instance attribute by which a block knows who observes it
_LOCK = threading.RLock()  # two profilers of one block may start and stop in two threads

STOCK = "the model's own, not patched"  # the `router` of a block that is not patched


class Routed(NamedTuple):
    """One call of a block.

    router : the router, None for the model's own top-k in C, STOCK for a block not patched
    hidden : what the block was given, until it is counted
    routing : what ran of it
    skips : a slot of -1 was left out by a user's gate, it is no mere padding
    span : the time that it took
    """

    router: Any
    hidden: Tensor | None
    routing: Routing
    skips: bool
    span: Span


class Observer:
    """Sees what one block routes, between `observe` and `disregard`.

    On a block that is not patched it has hooks. A patched one calls it from its forward: hooks
    of torch cost some 15 us a layer and step, which is 3 % of a decode step of a small model.
    """

    def hook(self, active: bool) -> None:
        """Put the hooks in or take them out; without effect where that is done."""
        raise NotImplementedError  # abstract

    def routed(self, event: Routed) -> None:
        """After a call of the block."""
        raise NotImplementedError  # abstract

    def stock(self, hidden: Tensor) -> AbstractContextManager[None]:
        """A context manager around the model's own forward, where a patched block falls back."""
        raise NotImplementedError  # abstract


def observe(block: nn.Module, by: Observer) -> None:
    """Let `by` see what this block routes, however often it is patched and unpatched."""
    with _LOCK:
        vars(block).setdefault(_OBSERVERS, []).append(by)
        by.hook(not is_patched(block))


def disregard(block: nn.Module, by: Observer) -> None:
    """Undo `observe`: the block is as before; also if something else put it back meanwhile."""
    with _LOCK:
        by.hook(False)
        observers = vars(block).get(_OBSERVERS, [])
        if by in observers:
            observers.remove(by)
        if not observers:
            vars(block).pop(_OBSERVERS, None)


def observers_of(block: nn.Module) -> tuple[Observer, ...] | list[Observer]:
    found: tuple[Observer, ...] | list[Observer] = vars(block).get(_OBSERVERS, ())
    return found


def rehook(module: nn.Module) -> None:
    """To be called after a patch has come or gone."""
    with _LOCK:
        for by in observers_of(module):
            by.hook(not is_patched(module))
