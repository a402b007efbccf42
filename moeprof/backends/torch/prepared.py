"""What a `RouteSpec` is on a device: its arrays as tensors there, made once.

T tokens, E experts, of which a token may use n. What is computed with the tensors copies nothing
to the device, and takes few operations: `masked_fill` takes a number as it is, where `where` would
fill a tensor with it first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..spec import RouteSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray


@cache
def precise(device: torch.device) -> torch.dtype:
    """The dtype of p-values, counts and sums of weights: float64, as in C.

    float32 where a device has no other (MPS, some XPUs): there a token whose count hangs on the
    last bits of a p-value may get other experts than elsewhere, and the least p-value is 1e-38.
    """
    if device.type == "mps":
        return torch.float32
    if device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64:
        return torch.float32
    return torch.float64


class Prepared:
    """A spec on a device. ValueError for a spec that can't be, as `RouteSpec.in_c` raises it."""

    def __init__(self, spec: RouteSpec, device: torch.device):
        spec.in_c("float32")  # checks it
        rule = spec.rule
        self.spec, self.device, self.precise = spec, device, precise(device)
        self.is_tabled = spec.null[0] in ("table", "conformal")
        self.is_by_expert = self.is_tabled and np.ndim(spec.null[2]) == 2
        bias = rule.bias
        # A bias that is the same for all changes no choice, and the least of it leaves nothing
        # of the scale that the others are on.
        if bias is not None and not rule.zeroed and not np.ptp(bias):
            bias = None
        self.least_bias = 0.0 if bias is None else float(np.min(bias))
        self.bias = None if bias is None else self.tensor(bias, torch.float32)
        own = rule.expert_scale
        self.expert_scale = None if own is None else self.tensor(own)
        self.experts = rule.eligible(spec.num_experts)  # n
        ranks = np.arange(1, self.experts + 1)
        self.ranks, self.whole_ranks = self.tensor(ranks), self.tensor(ranks, torch.int32)
        self.slots = self.tensor(np.arange(spec.max_k), torch.int32)
        self.nan = self.tensor(np.array(np.nan))
        self._constants: dict[Any, Tensor] = {}

    @classmethod
    def of(cls, spec: RouteSpec, device: torch.device) -> Prepared:
        # A text as the key: with a device as one, torch.compile can't write its guards.
        return spec.made(str(device), lambda: cls(spec, device))

    def tensor(self, values: NDArray[Any], dtype: torch.dtype | None = None) -> Tensor:
        """A copy of an array on the device, `precise` unless there is a dtype."""
        with torch.inference_mode(False):  # no gradient passes a tensor of that mode
            return torch.tensor(values, dtype=dtype or self.precise, device=self.device)

    def constant(self, make: Callable[..., NDArray[Any]], *arguments: Any) -> Tensor:
        """The array make(spec, *arguments) on the device, made once."""
        key = make, arguments
        if key not in self._constants:
            self._constants[key] = self.tensor(make(self.spec, *arguments))
        return self._constants[key]
