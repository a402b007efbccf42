"""What moeprof finds in a model: its MoE layers, and which of them it can run."""

from collections.abc import Callable, Iterable, Iterator
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from ..backends.tables import backend_of
from ..checks import check_model
from ..files import printable
from ..show.console import fill
from ..show.tables import notebook_table
from .blocks import (
    EXPERTS_ONLY,
    FUSED,
    OWN,
    SEAM,
    Block,
    interface_obstacle,
    is_behind_interface,
    no_record,
)
from .families import family_of
from .families.activations import read_function
from .families.base import Layout
from .find import Site, find_layers
from .names import layer_labels
from .quantized import QuantizedExperts
from .sizes import expert_slots, is_list, parameter_bytes

if TYPE_CHECKING:
    import pandas

_LEGEND = {
    FUSED: "moeprof.patch(model) runs router and experts in one call",
    SEAM: "moeprof.patch(model) puts its router and experts into the block's own forward",
    EXPERTS_ONLY: "the experts are moeprof's; the model's own router chooses, and no other can",
    OWN: "moeprof can profile the layer, and not run it",
    "–": "not known, or not the same for all experts",
}


class InspectedLayer(NamedTuple):
    """One MoE layer. None: not known, or not the same for all experts.

    layer : its own number in the model, or its name
    name : its block's name in the model, "model.layers.0.mlp"
    block : the block's class
    family : as transformers calls the model's folder, where moeprof has a record of it
    rule : the model's own router in words
    num_experts, top_k : experts of the layer, and of a token
    hidden_size, intermediate_size : of the hidden states, and within an expert
    dtype, device : of the experts' parameters, several separated by commas; "q8" or "q4" are
        experts that `moeprof.quantize` keeps in 8 or 4 bits
    activation : the experts', "silu", "gelu", "gelu_tanh", "relu" or "relu2"; another by its class
        or function
    bytes : of router, experts and shared experts
    path : "fused", "seam", "experts only" or "the model's own"
    reason : why it is one of the last two; else ""
    backend : what runs it where nobody asks for another: "c" on a CPU, "torch" on other devices;
        None where moeprof doesn't
    """

    layer: int | str
    name: str
    block: str
    family: str | None
    rule: str | None
    num_experts: int | None
    top_k: int | None
    hidden_size: int | None
    intermediate_size: int | None
    dtype: str | None
    device: str | None
    activation: str | None
    bytes: int | None
    path: str
    reason: str
    backend: str | None = None


class Inspection(list[InspectedLayer]):
    """The MoE layers of a model, in its order; a table where it is shown or printed."""

    def to_frame(self) -> "pandas.DataFrame":
        """A pandas table with a row a layer and the fields of `InspectedLayer` as columns."""
        import pandas

        return pandas.DataFrame(list(self), columns=list(InspectedLayer._fields))

    def __str__(self) -> str:
        """For 80 columns: layers that only differ in their number share a line; what the blocks are
        stands below the table."""
        lines = [_HEADER, *(_line(layers) for layers in self._groups())]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )
        return printable("\n".join([text, *(fill(note, rest="  ") for note in self._notes())]))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        table = notebook_table(_HEADER, map(_line, self._groups()))
        notes = "<br>".join(map(escape, self._notes()))
        return printable(f"{table}<p>{notes}</p>")

    def _groups(self) -> list[list[InspectedLayer]]:
        """Runs of layers that are alike but for their number and name."""
        groups: list[list[InspectedLayer]] = []
        for layer in self:
            if groups and groups[-1][0][2:] == layer[2:]:
                groups[-1].append(layer)
            else:
                groups.append([layer])
        return groups

    def _notes(self) -> Iterator[str]:
        """What the blocks are, why one isn't on the first path, and what the table's words mean."""
        groups = self._groups()
        yield from _of_layers(groups, _class)
        yield from _of_layers(groups, lambda layer: layer.reason)
        cells = {cell for layers in groups for cell in _line(layers)}
        yield from (f"{word}: {meaning}" for word, meaning in _LEGEND.items() if word in cells)


def _of_layers(
    groups: list[list[InspectedLayer]], text: Callable[[InspectedLayer], str]
) -> Iterator[str]:
    """Each text once, with the layers that it is of."""
    found: dict[str, list[str]] = {}
    for layers in groups:
        found.setdefault(text(layers[0]), []).append(_label(layers))
    yield from (f"Layer {', '.join(labels)}: {what}" for what, labels in found.items() if what)


def _class(layer: InspectedLayer) -> str:
    return f"{layer.block}, family {layer.family}" if layer.family else layer.block


