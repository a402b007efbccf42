"""A patched layer: what it routes by, and what it has read of its block."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from .. import _C
from ..backends.ops import operands_of, prepare
from ..backends.spec import RouteSpec, Rule
from ..backends.tables import NOTHING_READ, Matrices, WeightTable, backend_of, table_of
from ..models.families.base import Layout
from ..models.families.rules import Settings
from ..models.guards import autocast_obstacle
from ..models.routing import Routing
from ..null import LayerNull, TokenNull
from ..routers import Router, TopK
from ..routers.base import warn_if_capped
from .state import Patched

Callback = Callable[[int, Routing], None]


@dataclass(eq=False)
class PatchedLayer(Patched):
    """What a patched block carries: "model.layers.0.mlp"."""

    made_anew: ClassVar[tuple[str, ...]] = ("_spec", "_read")

    index: int  # among the model's MoE blocks
    num_experts: int
    family: Layout
    router: Router | Callable[..., Any] | None  # None: the model's own
    null: LayerNull | TokenNull | None
    norm: str
    strict: bool
    fused: bool  # one call to C runs the whole block; else its gate and its experts are ours
    backend: str | None  # None: the one of the device that the experts are on
    own_logits: bool  # they can be had without the choice of the gate, which has a known rule
    # Of `Handle.on_routing`, in the order that they came:
    callbacks: tuple[Callback, ...] = field(default=(), repr=False)
    fallback: str | None = None  # why the model's own forward runs, once it does
    cap: "CapWatch | None" = field(default=None, repr=False)  # of a null's router, max_k None
    # The model's settings, and what was made of them; the block's experts, as they were read.
    _spec: tuple[Settings, RouteSpec, Any] | None = field(default=None, repr=False)
    _read: tuple[_C.Watch, Matrices] | None = field(default=None, repr=False)

    @property
    def title(self) -> str:
        """What it is called where what a router returned is refused."""
        return f"{self.name} ({self.family.family.name})"

    def spec(self, block: nn.Module) -> tuple[RouteSpec, Any]:
        """(what the router is told, the same as operands of `moe_op`).

        The model's settings are read in every call, and the spec is made anew when they have
        changed. Tensors among them have no values while a compiler traces: what was read last
        stays, and is part of what it compiles.
        """
        try:
            settings = self.family.settings(block)
            if self._spec is not None and torch.compiler.is_compiling():
                settings = settings._replace(tensors=self._spec[0].tensors)
            if self._spec is None or self._spec[0] != settings:
                spec = self._make_spec(settings, self.family.rule(block))
                spec.in_c("float32")  # raises what only C tells
                tensor = next(chain(block.parameters(), block.buffers()))
                if self._backend_for([tensor]) == "torch":
                    prepare(spec, tensor.device)
                self._spec = settings, spec, operands_of(spec)
        except (TypeError, ValueError, AttributeError) as error:
            raise type(error)(f"{self.title}: {error}") from None
        return self._spec[1:]

    def _make_spec(self, settings: Settings, rule: Rule) -> RouteSpec:
        router = TopK(settings.top_k) if self.router is None else self.router
        norm = self.norm
        if norm == "model":
            norm = "sum" if settings.renormalises else "none"
        assert isinstance(router, Router)
        return router.spec(
            self.num_experts, norm=norm, norm_k=settings.top_k, null=self.null, rule=rule
        )

    def table(self, block: nn.Module) -> tuple[Matrices, str | None]:
        """(what the backend runs as the block's experts, None), or (none, why it can't run).

        The experts are read once, and again when anything about them has changed.
        """
        if self.fused and block.training and not self.family.is_fused(block):
            setting = self.family.family.fused
            return NOTHING_READ, f"{setting} was set after patch: unpatch, and patch again"
        if torch.compiler.is_compiling():  # a tracer's tensors lie nowhere
            return self.family.readable(block, self.backend)
        if self._read is not None:
            unchanged, table = self._read
            as_read = unchanged and self._goes_with(table)
            if as_read and not autocast_obstacle(self.family.gate_of(block)):
                return table, None
        read, reason = self.family.readable(block, self.backend)
        if reason:
            return read, reason
        unchanged = self.family.watch(block)
        # Once more: another thread may have changed it since, before it was watched.
        read, reason = self.family.readable(block, self.backend)
        if reason:
            return read, reason
        table = table_of(read)
        self._read = unchanged, table
        return table, None

    def _goes_with(self, table: Matrices) -> bool:
        """Do the experts lie where they did, for the backend that runs them?"""
        if isinstance(table, WeightTable):
            return table.is_current()
        return table.backend == self._backend_for(table.matrices)

    def _backend_for(self, tensors: Sequence[Tensor]) -> str:
        """The one that was asked for, or that of the device."""
        return self.backend or backend_of(tensors)


@dataclass(eq=False)
class CapWatch:
    """Of all layers of one patch: how often the cap that max_k=None is cut a token's experts."""

    cap: int
    num_experts: int
    tokens: int = 0
    capped: int = 0
    warned: bool = False
    # Of rejections on other devices, by these: tokens that are counted there, and not here yet.
    calls: int = 0
    waiting: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    def _now_and_then(self, rejections: Tensor) -> int:
        """The tokens capped since this was not 0: the host waits for a device, so it looks after
        1, 2, 4, 8, ... calls."""
        capped = (rejections > self.cap).sum()
        device = rejections.device
        self.waiting[device] = self.waiting[device] + capped if device in self.waiting else capped
        self.calls += 1
        if self.calls & (self.calls - 1):
            return 0
        found = sum(map(int, self.waiting.values()))
        self.waiting.clear()
        return found

    def see(self, rejections: Tensor) -> None:
        """Count the tokens of one call, rejections (T,); warn once in the life of the patch."""
        if self.warned or torch.compiler.is_compiling() or type(rejections) is not Tensor:
            return
        self.tokens += len(rejections)
        if rejections.is_cpu:
            capped = int(np.count_nonzero(rejections.numpy() > self.cap))
        else:
            capped = self._now_and_then(rejections)
        if capped:  # rarely; a decode step goes by in some microseconds
            self.capped += capped
            self.warned = warn_if_capped(
                self.capped,
                self.tokens,
                self.num_experts,
                unit="tokens of all layers so far",
                stacklevel=3,
            )
