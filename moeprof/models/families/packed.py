"""The layout of transformers 5: a router module, and the experts in two 3-D tensors."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..guards import full_name, hooked
from ..routing import Routing
from .base import Family, Layout, is_silu

# Of a module of experts, in its class or its instance: how it keeps and uses its tensors.
FLAGS = (
    "has_bias",
    "is_transposed",
    "is_concatenated",
    "has_post_expert_norm",
    "_is_expert_parallel",
)


def _gate_forward(self: Any, hidden_states: Tensor, *, logits_only: bool = False) -> Any:
    """The router's forward while its block is patched; bound to the router.

    The block asks for logits only: no top-k runs, and the recorder of router logits, a hook
    on the router, still sees them. For everyone else it is the stock router.
    """
    if not logits_only:
        return type(self).forward(self, hidden_states)
    logits = F.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
    return logits, None, None


class Packed(Layout):
    """Experts in `gate_up_proj` (E, 2I, H) and `down_proj` (E, H, I); a router that chooses."""

    flags = (*FLAGS, "act_fn")
    gate_forward = staticmethod(_gate_forward)

    def __init__(self, family: Family):
        super().__init__(family)
        self.gate_class = self.classes[family.router]
        self.experts_class: type[nn.Module] = self.classes[family.experts]

    def num_experts(self, block: nn.Module) -> int:
        return len(self.experts_of(block).down_proj)  # type: ignore[arg-type]  # a parameter

    def settings(self, block: nn.Module) -> tuple[int, bool]:
        gate, family = self.gate_of(block), self.family
        if type(gate) is self.gate_class:
            return getattr(gate, family.top_k), family.renormalised_by(gate)
        config = self.experts_of(block).config  # a user's router: what the model was made with
        return getattr(config, family.config_top_k), family.renormalised_by(config)

    def read_experts(self, experts: nn.Module) -> tuple[list[Tensor], str | None]:
        if type(experts) is not self.experts_class:
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

    def output(self, hidden: Tensor, said: Routing) -> Tensor:
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
