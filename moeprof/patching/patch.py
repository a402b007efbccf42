"""patch() and unpatch(): the forward of MoE blocks swapped for ours, and put back."""

import os
import sys
import warnings
from collections.abc import Callable, Iterable
from inspect import cleandoc
from typing import Any, NamedTuple, TypeGuard, cast

from torch import nn

from ..backends.ops import BACKENDS
from ..checks import check_model
from ..models.blocks import FUSED, Block, changed_blocks, find_blocks, not_runnable
from ..models.families.rules import Checked
from ..models.names import layer_keys, layer_labels, spans
from ..null import LayerNull, Null, TokenNull, resolve_null
from ..null.resolve import AnyNull
from ..routers import Router, make_router
from ..routers.table import all_lines
from .forward import block_forward, warn_fallback
from .handle import UNDO_ALL, Handle, in_words
from .install import install, restore, settle, wait_until_recorded
from .layer import CapWatch, PatchedLayer
from .linears import PatchedLinear, find_linears, linear_forward
from .seam import experts_forward, gate_forward, seam_forward
from .state import STATE, Patched

NORMS = ("model", "none", "sum", "mass")


def patch(
    model: nn.Module,
    router: str | Router | Callable[..., Any] | list[Any] | dict[Any, Any] | None = None,
    *,
    null: AnyNull | str | os.PathLike[str] | None = None,
    norm: str = "model",
    strict: bool = True,
    linears: bool = False,
    backend: str | None = None,
    **router_parameters: Any,
) -> Handle:
    """Run the model's MoE blocks on moeprof's path, with the model's own router or another.

    Only the experts that a token is routed to are computed. Layers on a CPU run in C, those on
    another device in torch. A block that does nothing else than to route and to run experts is
    one call of these; in any other the block's own forward runs, with moeprof's router and
    experts in it. `moeprof.inspect` says which, and what can't be patched.

    A model that is patched already gets this patch on top: it runs until its handle's
    ``unpatch()``, then the earlier one does again, and ``moeprof.unpatch(model)`` removes all.
    There is a warning then, since a notebook cell that runs twice does this, unless the
    earlier patch stands in a ``with`` block, which ends it.

    Parameters
    ----------
    model : torch.nn.Module
        Of a family that moeprof knows (`moeprof.inspect` tells), of transformers 4.57 or 5, on
        any device, or spread over several.
    router : str, Router, callable, list, dict or None
        None is the model's own rule. A name takes its parameters as keywords:
        ``patch(model, "bh", alpha=0.3, max_k=8)``. A list has one of these for each layer; a
        dict has them by the layer's own number, its block's name or its gate's, and the layers
        that it leaves out keep the model's own. A callable takes the logits (T, E) and returns a
        routing: weights (T, E), zero where an expert is not selected; or (weights (T, k), experts
        (T, k)), -1 for an empty slot; or what moeprof's routing functions return. Its weights
        are used as they are, without `norm` and the model's factors. It is slower.
    null : Null, str, path or None
        Where the p-values of the router come from: a fitted null, the path of a saved one, or
        "normal". None is "normal", with a warning.
    norm : {"model", "none", "sum", "mass"}
        The weights of the selected experts, from the score a that the model computes from a
        logit (a softmax over all, or a sigmoid): "none" a_e; "sum" a_e / sum a; "mass" scaled
        to the mass of the model's own top-k; "model" is "sum" where the model's weights sum to
        1 and "none" elsewhere. The model's own scaling factors and epsilon apply in each.
    strict : bool
        A layer that can't run on moeprof's path raises; with False it runs its own forward, with
        one warning, and ``handle.fallbacks`` names it.
    linears : bool
        Also run the plain ``nn.Linear`` layers around the MoE blocks (the attention's
        projections, lm_head) in C wherever the input has at most 64 rows and no gradient is
        wanted, as in decoding: torch reads their weights at half the memory's speed. In 16 bits
        on a CPU without instructions for them, where torch is many times slower, also with more
        rows. Small layers, where that does not pay, stay with torch, as do those that have a
        forward of their own.
        ``handle.linears`` names them. The results differ by the order of fp32 sums.
    backend : {"c", "torch"} or None
        What runs routing and experts. None is by the device that a layer's experts are on, in
        each call: "c" on a CPU, "torch" on any other. "torch" runs on a CPU too: slower, but
        with gradients, through the routing weights and the experts; which experts are selected
        has none. 8- and 4-bit experts run in C only.

    Returns
    -------
    Handle
        ``handle.unpatch()``, or ``with moeprof.patch(model) as handle:``.

    Raises
    ------
    ValueError
        "No routers found ..." for a model without such a block; a layer that can't run; a router
        for a layer whose own rule is none that moeprof knows; a parameter out of range (with
        groups of experts, `max_k` is at most the number that a token may use); a null fitted to
        another model. The model is as it was.
    TypeError
        For what is no model, router or null.
    RuntimeError
        With transformers 4.57, from within a call that records the outputs of layers
        (``output_router_logits=True``): patch before or after it.
    """
    planned = plan_patch(
        model, router, null=null, norm=norm, strict=strict, backend=backend, **router_parameters
    )
    if left := _left_patched(planned.layers):
        _warn_nested(left)
    for name, reason in planned.skipped.items():
        warn_fallback(name, reason)
    modules = [block.module for block in planned.blocks]
    around = find_linears(model, modules) if linears else []
    dense: list[tuple[nn.Module, PatchedLinear]] = [
        (module, PatchedLinear(name)) for name, module in around
    ]
    for module, _ in dense:
        wait_until_recorded(module)
    put_in(planned, dense)
    return Handle(planned.layers, dense, planned.skipped)


