"""The backend in C: tensors in the CPU's memory, read where they lie."""

import torch
from torch import Tensor

from .. import _C
from .base import MoEOutput
from .cpu import get_num_threads
from .spec import RouteSpec
from .tables import DTYPES, WeightTable, as_array, as_tensor


class CBackend:
    """See `Backend`."""

    def moe(self, hidden: Tensor, logits: Tensor, table: WeightTable, spec: RouteSpec) -> MoEOutput:
        dtype = hidden.dtype
        out, *routing = _C.moe(
            as_array(hidden),
            as_array(logits),
            table.layer,
            spec.in_c(DTYPES[dtype]),
            get_num_threads(),
        )
        return MoEOutput(as_tensor(out, dtype), *map(torch.from_numpy, routing))

    def experts(
        self, hidden: Tensor, expert_ids: Tensor, routing_weights: Tensor, table: WeightTable
    ) -> Tensor:
        if expert_ids.dtype not in (torch.int32, torch.int64):
            expert_ids = expert_ids.to(torch.int64)
        if routing_weights.dtype not in (torch.float32, hidden.dtype):
            routing_weights = routing_weights.to(torch.float32)
        out = _C.experts(
            as_array(hidden),
            as_array(expert_ids),
            as_array(routing_weights),
            table.layer,
            get_num_threads(),
        )
        return as_tensor(out, hidden.dtype)

    def route(
        self, logits: Tensor, spec: RouteSpec, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        routing = _C.route(as_array(logits), spec.in_c(DTYPES[dtype]), get_num_threads(), False)
        weights, expert_ids, counts, rejections = map(torch.from_numpy, routing[:4])
        return weights, expert_ids, counts, rejections

    def choice_logits(self, logits: Tensor, spec: RouteSpec, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(_C.choice_logits(as_array(logits), spec.in_c(DTYPES[dtype])))

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(M, N): x (M, K) times the transpose of the weight (N, K), plus the bias (N,)."""
        return self.quantized_linear(x, weight, bias, weight.shape[0], DTYPES[weight.dtype])

    def quantized_linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, features: int, format: str
    ) -> Tensor:
        """The same with a weight of a quantised format, (bytes,) uint8, of so many features."""
        out = _C.dense(
            as_array(x),
            weight.data_ptr(),
            features,
            0 if bias is None else bias.data_ptr(),
            format,
            DTYPES[x.dtype],
            get_num_threads(),
        )
        return as_tensor(out, x.dtype)


C = CBackend()