def inspect(model: nn.Module) -> Inspection:
    """The MoE layers of a model: what they are, and whether moeprof can run them.

    Of the model only its routers are run, on random hidden states, to see whether they choose by
    the rule that moeprof has for them. Nothing in the model changes.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    Inspection
        A list of `InspectedLayer`, shown as a table; ``.to_frame()`` gives one of pandas.
        `path` is "fused" (router and experts are one call), "seam" (they are moeprof's, in
        the block's own forward), "experts only" (the model's own router chooses) or "the model's
        own" (`moeprof.patch` refuses it).

    Raises
    ------
    ValueError
        "No routers found ..." for a model without an MoE layer.
    TypeError
        For what is no torch.nn.Module.

    Examples
    --------
    >>> moeprof.inspect(model)[0].path                          # doctest: +SKIP
    'fused'
    """
    check_model("inspect", model)
    sites, unread = find_layers(model)
    labels = layer_labels([*(site.layer.block for site in sites), *(u.name for u in unread)])
    layers = [_inspected(label, site) for label, site in zip(labels, sites, strict=False)]
    for label, (name, reason) in zip(labels[len(sites) :], unread, strict=True):
        block = type(model.get_submodule(name)).__name__
        facts: dict[str, Any] = dict.fromkeys(InspectedLayer._fields, None)
        facts |= {"layer": label, "name": name, "block": block, "path": OWN, "reason": reason}
        layers.append(InspectedLayer(**facts))
    return Inspection(layers)


def _inspected(label: int | str, site: Site) -> InspectedLayer:
    layer, family = site.layer, family_of(site.block)
    path, reason = _path(site)
    rule = None if family is None else _rule(site.block, family)
    experts = site.experts
    parts: list[torch.Tensor] = [] if experts is None else [*experts.parameters()]
    dtypes = [str(p.dtype).removeprefix("torch.") for p in parts]
    if isinstance(experts, QuantizedExperts):
        dtypes, parts = [experts.format_in_c], [experts.get_buffer("down_proj")]
    return InspectedLayer(
        label,
        layer.block,
        type(site.block).__name__,
        None if family is None else family.family.name,
        rule,
        layer.num_experts,
        layer.top_k,
        layer.hidden_size,
        _intermediate_size(site.experts, layer.hidden_size),
        _joined(dtypes),
        _joined(str(p.device) for p in parts),
        _activation(site.experts),
        layer.router_bytes + layer.shared_bytes + parameter_bytes(site.experts)
        if site.experts is not None and site.experts is not site.block
        else None,
        path,
        reason,
        None if path == OWN or not parts else backend_of(parts),
    )


def _rule(block: nn.Module, family: Layout) -> str:
    """The rule in words."""
    if own := family.family.rule.own:
        return own
    try:
        scaled = family.settings(block).renormalises
    except AttributeError:  # a user's gate need not say it
        scaled = False
    return family.family.rule.words + (", weights scaled to sum 1" if scaled else "")


def _path(site: Site) -> tuple[str, str]:
    """(how moeprof can run this layer, what stands against more)."""
    family = family_of(site.block)
    if family is not None:
        block = Block(site.layer.block, site.block, family)
        if reason := block.readable():
            return OWN, reason
        checked = block.check()
        return block.path(checked), checked.reason
    reason = no_record(site.block)
    if site.experts is None or not is_behind_interface(site.experts):
        return OWN, reason
    if obstacle := interface_obstacle(site.experts):
        return OWN, f"{reason}; its experts: {obstacle}"
    return OWN, f'{reason}; model.set_experts_implementation("moeprof") runs its experts in C'


def _joined(names: Iterable[str]) -> str | None:
    return ", ".join(dict.fromkeys(names)) or None


def _first_expert(experts: nn.Module | None) -> Any:
    if experts is None or not is_list(experts):
        return experts
    return next((e for e in expert_slots(experts) if e is not None), None)


def _activation(experts: nn.Module | None) -> str | None:
    if isinstance(experts, QuantizedExperts):
        return experts.activation.name
    expert = _first_expert(experts)
    for name in ("act_fn", "activation", "act", "activation_fn"):
        found = getattr(expert, name, None)
        if callable(found):
            known, reason = read_function(found)
            own = getattr(found, "__name__", type(found).__name__).removesuffix("Activation")
            return own if reason else known.name
    return None


def _intermediate_size(experts: nn.Module | None, hidden_size: int | None) -> int | None:
    """What the down projection takes, where it is called that: its side beside H."""
    if isinstance(experts, QuantizedExperts):
        return experts.intermediate_size
    down = getattr(_first_expert(experts), "down_proj", None)
    if isinstance(down, nn.Linear):
        return down.in_features
    if isinstance(down, torch.Tensor) and down.dim() == 3 and hidden_size in down.shape[1:]:
        sides = [*down.shape[1:]]
        sides.remove(hidden_size)
        return sides[0]
    return None


# ---- as text ----

_HEADER = ("layer", "E", "k", "H", "I", "dtype", "device", "act", "MB", "path")


def _label(layers: list[InspectedLayer]) -> str:
    first, last = layers[0].layer, layers[-1].layer
    return str(first) if first == last else f"{first}-{last}"


def _line(layers: list[InspectedLayer]) -> list[str]:
    layer = layers[0]
    each = None if layer.bytes is None else f"{layer.bytes / 1e6:,.1f}"
    cells = [
        _label(layers),
        layer.num_experts,
        layer.top_k,
        layer.hidden_size,
        layer.intermediate_size,
        layer.dtype,
        layer.device if layer.backend in (None, "c") else f"{layer.device} ({layer.backend})",
        layer.activation,
        each,
        layer.path,
    ]
    return ["–" if cell is None else str(cell) for cell in cells]