class Planned(NamedTuple):
    """A patch that could be put in: nothing of the model is changed yet."""

    blocks: list[Block]
    layers: list[tuple[nn.Module, PatchedLayer]]
    skipped: dict[str, str]  # {name: why it runs its own forward}


def plan_patch(
    model: nn.Module,
    router: Any = None,
    *,
    null: Any = None,
    norm: str = "model",
    strict: bool = True,
    backend: str | None = None,
    **router_parameters: Any,
) -> Planned:
    """What `patch` would do; raises what it would."""
    if norm not in NORMS:
        raise ValueError(f"norm: expected one of {NORMS}, got {norm!r}")
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend: expected one of {(*BACKENDS,)} or None, got {backend!r}")
    check_model("patch", model)
    blocks = find_blocks(model)
    routers = routers_by_layer(router, blocks, router_parameters)
    nulls = _layer_nulls(model, routers, null)
    layers: list[tuple[nn.Module, PatchedLayer]] = []
    skipped = changed_blocks(model)
    if strict and skipped:
        raise ValueError(not_runnable(*next(iter(skipped.items()))))
    for index, block in enumerate(blocks):
        if reason := block.readable(backend):
            if strict:
                raise ValueError(not_runnable(block.title, reason))
            skipped[block.title] = reason
            continue
        checked = block.check()
        if reason := _rule_obstacle(block, routers[index], checked):
            if strict:
                raise ValueError(f"{block.title}: {reason}")
            skipped[block.title] = reason
            continue
        layer = PatchedLayer(
            block.title,
            index,
            block.num_experts,
            block.family,
            routers[index],
            nulls[index],
            norm,
            strict,
            fused=block.path(checked) == FUSED,
            backend=backend,
            own_logits=checked.own_logits and checked.rule is not None,
        )
        if isinstance(layer.router, Router) or (layer.router is None and checked.rule is not None):
            layer.spec(block.module)  # raises what only the layer tells
        for module, _ in _changes(block.module, layer):
            wait_until_recorded(module)
        layers.append((block.module, layer))
    _watch_caps([layer for _, layer in layers])
    return Planned(blocks, layers, skipped)


def put_in(planned: Planned, dense: Iterable[tuple[nn.Module, PatchedLinear]] = ()) -> None:
    """Change the blocks as planned, and linear layers; all of them or, after Ctrl-C, none."""
    changes: list[tuple[nn.Module, Patched, list[tuple[nn.Module, Callable[..., Any]]]]] = [
        *((block, layer, _changes(block, layer)) for block, layer in planned.layers),
        *((module, linear, [(module, linear_forward)]) for module, linear in dense),
    ]
    try:
        for module, state, forwards in changes:
            install(module, state, forwards)
    except BaseException:
        for module, state, _ in reversed(changes):
            if vars(module).get(STATE) is state:
                restore(module)
        raise


def _rule_obstacle(block: Block, router: Any, checked: Checked) -> str | None:
    """Why no router of moeprof can take the place of the model's own, or None; where the block
    is one call to C or nothing, why it can't be patched at all."""
    if checked.rule is not None:
        return None
    if not block.family.has_seam:
        return (
            f"can't run on moeprof's path: {checked.reason}. A block of transformers 4 runs "
            "in C only as a whole, by a rule that is known"
        )
    if not isinstance(router, Router):
        return None
    return (
        "a router of moeprof needs the rule by which the model's own chooses and weighs experts, "
        f"and that isn't known of this {block.family.family.name} block: {checked.reason}; "
        "moeprof.inspect(model) shows it. Without a router, moeprof.patch(model) runs the experts "
        "that the model's own router chooses"
    )


def unpatch(model: nn.Module) -> None:
    """Remove all patches from a model, also from a copy of a patched one.

    Raises
    ------
    TypeError
        For what is no torch.nn.Module.
    """
    check_model("unpatch", model)
    for module in reversed(list(model.modules())):  # as they were patched: blocks may share a gate
        while STATE in vars(module):
            restore(module)
        settle(module)


