"""A family of MoE blocks: its record, which is data, and the layout by which it is read.

A *layout* is how a major version of transformers keeps gate and experts. Families that share
one differ by their records alone.
"""

import sys
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ... import _C
from ...backends.spec import Rule
from ...backends.tables import NOTHING_READ, LayerMatrices, backend_of, tensor_obstacle
from ..guards import Watched, gate_obstacle
from ..quantized import QuantizedExperts
from ..reading import as_logits, read_gate
from ..routing import Routing
from .rules import Checked, GateRule, RuleReader, Settings, check_gate


@dataclass(frozen=True)
class Family:
    """What of a family of blocks can't be read from its modules. Names are those of classes.

    name : as transformers calls the model's folder, "olmoe"
    rule : how its own router chooses
    gate_at, experts_at : the attributes of the block that hold gate and experts; no experts_at
        where the block itself holds the experts' tensors
    fused : the block does nothing else than to call its gate and its experts; a text is an
        attribute of the block that makes it do more, unless it is 0
    config_top_k : what the configuration calls the number of experts that a token gets
    blocks : the classes of its blocks; none stands for whatever holds a gate and experts, and
        for no class of transformers 4
    expert, projections : of transformers 4, the class of an expert and the attributes of it that
        hold gate, up and down; where the layout names its experts, neither
    logged : a block of transformers 4 returns the logits beside the hidden states
    """

    name: str
    rule: GateRule = GateRule()
    gate_at: str = "gate"
    experts_at: str = "experts"
    fused: bool | str = False
    config_top_k: str = "num_experts_per_tok"
    blocks: tuple[str, ...] = ()
    expert: str = ""
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    logged: bool = True

    @cached_property
    def module(self) -> str:
        """The Python module that its classes are from."""
        return f"transformers.models.{self.name}.modeling_{self.name}"


class Layout:
    """The blocks of one family, read in the layout of the transformers that is installed."""

    gate_forward: Any = None  # replaces gate.forward of a fused block, where one is needed
    has_seam = True  # the block calls its experts as a module of their own
    no_stand_in = ""  # why no other module can take the place of the experts
    flags: ClassVar[tuple[str, ...]] = ()  # attributes of modules that `read_experts` looks at

    def __init__(self, family: Family):
        self.family = family
        self.reader = RuleReader(family.rule)
        self.classes = vars(sys.modules[family.module])

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.family.name}>"

    def __deepcopy__(self, memo: dict[int, Any]) -> "Layout":
        return self  # it belongs to no model, so that a copy of a patched one may share it

    # What a layout has to say:

    def is_of(self, block: nn.Module, kind: type) -> bool:
        """Is this a block of the family, as `kind`, a class from the family's module?"""
        raise NotImplementedError  # abstract

    def num_experts(self, block: nn.Module) -> int:
        raise NotImplementedError  # abstract

    def settings(self, block: nn.Module) -> Settings:
        """What the model's own router is set to now."""
        raise NotImplementedError  # abstract

    def read_experts(self, experts: nn.Module) -> tuple[LayerMatrices, str | None]:
        """(their matrices, None), or (none, why not).

        Not where the modules, a hook or a forward among them are others than the stock ones.
        """
        raise NotImplementedError  # abstract

    def has_stock_gate(self, block: nn.Module) -> bool:
        """Has it the gate that transformers gave it? Otherwise a user has put in another."""
        raise NotImplementedError  # abstract

    def logits(self, gate: nn.Module, x: Tensor) -> Tensor:
        """What the stock gate says of x (T, H), through its __call__."""
        raise NotImplementedError  # abstract

    def output(self, block: nn.Module, x: Tensor, hidden: Tensor, said: Routing) -> Any:
        """What the block's forward returns: of its input x, and of `hidden`, what the experts
        gave, in the same shape."""
        raise NotImplementedError  # abstract

    # Shared:

    def dtype_of(self, block: nn.Module) -> torch.dtype:
        """Of the hidden states that its experts take."""
        experts = self.experts_of(block)
        if isinstance(experts, QuantizedExperts):
            return experts.dtype
        return next(experts.parameters()).dtype

    def gate_of(self, block: nn.Module) -> nn.Module:
        gate: nn.Module = vars(block)["_modules"][self.family.gate_at]
        return gate

    def experts_of(self, block: nn.Module) -> nn.Module:
        experts: nn.Module = vars(block)["_modules"][self.family.experts_at]
        return experts

    def rule(self, block: nn.Module) -> Rule:
        """What the model's own router makes of its logits, as it is set now."""
        return self.reader.rule(block, self.gate_of(block))

    def is_fused(self, block: nn.Module) -> bool:
        """Does it nothing else than to call its gate and its experts?"""
        fused = self.family.fused
        return not getattr(block, fused) if isinstance(fused, str) else fused

    def check(self, block: nn.Module, dtype: torch.dtype) -> Checked:
        """Does the stock gate do what the record says? dtype: of the hidden states."""
        try:
            rule = self.rule(block)
        except (TypeError, ValueError, AttributeError) as error:
            return Checked(None, False, f"its router can't be read ({error})")
        return check_gate(self.reader, block, self.gate_of(block), dtype, rule)

    def readable(
        self, block: nn.Module, backend: str | None = None
    ) -> tuple[LayerMatrices, str | None]:
        """(the matrices of the experts, None), or (none, why this block can't run now).

        backend: the one that is to run them; None for the one of their device.
        """
        if reason := self.obstacle(block):
            return NOTHING_READ, reason
        experts = self.experts_of(block)
        if isinstance(experts, QuantizedExperts):
            read, reason = experts.read()
        else:
            read, reason = self.read_experts(experts)
        if reason:
            return NOTHING_READ, reason
        backend = backend or backend_of(read.matrices)
        if reason := tensor_obstacle(read.matrices, read.storage, backend):
            return NOTHING_READ, reason
        return read._replace(backend=backend), None

    def obstacle(self, block: nn.Module) -> str | None:
        """What stands before the experts of this block and would be passed by, or None."""
        if block.training and self.family.rule.affinity == "sparsemixer":
            return "its router draws experts at random in training mode: call model.eval()"
        return gate_obstacle(self.gate_of(block), self.has_stock_gate(block))

    def watch(self, block: nn.Module) -> _C.Watch:
        """True for as long as what `readable` found of the block is so, but for autocast and where
        the experts' tensors lie."""
        gate, experts = self.gate_of(block), self.experts_of(block)
        fused = self.family.fused
        watched = Watched()
        watched.attributes(block, "training", *((fused,) if isinstance(fused, str) else ()))
        watched.children(block)
        watched.everywhere()
        watched.hooks(gate)
        flags = ("exact",) if isinstance(experts, QuantizedExperts) else self.flags
        watched.parts(experts, flags)
        return watched.begin()

    def route(self, block: nn.Module, x: Tensor, name: str) -> Routing:
        """What the gate of the block `name`, stock or a user's, says of x (T, H)."""
        gate = self.gate_of(block)
        if self.has_stock_gate(block):
            return Routing(None, None, logits=self.logits(gate, x))
        return self.read(gate(x), len(x), self.num_experts(block), name)

    def read(self, output: Any, tokens: int, num_experts: int, name: str) -> Routing:
        """What a user's gate `name` returned; as the family's own, it may give probabilities."""
        said = read_gate(output, tokens, num_experts, name)
        if said.logits is None or self.family.rule.logits:
            return said
        return said._replace(logits=as_logits(said.logits))
