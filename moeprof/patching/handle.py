"""The handle of a patch that is in place."""

from torch import nn

from ..routers.table import describe
from .install import restore
from .layer import Callback, PatchedLayer
from .linears import PatchedLinear
from .state import STATE, chain, earlier

UNDO_ALL = "moeprof.unpatch(model) removes all"


class Removable:
    """A callback that is called, until `remove`."""

    def __init__(self, layers: list[PatchedLayer], callback: Callback):
        # A function of its own, so that the same callback may be given twice and removed once.
        self._layers, self._call = layers, lambda index, routing: callback(index, routing)
        for layer in layers:
            layer.callbacks = (*layer.callbacks, self._call)

    def remove(self) -> None:
        """End it; without effect where that was done already."""
        for layer in self._layers:
            layer.callbacks = tuple(c for c in layer.callbacks if c is not self._call)

    def __enter__(self) -> "Removable":
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


class Handle:
    """A patch that is in place. As a context manager it unpatches at the end of the block."""

    def __init__(
        self,
        blocks: list[tuple[nn.Module, PatchedLayer]],
        linears: list[tuple[nn.Module, PatchedLinear]],
        skipped: dict[str, str],
    ):
        self._blocks = blocks
        self._linears = linears
        self._skipped = skipped

    @property
    def layers(self) -> list[PatchedLayer]:
        """The patched layers, in the order of the model."""
        return [layer for _, layer in self._blocks]

    @property
    def linears(self) -> list[str]:
        """The names of the linear layers that ``linears=True`` patched."""
        return [linear.name for _, linear in self._linears]

    @property
    def fallbacks(self) -> dict[str, str]:
        """{layer name: reason} of the layers that run the model's own forward."""
        ran = {layer.name: layer.fallback for layer in self.layers if layer.fallback}
        return self._skipped | ran

    @property
    def active(self) -> bool:
        """True while the patch is in place."""
        patched = [*self._blocks, *self._linears]
        return any(state in chain(module) for module, state in patched)

    def on_routing(self, callback: Callback) -> "Removable":
        """Call ``callback(layer_index, routing)`` after each layer's call.

        Parameters
        ----------
        callback : function of (int, Routing)
            The layer's place among the model's MoE layers, from 0, in the order in which
            `moeprof.inspect` lists them (where dense layers stand between them this is not the
            layer's own number, which `patch` takes in a dict); and a `moeprof.Routing`, to be
            read: what is written into it changes neither the model nor a profile. Several
            functions are called in the order in which they were given.

        Returns
        -------
        Removable
            Its ``remove()`` ends it; so does the end of a ``with`` block.

        Raises
        ------
        TypeError
            For what is no function.
        """
        if not callable(callback):
            raise TypeError(f"on_routing: expected a function, got {callback!r}")
        return Removable(self.layers, callback)

    def unpatch(self) -> None:
        """Put the model back as it was; without effect where that was done already.

        Raises
        ------
        RuntimeError
            If the model was patched again since: the last patch has to go first. Nothing is
            changed then.
        """
        patched = [*self._blocks, *self._linears]
        mine = [(module, state) for module, state in patched if state in chain(module)]
        if any(vars(module)[STATE] is not state for module, state in mine):
            raise RuntimeError(
                "unpatch: the model was patched again after this patch; unpatch that one first"
            )
        for module, _ in reversed(mine):  # blocks may share a gate
            restore(module)

    def __enter__(self) -> "Handle":
        for _, state in [*self._blocks, *self._linears]:
            state.ends_by_itself = True
        return self

    def __exit__(self, *exception: object) -> None:
        self.unpatch()

    def __repr__(self) -> str:
        what = in_words(self.layers)
        linears = f", {len(self._linears)} linears" if self._linears else ""
        return f"<moeprof.Handle: {what}{linears}, {self._state()}>"

    def _state(self) -> str:
        """Of this patch and of others on the same blocks, in words."""
        patched = [*self._blocks, *self._linears]
        if self.active:
            under = any(vars(m).get(STATE) is not s for m, s in patched if s in chain(m))
            return "patched, but a later patch is the one that runs" if under else "patched"
        before = {id(below) for _, s in patched for below in earlier(s)}
        others = {id(s): s for module, _ in patched for s in chain(module)}
        if not others:
            return "not patched"
        which = "an earlier" if others.keys() & before else "a later"
        return f"not patched; the model is still patched by {which} patch, {UNDO_ALL}"


def in_words(layers: list[PatchedLayer]) -> str:
    """ "bh alpha=0.05 max_k=8 on 4 layers"."""
    count = f"{len(layers)} layer{'s' * (len(layers) != 1)}"
    return f"{describe([layer.router for layer in layers])} on {count}" if layers else count