class OLMoERouterPatcher:
    """`patch` and `unpatch` as methods of an object that is made of a model.

    moe_blocks : [(name, block)];  original_forwards : {name: forward};  patched : bool
    """

    def __init__(self, model: nn.Module):
        check_model("OLMoERouterPatcher", model)
        self.model = model
        self.moe_blocks = [(block.name, block.module) for block in find_blocks(model)]
        self.original_forwards = {name: block.forward for name, block in self.moe_blocks}
        self._handles: list[Handle] = []

    @property
    def patched(self) -> bool:
        return any(handle.active for handle in self._handles)

    def patch(self, router: str | Router = "bh", **options: Any) -> Handle:
        """As :func:`patch`; the last patch is the one that runs."""
        self._handles.append(patch(self.model, router, **options))
        return self._handles[-1]

    def unpatch(self) -> None:
        """Remove all patches of this patcher."""
        while self._handles:
            self._handles[-1].unpatch()
            self._handles.pop()


if patch.__doc__:  # python -OO leaves none
    patch.__doc__ = f"{cleandoc(patch.__doc__)}\n\nRouters\n-------\n{all_lines()}\n"


# ---- routers and nulls, layer by layer ----


def routers_by_layer(router: Any, blocks: list[Block], parameters: dict[str, Any]) -> list[Any]:
    """For each block a Router with scalar parameters, a callable or None."""
    count = len(blocks)
    if isinstance(router, list | tuple | dict) and parameters:
        raise TypeError(f"patch: {sorted(parameters)} given beside a router for each layer")
    if isinstance(router, dict):
        names = [block.name for block in blocks]
        numbers = layer_keys(names, [block.gate_name for block in blocks])
        if unknown := [key for key in router if key not in numbers]:
            raise ValueError(
                f"router: expected layers {spans(layer_labels(names))} or the names of their "
                f"blocks {names} or gates, got {unknown}"
            )
        if len({numbers[key] for key in router}) < len(router):
            raise ValueError(f"router: a layer is named twice in {list(router)}")
        by_number = {numbers[key]: value for key, value in router.items()}
        router = [by_number.get(index) for index in range(count)]
    if isinstance(router, list | tuple):
        if len(router) != count:
            raise ValueError(f"router: expected one for each of {count} layers, got {len(router)}")
        return [_one_router(r, {}, i, count) for i, r in enumerate(router)]
    return [_one_router(router, parameters, index, count) for index in range(count)]


def _one_router(
    router: Any, parameters: dict[str, Any], index: int, count: int
) -> Router | Callable[..., Any] | None:
    if router is None or (callable(router) and not isinstance(router, Router | type)):
        if parameters:
            raise TypeError(f"patch: {sorted(parameters)} given without a router")
        return router
    return make_router(router, **parameters).at(index, count)


def _layer_nulls(
    model: nn.Module, routers: list[Any], null: AnyNull | str | os.PathLike[str] | None
) -> list[LayerNull | TokenNull | None]:
    """What each layer's p-values come from; None where its router has none."""
    wanting = [r for r in routers if _on_null(r)]
    if not wanting:
        if null is not None:
            raise ValueError("null: given, but the router does not work on p-values")
        return [None] * len(routers)
    null = resolve_null(null, stacklevel=5)
    if isinstance(null, LayerNull):
        raise TypeError("null: expected a Null with all layers, got a LayerNull")
    null.check(model)
    # What is adapted is of all layers, as what it is made of.
    adapted = {type(router): cast(Null | TokenNull, router.adapt(null)) for router in wanting}
    return [adapted[type(r)].layer(i) if _on_null(r) else None for i, r in enumerate(routers)]


def _watch_caps(layers: list[PatchedLayer]) -> None:
    """One CapWatch for the layers whose router has a cap that nobody asked for."""
    watch = None
    for layer in layers:
        cap = layer.router.silent_cap(layer.num_experts) if _on_null(layer.router) else None
        if cap is not None:
            watch = watch or CapWatch(cap, layer.num_experts)
            layer.cap = watch


def _on_null(router: Any) -> TypeGuard[Router]:
    return isinstance(router, Router) and router.wants_null


# ---- patches upon patches ----


def _left_patched(layers: list[tuple[nn.Module, PatchedLayer]]) -> list[PatchedLayer]:
    """The layers with a patch that no ``with`` block will end."""
    states = [vars(block).get(STATE) for block, _ in layers]
    return [s for s in states if s is not None and not s.ends_by_itself]


def _warn_nested(left: list[PatchedLayer]) -> None:
    """Tell the user that the model was patched already.

    Not moeprof's own code, which patches in ``with`` blocks and leaves what the user has done.
    """
    caller = sys._getframe(2).f_globals.get("__name__", "")
    if caller.partition(".")[0] == __name__.partition(".")[0]:
        return
    warnings.warn(
        f"patch: the model is patched already ({in_words(left)}): this patch runs until it is "
        f"unpatched, then that one does again; {UNDO_ALL}",
        stacklevel=3,
    )


def _changes(block: nn.Module, layer: PatchedLayer) -> list[tuple[nn.Module, Callable[..., Any]]]:
    """(module, its forward while patched), the block first."""
    family = layer.family
    if not layer.fused:
        return [
            (block, seam_forward),
            (family.gate_of(block), gate_forward),
            (family.experts_of(block), experts_forward),
        ]
    changes = [(block, block_forward)]
    if family.gate_forward and family.has_stock_gate(block):
        changes.append((family.gate_of(block), family.gate_forward))
    return changes
