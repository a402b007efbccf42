"""The layouts of GPT-OSS and Aria in transformers 4.57: one module of packed experts, stored
transposed, beside the router."""

from typing import Any, ClassVar

from torch import Tensor, nn

from ...backends.tables import (
    INTERLEAVED,
    NOTHING_READ,
    SWIGLU,
    TRANSPOSED,
    Activation,
    LayerMatrices,
    Storage,
)
from ..guards import full_name, hooked
from ..routing import Routing
from .activations import read_clamped
from .listed import Listed
from .packed import shape_obstacle


class Transposed(Listed):
    """What the two share: how the tensors of the experts are read."""

    no_stand_in = (
        "transformers 4.57 calls these experts in a way of their own, which no other module can "
        "stand in for; transformers 5 can"
    )

    storage: ClassVar[Storage] = TRANSPOSED
    names: ClassVar[tuple[str, ...]]  # of the tensors, in the order that `WeightTable` takes

    def num_experts(self, block: nn.Module) -> int:
        return len(self.experts_of(block).get_parameter(self.names[1]))

    def read_experts(self, experts: nn.Module) -> tuple[LayerMatrices, str | None]:
        for module in experts.modules():
            if type(module).__module__ != self.family.module:
                return NOTHING_READ, f"experts of class {full_name(module)}"
            if reason := hooked(module):
                return NOTHING_READ, reason
        own: dict[str, Tensor] = dict(experts.named_parameters())
        if own.keys() != {*self.names}:
            wanted, got = " and ".join(self.names), " and ".join(own)
            return NOTHING_READ, f"experts with the tensors {got}, where {wanted} are supported"
        tensors = [own[name] for name in self.names]
        activation, reason = self.activation(experts)
        reason = reason or shape_obstacle(self.names, tensors, 2, self.storage)
        if reason:
            return NOTHING_READ, reason
        return LayerMatrices(tensors, activation, self.storage), None

    def activation(self, experts: nn.Module) -> tuple[Activation, str | None]:
        """(what the experts compute between their matrices, None), or (`SWIGLU`, why not)."""
        raise NotImplementedError  # abstract


class Aria(Transposed):
    """Two modules with a tensor each, and no biases; the block chooses, and adds shared experts."""

    names = ("fc1.weight", "fc2.weight")

    def activation(self, experts: nn.Module) -> tuple[Activation, str | None]:
        return SWIGLU, None  # its forward names silu


class GptOss(Transposed):
    """Tensors with biases, gate and up by turns; the router chooses."""

    storage = INTERLEAVED
    names = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")

    def has_stock_gate(self, block: nn.Module) -> bool:
        return type(self.gate_of(block)).__module__ == self.family.module

    def obstacle(self, block: nn.Module) -> str | None:
        if not self.has_stock_gate(block):
            return f"a router of class {full_name(self.gate_of(block))}"
        return super().obstacle(block)

    def activation(self, experts: nn.Module) -> tuple[Activation, str | None]:
        return read_clamped(experts)

    def logits(self, gate: nn.Module, x: Tensor) -> Tensor:
        return self.reader.logits(gate, x)  # which the gate does not return

    def output(self, block: nn.Module, x: Tensor, hidden: Tensor, said: Routing) -> Any:
        """The block gives out the scores of its own router's choice, (T, E), zero where an
        expert is not chosen; the gate is called for them, so that a recorder sees them."""
        return hidden, self.gate_of(block)(x)[0]
