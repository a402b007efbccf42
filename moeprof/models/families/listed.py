"""The layout of transformers 4.57: the gate is a Linear, each expert a module of three Linears."""

from torch import Tensor, nn

from ...backends.tables import SWIGLU, Activation
from ..guards import full_name, hooked
from ..routing import Routing
from .activations import READ, read_function
from .base import Layout

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def _read_expert(
    expert: nn.Module, kind: type, matrices: list[Tensor]
) -> tuple[Activation, str | None]:
    """Append gate, up and down of an expert to `matrices`, and say what it computes between
    them; or why they can't be read.

    A model has hundreds of these modules: so from their dicts, since an attribute of a module
    takes ten times as long.
    """
    if type(expert) is not kind:
        return SWIGLU, f"an expert of class {full_name(expert)}"
    if reason := hooked(expert):
        return SWIGLU, reason
    parts = vars(expert)["_modules"]
    act_fn = parts.get("act_fn") or expert.act_fn
    activation, reason = read_function(act_fn)
    if not reason and isinstance(act_fn, nn.Module):
        reason = hooked(act_fn)
    if reason:
        return SWIGLU, reason
    for name in PROJECTIONS:
        linear = parts[name]
        own = vars(linear)["_parameters"]
        if type(linear) is not nn.Linear:
            return SWIGLU, f"{name} of class {full_name(linear)} where torch's Linear is supported"
        if own.get("bias") is not None:
            return SWIGLU, f"{name} with a bias"
        if reason := hooked(linear):
            return SWIGLU, reason
        if own.get("weight") is None:
            return SWIGLU, "a projection without a weight"
        matrices.append(own["weight"])
    return activation, None


def _shape_obstacle(matrices: list[Tensor]) -> str | None:
    """Why these gate_0, up_0, down_0, gate_1, ... are not one layer's, or None."""
    if not matrices or any(matrix.dim() != 2 for matrix in matrices):
        return "experts of different shapes"
    rows, columns = matrices[0].shape
    expected = ((rows, columns), (rows, columns), (columns, rows))
    for number, matrix in enumerate(matrices):
        if not matrix.is_contiguous():
            return "expert weights that are not contiguous"
        if matrix.shape != expected[number % 3]:
            return "experts of different shapes"
    return None


class Listed(Layout):
    """Experts in a ModuleList; the block chooses among what its Linear gives, and returns the
    logits beside the hidden states."""

    flags = READ
    gate_class = nn.Linear

    def num_experts(self, block: nn.Module) -> int:
        return len(vars(self.experts_of(block))["_modules"])

    def settings(self, block: nn.Module) -> tuple[int, bool]:
        return getattr(block, self.family.top_k), getattr(block, self.family.renormalises)

    def read_experts(self, experts: nn.Module) -> tuple[list[Tensor], Activation, str | None]:
        if type(experts) is not nn.ModuleList:
            return [], SWIGLU, f"experts of class {full_name(experts)}"
        if reason := hooked(experts):
            return [], SWIGLU, reason
        matrices: list[Tensor] = []
        activations = set()
        for expert in vars(experts)["_modules"].values():
            activation, reason = _read_expert(expert, self.classes[self.family.expert], matrices)
            if reason:
                return [], SWIGLU, reason
            activations.add(activation)
        if len(activations) > 1:
            return [], SWIGLU, "experts with different activations"
        reason = _shape_obstacle(matrices)
        return ([], SWIGLU, reason) if reason else (matrices, activations.pop(), None)

    def logits(self, gate: nn.Module, x: Tensor) -> Tensor:
        logits: Tensor = gate(x)
        return logits

    def output(self, hidden: Tensor, said: Routing) -> tuple[Tensor, Tensor | None]:
        return hidden, said.logits
