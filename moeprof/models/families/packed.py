"""The layout of transformers 5: a router module, and the experts in two 3-D tensors."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ...backends.tables import (
    INTERLEAVED,
    NOTHING_READ,
    ROWS,
    TRANSPOSED,
    LayerMatrices,
    Storage,
    sizes_of,
)
from ..guards import full_name, hooked
from ..routing import Routing
from .activations import READ, read_activation
from .base import Layout
from .rules import Settings

# Of a module of experts, in its class or its instance: how it keeps and uses its tensors.
FLAGS = (
    "has_gate",
    "has_bias",
    "is_transposed",
    "is_concatenated",
    "has_post_expert_norm",
    "_is_expert_parallel",
)


def _gate_forward(self: Any, hidden_states: Tensor, *, logits_only: bool = False) -> Any:
    """The router's forward while its block is patched and makes one call to C; bound to it.

    The block asks for logits only: no top-k runs, and the recorder of router logits, a hook
    on the router, still sees them. For everyone else it is the stock router.
    """
    if not logits_only:
        return type(self).forward(self, hidden_states)
    return F.linear(hidden_states, self.weight, getattr(self, "bias", None)), None, None


def _gate_forward_float32(self: Any, hidden_states: Tensor, *, logits_only: bool = False) -> Any:
    """The same of a router whose logits are computed in float32."""
    if not logits_only:
        return type(self).forward(self, hidden_states)
    return F.linear(hidden_states.float(), self.weight.float()), None, None


class Packed(Layout):
    """Experts in `gate_up_proj` and `down_proj`, tensors of all; a router that chooses."""

    flags = (*FLAGS, *READ)

    @property
    def gate_forward(self) -> Any:
        """Replaces gate.forward where a block makes one call to C."""
        return _gate_forward if self.family.rule.logits == "plain" else _gate_forward_float32

    def is_of(self, block: nn.Module, kind: type) -> bool:
        children = vars(block)["_modules"]
        names = self.family.blocks
        return (
            children.get(self.family.experts_at) is not None
            and children.get(self.family.gate_at) is not None
            and (not names or kind.__name__ in names)
        )

    def num_experts(self, block: nn.Module) -> int:
        return len(self.experts_of(block).down_proj)  # type: ignore[arg-type]  # a parameter

    def has_stock_gate(self, block: nn.Module) -> bool:
        return type(self.gate_of(block)).__module__ == self.family.module

    def settings(self, block: nn.Module) -> Settings:
        gate, rule = self.gate_of(block), self.family.rule
        if self.has_stock_gate(block):
            return self.reader.settings(block, gate)
        config = self.experts_of(block).config  # a user's router: what the model was made with
        scaled = rule.renormalises
        return Settings(
            getattr(config, self.family.config_top_k),
            bool(getattr(config, scaled)) if isinstance(scaled, str) else scaled,
            *self.reader.others(block, gate),
        )

    def read_experts(self, experts: nn.Module) -> tuple[LayerMatrices, str | None]:
        if type(experts).__module__ != self.family.module:
            return NOTHING_READ, f"experts of class {full_name(experts)}"
        for module in experts.modules():
            if reason := hooked(module):
                return NOTHING_READ, reason
        return read_packed(experts)

    def logits(self, gate: nn.Module, x: Tensor) -> Tensor:
        try:
            logits: Tensor = gate(x, logits_only=True)[0]
        except TypeError as error:
            # Another thread has unpatched the model since this forward began, and the stock
            # router has no such argument. Its logits are the same.
            if "logits_only" not in str(error):
                raise
            logits = gate(x)[0]
        return logits

    def output(self, block: nn.Module, x: Tensor, hidden: Tensor, said: Routing) -> Tensor:
        return hidden


def read_packed(experts: nn.Module) -> tuple[LayerMatrices, str | None]:
    """(the matrices of packed experts of transformers 5, None), or (none, why not)."""
    gated = _flag(experts, "has_gate", True)
    first = "gate_up_proj" if gated else "up_proj"
    names = [first, "down_proj"]
    if _flag(experts, "has_bias", False):
        names += [f"{first}_bias", "down_proj_bias"]
    tensors = [t for t in (getattr(experts, n, None) for n in names) if isinstance(t, Tensor)]
    if len(tensors) < len(names):
        return NOTHING_READ, f"no tensors {' and '.join(names)}"
    storage, reason = _read_storage(experts, gated)
    if reason := reason or shape_obstacle(names, tensors, 2 if gated else 1, storage):
        return NOTHING_READ, reason
    activation, reason = read_activation(experts, gated, storage)
    return (NOTHING_READ, reason) if reason else (LayerMatrices(tensors, activation, storage), None)


def _flag(experts: nn.Module, name: str, default: bool) -> bool:
    # Not getattr: on a module, what is not there costs ten times what is.
    return bool(vars(experts).get(name, getattr(type(experts), name, default)))


def _read_storage(experts: nn.Module, gated: bool) -> tuple[Storage, str | None]:
    """(how its flags say that the matrices are stored, None), or why C can't run these experts."""
    if _flag(experts, "has_post_expert_norm", False):
        return ROWS, "a norm after each expert"
    if _flag(experts, "_is_expert_parallel", False):
        return ROWS, "expert parallelism"
    by_turns = gated and not _flag(experts, "is_concatenated", True)
    if _flag(experts, "is_transposed", False):
        return INTERLEAVED if by_turns else TRANSPOSED, None
    return ROWS, "interleaved expert weights that are not transposed" if by_turns else None


def shape_obstacle(
    names: Sequence[str], tensors: list[Tensor], beside: int, storage: Storage
) -> str | None:
    """Why these are not one layer's, or None; beside: gate and up, or up alone."""
    into, down, *biases = tensors
    if down.dim() != 3:
        form = "(E, H, I)" if storage == ROWS else "(E, I, H)"
        return f"{names[1]} of shape {tuple(down.shape)} (expected {form})"
    num_experts = len(down)
    hidden_size, intermediate_size = sizes_of([into, down], storage)
    columns = beside * intermediate_size
    shape = (columns, hidden_size) if storage == ROWS else (hidden_size, columns)
    expected = [(num_experts, *shape), down.shape]
    expected += [(num_experts, columns), (num_experts, hidden_size)][: len(biases)]
    for name, tensor, own in zip(names, tensors, expected, strict=True):
        if tensor.shape != own:
            return f"{name} {tuple(tensor.shape)} beside {names[1]} {tuple(down.shape)}"
        if not tensor.is_contiguous():
            return "expert weights that are not contiguous"
    return None
