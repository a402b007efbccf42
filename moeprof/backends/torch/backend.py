"""The backend in torch, see `Backend`."""

import torch
from torch import Tensor

from ..base import MoEOutput
from ..spec import RouteSpec
from ..tables import LayerMatrices
from . import routing
from .experts import run_experts


class TorchBackend:
    """On the device that the tensors are on."""

    def moe(
        self, hidden: Tensor, logits: Tensor, table: LayerMatrices, spec: RouteSpec
    ) -> MoEOutput:
        weights, expert_ids, counts, rejections = self.route(logits, spec, hidden.dtype)
        out = run_experts(hidden, expert_ids, weights, table)
        return MoEOutput(out, weights, expert_ids, counts, rejections)

    def experts(
        self, hidden: Tensor, expert_ids: Tensor, routing_weights: Tensor, table: LayerMatrices
    ) -> Tensor:
        return run_experts(hidden, expert_ids, routing_weights, table)

    def route(
        self, logits: Tensor, spec: RouteSpec, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return routing.route(logits, spec, dtype)


TORCH = TorchBackend()
