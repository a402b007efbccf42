"""The layout of transformers 5: a router module, and the experts in two 3-D tensors."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ...backends.tables import SWIGLU, Activation
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
    """Experts in `gate_up_proj` (E, 2I, H) and `down_proj` (E, H, I); a router that chooses."""

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

    def read_experts(self, experts: nn.Module) -> tuple[list[Tensor], Activation, str | None]:
        if type(experts).__module__ != self.family.module:
            return [], SWIGLU, f"experts of class {full_name(experts)}"
        for module in experts.modules():
            if reason := hooked(module):
                return [], SWIGLU, reason
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


def read_packed(experts: nn.Module) -> tuple[list[Tensor], Activation, str | None]:
    """Of packed experts of transformers 5: ([gate_up_proj, down_proj], activation, None), or
    ([up_proj, down_proj], activation, None) without gate, or ([], `SWIGLU`, why not)."""
    gated = _flag(experts, "has_gate", True)
    first = "gate_up_proj" if gated else "up_proj"
    into, down = getattr(experts, first, None), getattr(experts, "down_proj", None)
    if not (isinstance(into, Tensor) and isinstance(down, Tensor)):
        return [], SWIGLU, f"no tensors {first} and down_proj"
    reason = _flag_obstacle(experts) or _shape_obstacle(first, into, down, 2 if gated else 1)
    if reason:
        return [], SWIGLU, reason
    activation, reason = read_activation(experts, gated)
    return ([], SWIGLU, reason) if reason else ([into, down], activation, None)


def _flag(experts: nn.Module, name: str, default: bool) -> bool:
    # Not getattr: on a module, what is not there costs ten times what is.
    return bool(vars(experts).get(name, getattr(type(experts), name, default)))


def _flag_obstacle(experts: nn.Module) -> str | None:
    """What of its flags says that the C path can't run these experts, or None."""
    if _flag(experts, "has_bias", False):
        return "experts with a bias"
    if _flag(experts, "is_transposed", False) or not _flag(experts, "is_concatenated", True):
        return "transposed or interleaved expert weights"
    if _flag(experts, "has_post_expert_norm", False):
        return "a norm after each expert"
    if _flag(experts, "_is_expert_parallel", False):
        return "expert parallelism"
    return None


def _shape_obstacle(first: str, into: Tensor, down: Tensor, beside: int) -> str | None:
    """Why these are not one layer's, or None; beside: gate and up, or up alone."""
    if down.dim() != 3:
        return f"down_proj of shape {tuple(down.shape)} (expected (E, H, I))"
    num_experts, hidden_size, intermediate_size = down.shape
    if into.shape != (num_experts, beside * intermediate_size, hidden_size):
        return f"{first} {tuple(into.shape)} beside down_proj {tuple(down.shape)}"
    if not (into.is_contiguous() and down.is_contiguous()):
        return "expert weights that are not contiguous"
    return None
