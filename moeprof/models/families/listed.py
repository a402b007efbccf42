"""The layout of transformers 4.57: the gate is a Linear, each expert a module of three Linears."""

from torch import Tensor, nn

from ..guards import full_name, hooked
from ..routing import Routing
from .base import Layout, is_silu


def _read_expert(
    expert: nn.Module, kind: type, projections: tuple[str, ...], matrices: list[Tensor]
) -> str | None:
    """Append gate, up and down of an expert to `matrices`; or why they can't be read.

    A model has hundreds of these modules: so from their dicts, since an attribute of a module
    takes ten times as long.
    """
    if type(expert) is not kind:
        return f"an expert of class {full_name(expert)}"
    if reason := hooked(expert):
        return reason
    parts = vars(expert)["_modules"]
    activation = parts.get("act_fn") or expert.act_fn
    if not is_silu(activation):
        return f"activation {activation!r} (SiLU is supported)"
    if isinstance(activation, nn.Module) and (reason := hooked(activation)):
        return reason
    for name in projections:
        linear = parts[name]
        own = vars(linear)["_parameters"]
        if type(linear) is not nn.Linear:
            return f"{name} of class {full_name(linear)} where torch's Linear is supported"
        if own.get("bias") is not None:
            return f"{name} with a bias"
        if reason := hooked(linear):
            return reason
        if own.get("weight") is None:
            return "a projection without a weight"
        matrices.append(own["weight"])
    return None


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

    flags = ("act_fn",)
    gate_class = nn.Linear

    def num_experts(self, block: nn.Module) -> int:
        return len(vars(self.experts_of(block))["_modules"])

    def settings(self, block: nn.Module) -> tuple[int, bool]:
        return getattr(block, self.family.top_k), self.family.renormalised_by(block)

    def read_experts(self, experts: nn.Module) -> tuple[list[Tensor], str | None]:
        if type(experts) is not nn.ModuleList:
            return [], f"experts of class {full_name(experts)}"
        if reason := hooked(experts):
            return [], reason
        matrices: list[Tensor] = []
        kind, projections = self.classes[self.family.expert], self.family.projections
        for expert in vars(experts)["_modules"].values():
            if reason := _read_expert(expert, kind, projections, matrices):
                return [], reason
        return matrices, _shape_obstacle(matrices)

    def logits(self, gate: nn.Module, x: Tensor) -> Tensor:
        logits: Tensor = gate(x)
        return logits

    def output(self, hidden: Tensor, said: Routing) -> tuple[Tensor, Tensor | None]:
        return hidden, said.logits
