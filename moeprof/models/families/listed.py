"""The layout of transformers 4.57: the gate is a Linear, each expert a module of three Linears."""

import torch
from torch import Tensor, nn

from ...backends.spec import Rule
from ..guards import full_name, hooked
from ..routing import Routing
from .base import Layout, is_silu
from .rules import Checked, Settings

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def _read_expert(expert: nn.Module, kind: type, matrices: list[Tensor]) -> str | None:
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
    for name in PROJECTIONS:
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
    gate_forward = None  # a Linear gives logits and nothing else

    def is_of(self, block: nn.Module) -> bool:
        return type(block).__name__ in self.family.blocks

    def has_stock_gate(self, block: nn.Module) -> bool:
        return type(self.gate_of(block)) is nn.Linear

    def num_experts(self, block: nn.Module) -> int:
        return len(vars(self.experts_of(block))["_modules"])

    def settings(self, block: nn.Module) -> Settings:
        return self.reader.settings(block, block)  # what is a gate's there, is the block's here

    def rule(self, block: nn.Module) -> Rule:
        return self.reader.rule(block, block)

    def check(self, block: nn.Module, dtype: torch.dtype) -> Checked:
        return Checked(self.rule(block), True, "")  # the gate has no choice of its own to check

    def read_experts(self, experts: nn.Module) -> tuple[list[Tensor], str | None]:
        if type(experts) is not nn.ModuleList:
            return [], f"experts of class {full_name(experts)}"
        if reason := hooked(experts):
            return [], reason
        matrices: list[Tensor] = []
        for expert in vars(experts)["_modules"].values():
            if reason := _read_expert(expert, self.classes[self.family.expert], matrices):
                return [], reason
        return matrices, _shape_obstacle(matrices)

    def logits(self, gate: nn.Module, x: Tensor) -> Tensor:
        logits: Tensor = gate(x)
        return logits

    def output(self, hidden: Tensor, said: Routing) -> tuple[Tensor, Tensor | None]:
        return hidden, said.logits
