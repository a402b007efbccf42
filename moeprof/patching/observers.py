"""Seeing what blocks route, whether they are patched or not."""

import threading

from torch import Tensor, nn

from .state import Patched, is_patched

_WATCHES = "_moeprof_watches"  # the instance attribute by which a block knows who watches it
_LOCK = threading.RLock()  # two profilers of one block may start and stop in two threads


class RoutingWatch:
    """Sees what one block routes, between `watch` and `unwatch`.

    On a block that is not patched it has hooks. A patched one calls it from its forward: hooks
    of torch cost some 15 us a layer and step, which is 3 % of a decode step of a small model.
    """

    def hook(self, active: bool) -> None:
        """Put the hooks in or take them out; without effect where that is done."""
        raise NotImplementedError  # abstract

    def routed(
        self, layer: Patched, hidden: Tensor, routing, skips: bool, start: int, end: int
    ) -> None:
        """After a call of the patched block from `start` to `end` (perf_counter_ns).

        routing: a patching.Routing; skips: a slot of -1 was left out by a user's gate, it is no
        mere padding.
        """
        raise NotImplementedError  # abstract

    def stock(self, hidden: Tensor):
        """A context manager around the model's own forward, where a patched block falls back."""
        raise NotImplementedError  # abstract


def watch(block: nn.Module, by: RoutingWatch) -> None:
    """Let `by` see what this block routes, however often it is patched and unpatched."""
    with _LOCK:
        vars(block).setdefault(_WATCHES, []).append(by)
        by.hook(not is_patched(block))


def unwatch(block: nn.Module, by: RoutingWatch) -> None:
    """Undo `watch`: the block is as before; also if something else put it back meanwhile."""
    with _LOCK:
        by.hook(False)
        watches = vars(block).get(_WATCHES, [])
        if by in watches:
            watches.remove(by)
        if not watches:
            vars(block).pop(_WATCHES, None)


def watches_of(block: nn.Module) -> tuple | list:
    return vars(block).get(_WATCHES, ())


def rehook(module: nn.Module) -> None:
    """To be called after a patch has come or gone."""
    with _LOCK:
        for by in watches_of(module):
            by.hook(not is_patched(module))
