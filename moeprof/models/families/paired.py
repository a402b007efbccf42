"""The layout of Granite in transformers 4.57: packed experts, whose tensors lie in the block."""

from torch import Tensor, nn

from ...backends.tables import NOTHING_READ, LayerMatrices
from ..guards import full_name, hooked
from .activations import read_function
from .listed import Listed

_INTO, _DOWN = "input_linear", "output_linear"  # weights (E, 2I, H) and (E, H, I)


class Paired(Listed):
    """Two modules beside the router, each with one tensor for all experts; the router chooses."""

    no_stand_in = (
        "transformers 4.57 calls these experts in a way of their own, which no other module can "
        "stand in for; transformers 5 can"
    )

    def experts_of(self, block: nn.Module) -> nn.Module:
        return block

    def num_experts(self, block: nn.Module) -> int:
        return len(vars(block)["_modules"][_INTO].weight)

    def read_experts(self, experts: nn.Module) -> tuple[LayerMatrices, str | None]:
        parts = vars(experts)["_modules"]
        for name in (_INTO, _DOWN):
            if type(parts[name]) is not self.classes[self.family.expert]:
                return NOTHING_READ, f"{name} of class {full_name(parts[name])}"
        for part in (parts[_INTO], parts[_DOWN], experts.activation):
            if isinstance(part, nn.Module) and (reason := hooked(part)):
                return NOTHING_READ, reason
        matrices = [parts[_INTO].weight, parts[_DOWN].weight]
        activation, reason = read_function(experts.activation)
        reason = reason or _shape_obstacle(*matrices)
        return (NOTHING_READ, reason) if reason else (LayerMatrices(matrices, activation), None)

    def logits(self, gate: nn.Module, x: Tensor) -> Tensor:
        logits: Tensor = vars(gate)["_modules"]["layer"](x)
        return logits.float()


def _shape_obstacle(into: Tensor, down: Tensor) -> str | None:
    """Why these are not one layer's, or None."""
    if down.dim() != 3 or into.shape != (len(down), 2 * down.shape[2], down.shape[1]):
        return (
            f"{_INTO} {tuple(into.shape)} and {_DOWN} {tuple(down.shape)} "
            "(expected (E, 2I, H) and (E, H, I))"
        )
    if not (into.is_contiguous() and down.is_contiguous()):
        return "expert weights that are not contiguous"
    return None
