"""The layout of transformers 5: a router module, and the experts in two 3-D tensors."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..guards import full_name, hooked
from ..routing import Routing
from .base import Layout, is_silu
from .rules import Settings

# Of a module of experts, in its class or its instance: how it keeps and uses its tensors.
FLAGS = (
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

    flags = (*FLAGS, "act_fn")

    @property
    def gate_forward(self) -> Any:
        """Replaces gate.forward where a block makes one call to C."""
        return _gate_forward if self.family.rule.logits == "plain" else _gate_forward_float32

    def is_of(self, block: nn.Module) -> bool:
        children = vars(block)["_modules"]
        names = self.family.blocks
        return (
            children.get(self.family.experts_at) is not None
            and children.get(self.family.gate_at) is not None
            and (not names or type(block).__name__ in names)
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
            (),
        )

    def read_experts(self, experts: nn.Module) -> tuple[list[Tensor], str | None]:
        if type(experts).__module__ != self.family.module:
            return [], f"experts of class {full_name(experts)}"
        for module in experts.modules():
            if reason := hooked(module):
                return [], reason
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


def read_packed(experts: nn.Module) -> tuple[list[Tensor], str | None]:
    """([gate_up_proj, down_proj], None) of packed experts of transformers 5, or ([], why not)."""
    gate_up, down = getattr(experts, "gate_up_proj", None), getattr(experts, "down_proj", None)
    if not (isinstance(gate_up, Tensor) and isinstance(down, Tensor)):
        return [], "no tensors gate_up_proj and down_proj"
    if reason := _flag_obstacle(experts):
        return [], reason
    activation = getattr(experts, "act_fn", None)
    if not is_silu(activation):
        return [], f"activation {activation!r} (SiLU is supported)"
    if down.dim() != 3:
        return [], f"down_proj of shape {tuple(down.shape)} (expected (E, H, I))"
    num_experts, hidden_size, intermediate_size = down.shape
    if gate_up.shape != (num_experts, 2 * intermediate_size, hidden_size):
        return [], f"gate_up_proj {tuple(gate_up.shape)} beside down_proj {tuple(down.shape)}"
    if not (gate_up.is_contiguous() and down.is_contiguous()):
        return [], "expert weights that are not contiguous"
    return [gate_up, down], None


def _flag_obstacle(experts: nn.Module) -> str | None:
    """What of its flags says that these are no plain SwiGLU experts, or None."""
    own, kind = vars(experts), type(experts)

    def flag(name: str, default: bool) -> bool:
        # Not getattr: on a module, what is not there costs ten times what is.
        return bool(own.get(name, getattr(kind, name, default)))

    if flag("has_bias", False):
        return "experts with a bias"
    if flag("is_transposed", False) or not flag("is_concatenated", True):
        return "transposed or interleaved expert weights"
    if flag("has_post_expert_norm", False):
        return "a norm after each expert"
    if flag("_is_expert_parallel", False):
        return "expert parallelism"
    apply_gate = getattr(kind, "_apply_gate", None)
    if apply_gate is not None and apply_gate.__name__ != "_default_apply_gate":
        return "a gating of its own (_apply_gate)"
    return None
