"""A family of MoE blocks: its record, which is data, and the layout by which it is read.

A *layout* is how a major version of transformers keeps gate and experts. Families that share
one differ by their records alone.
"""

import sys
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ...backends.tables import tensor_obstacle
from ..guards import Unchanged, gate_obstacle
from ..reading import read_gate
from ..routing import Routing


@dataclass(frozen=True)
class Family:
    """What of a family of blocks can't be read from its modules. Names are those of classes.

    name : as transformers calls the model's folder, "olmoe"
    module : the Python module that the classes are from
    block : holds gate and experts, and does nothing else
    router, experts : the gate, and the module of all experts, of transformers 5
    expert : one expert of transformers 4, where the gate is torch's Linear
    projections : the attributes of such an expert that hold gate, up and down
    gate_at, experts_at : the attributes of the block that hold them
    top_k, renormalises : the attributes by which the model's own router says how many experts
        it takes, and whether their weights are scaled to sum 1; True where it always does that
    config_top_k : the first of them in the model's configuration
    rule : the model's own router in words
    """

    name: str
    module: str
    block: str
    router: str
    experts: str
    expert: str
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    gate_at: str = "gate"
    experts_at: str = "experts"
    top_k: str = "top_k"
    renormalises: str | bool = "norm_topk_prob"
    config_top_k: str = "num_experts_per_tok"
    rule: str = "softmax, top-k"

    def is_of(self, block: nn.Module) -> bool:
        kind = type(block)
        return kind.__name__ == self.block and kind.__module__ == self.module

    def renormalised_by(self, owner: object) -> bool:
        """Whether the weights are scaled to sum 1, as a router, block or configuration says."""
        said = self.renormalises
        return said if isinstance(said, bool) else bool(getattr(owner, said))


class Layout:
    """The blocks of one family, read in the layout of the transformers that is installed."""

    flags: ClassVar[tuple[str, ...]] = ()  # attributes of modules that `read_experts` looks at
    gate_forward: ClassVar[Any] = None  # replaces gate.forward, where one is needed
    gate_class: type[nn.Module]

    def __init__(self, family: Family):
        self.family = family
        self.classes = vars(sys.modules[family.module])

    def __deepcopy__(self, memo: dict[int, Any]) -> "Layout":
        return self  # it belongs to no model, so that a copy of a patched one may share it

    # What a layout has to say:

    def num_experts(self, block: nn.Module) -> int:
        raise NotImplementedError  # abstract

    def settings(self, block: nn.Module) -> tuple[int, bool]:
        """(top_k, whether the weights are scaled to sum 1) of the model's own router, as it is
        set now."""
        raise NotImplementedError  # abstract

    def read_experts(self, experts: nn.Module) -> tuple[list[Tensor], str | None]:
        """(the matrices as `WeightTable` takes them, None), or ([], why not).

        Not where the modules, a hook or a forward among them are others than the stock ones.
        """
        raise NotImplementedError  # abstract

    def logits(self, gate: nn.Module, x: Tensor) -> Tensor:
        """What the stock gate says of x (T, H), through its __call__."""
        raise NotImplementedError  # abstract

    def output(self, hidden: Tensor, said: Routing) -> Any:
        """What the block's forward returns."""
        raise NotImplementedError  # abstract

    # Shared:

    def gate_of(self, block: nn.Module) -> nn.Module:
        gate: nn.Module = vars(block)["_modules"][self.family.gate_at]
        return gate

    def experts_of(self, block: nn.Module) -> nn.Module:
        experts: nn.Module = vars(block)["_modules"][self.family.experts_at]
        return experts

    def has_stock_gate(self, block: nn.Module) -> bool:
        """Has it the gate that transformers gave it? Otherwise a user has put in another."""
        return type(self.gate_of(block)) is self.gate_class

    def readable(self, block: nn.Module) -> tuple[list[Tensor], str | None]:
        """(the matrices of the experts, None), or ([], why this block can't run on the C path
        now)."""
        if reason := self.obstacle(block):
            return [], reason
        matrices, reason = self.read_experts(self.experts_of(block))
        if reason := reason or tensor_obstacle(matrices):
            return [], reason
        return matrices, None

    def obstacle(self, block: nn.Module) -> str | None:
        """What stands before the experts of this block and would be passed by, or None."""
        return gate_obstacle(self.gate_of(block), self.gate_class, type(self).gate_forward)

    def unchanged(self, block: nn.Module) -> Unchanged:
        """Tells later whether what `read_experts` read is still so."""
        return Unchanged(self.experts_of(block), self.flags)

    def route(self, block: nn.Module, x: Tensor, name: str) -> Routing:
        """What the gate of the block `name`, stock or a user's, says of x (T, H)."""
        gate = self.gate_of(block)
        if type(gate) is self.gate_class:
            return Routing(None, None, logits=self.logits(gate, x))
        return read_gate(gate(x), len(x), self.num_experts(block), name)


def is_silu(activation: object) -> bool:
    """True for torch's and transformers' SiLU."""
    return type(activation).__name__ in ("SiLU", "SiLUActivation")
