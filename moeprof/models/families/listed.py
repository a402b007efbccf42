"""The layout of transformers 4.57: each expert is a module of three Linears."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...backends.spec import Rule
from ...backends.tables import NOTHING_READ, SWIGLU, Activation, LayerMatrices
from ..guards import full_name, hooked
from ..routing import Routing
from .activations import READ, read_function
from .base import Layout
from .rules import Checked, Settings, check_gate, is_zeroed


def _read_expert(
    expert: nn.Module, kind: type, projections: tuple[str, ...], matrices: list[Tensor]
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
    for name in projections:
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
    """Experts in a ModuleList, which the block runs one after the other; it chooses among what a
    Linear gives, or its gate does that. Experts that all tokens share are added."""

    has_seam = False
    flags = READ

    def is_of(self, block: nn.Module, kind: type) -> bool:
        return kind.__name__ in self.family.blocks

    def has_stock_gate(self, block: nn.Module) -> bool:
        gate = type(self.gate_of(block))
        return gate is nn.Linear or gate.__module__ == self.family.module

    def num_experts(self, block: nn.Module) -> int:
        return len(self.experts_of(block))  # type: ignore[arg-type]  # a list, or ours

    def _chooser(self, block: nn.Module) -> nn.Module:
        """What has the settings: the gate, or the block where that is a Linear or a user's."""
        gate = self.gate_of(block)
        return gate if type(gate).__module__ == self.family.module else block

    def settings(self, block: nn.Module) -> Settings:
        return self.reader.settings(block, self._chooser(block))

    def rule(self, block: nn.Module) -> Rule:
        rule = self.reader.rule(block, self._chooser(block))
        return rule._replace(zeroed=is_zeroed(rule))  # as transformers 4 has it

    def check(self, block: nn.Module, dtype: torch.dtype) -> Checked:
        gate = self._chooser(block)
        if gate is block:  # the gate has no choice of its own, and the block shows none
            return Checked(self.rule(block), True, "")
        return check_gate(self.reader, block, gate, dtype, self.rule(block))

    def is_fused(self, block: nn.Module) -> bool:
        return True  # or nothing: its experts have no call that could be ours

    def obstacle(self, block: nn.Module) -> str | None:
        if not super().is_fused(block) and isinstance(self.family.fused, str):
            return f"{self.family.fused} {getattr(block, self.family.fused)} where 0 is supported"
        return super().obstacle(block)

    def read_experts(self, experts: nn.Module) -> tuple[LayerMatrices, str | None]:
        if type(experts) is not nn.ModuleList:
            return NOTHING_READ, f"experts of class {full_name(experts)}"
        if reason := hooked(experts):
            return NOTHING_READ, reason
        matrices: list[Tensor] = []
        kind, projections = self.classes[self.family.expert], self.family.projections
        activations = set()
        for expert in vars(experts)["_modules"].values():
            activation, reason = _read_expert(expert, kind, projections, matrices)
            if reason:
                return NOTHING_READ, reason
            activations.add(activation)
        if len(activations) > 1:
            return NOTHING_READ, "experts with different activations"
        if reason := _shape_obstacle(matrices):
            return NOTHING_READ, reason
        return LayerMatrices(matrices, activations.pop()), None

    def logits(self, gate: nn.Module, x: Tensor) -> Tensor:
        if type(gate) is not nn.Linear:
            return self.reader.logits(gate, x)
        logits: Tensor = gate(x.float() if self.family.rule.logits == "float32" else x)
        return logits

    def output(self, block: nn.Module, x: Tensor, hidden: Tensor, said: Routing) -> Any:
        parts = vars(block)["_modules"]
        if (shared := parts.get("shared_expert")) is not None:
            hidden = hidden + F.sigmoid(parts["shared_expert_gate"](x)) * shared(x)
        if (shared := parts.get("shared_experts")) is not None:
            hidden = hidden + shared(x)
        return (hidden, said.logits) if self.family.logged else hidden
