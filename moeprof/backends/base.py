"""What a backend is: who runs routing and experts."""

from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from .spec import RouteSpec
from .tables import Matrices


class MoEOutput(NamedTuple):
    """What a layer gave for T tokens, H wide, with up to k_max experts each."""

    hidden: Tensor  # (T, H)
    weights: Tensor  # (T, k_max) float32
    expert_ids: Tensor  # (T, k_max) int32, best first, padded with -1
    counts: Tensor  # (T,) int32, experts of each token
    rejections: Tensor  # (T,) int32, the router's count before min_k and max_k


Table = TypeVar("Table", bound=Matrices, contravariant=True)


class Backend(Protocol[Table]):
    """Runs the layers whose tensors it can read.

    Errors: ValueError for a routing or for logits that can't be; the caller names the layer.
    """

    def moe(self, hidden: Tensor, logits: Tensor, table: Table, spec: RouteSpec) -> MoEOutput:
        """Route hidden (T, H) by logits (T, E) and run the experts that were selected."""
        ...

    def experts(
        self, hidden: Tensor, expert_ids: Tensor, routing_weights: Tensor, table: Table
    ) -> Tensor:
        """(T, H): run a routing that is given, (T, k); -1 or E is no expert."""
        ...

    def route(
        self, logits: Tensor, spec: RouteSpec, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The routing of logits (T, E) alone, as `MoEOutput` has it; dtype: that of the hidden
        states, to which the weights are rounded if the rule says so."""
        ...
