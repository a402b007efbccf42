"""What a backend is told of a router at one layer: made once a layer, used in every step."""

import json
from typing import Any

from .. import _C


class RouteSpec:
    """A router, its null and how its weights are scaled, for a layer of so many experts.

    Parameters
    ----------
    router : str
        A line of csrc/routers.def.
    parameters : tuple of float
        Its own, in the order that the router's file says.
    min_k, max_k : int
    temperature : float
    norm : {"none", "sum", "mass"}
    norm_k : int
        The top_k that "mass" refers to.
    null : (form, score, table or None)
        `LayerNull.spec`.
    table : float64 array or None
        What the router wants besides.
    num_experts : int
    """

    def __init__(
        self,
        router: str,
        parameters: tuple[float, ...],
        min_k: int,
        max_k: int,
        temperature: float,
        norm: str,
        norm_k: int,
        null: tuple[str, str, Any],
        table: Any,
        *,
        num_experts: int,
    ):
        self.arguments = (router, parameters, min_k, max_k, temperature, norm, norm_k, null, table)
        self.max_k, self.num_experts = max_k, num_experts
        self._in_c: dict[str, Any] = {}

    def in_c(self, dtype: str) -> Any:
        """The `_C.RouteSpec` for logits, or hidden states, of this dtype."""
        found = self._in_c.get(dtype)
        if found is None:
            found = self._in_c[dtype] = _C.RouteSpec(self.arguments, dtype, self.num_experts)
        return found

    def operands(self) -> tuple[str, Any, Any]:
        """The same for an operator of torch, which takes texts and arrays: see `from_operands`."""
        *plain, (form, score, p_table), table = self.arguments
        return json.dumps([*plain, form, score, self.num_experts]), p_table, table

    @classmethod
    def from_operands(cls, text: str, p_table: Any, table: Any) -> "RouteSpec":
        router, parameters, min_k, max_k, temperature, norm, norm_k, form, score, num_experts = (
            json.loads(text)
        )
        return cls(
            router,
            tuple(parameters),
            min_k,
            max_k,
            temperature,
            norm,
            norm_k,
            (form, score, p_table),
            table,
            num_experts=num_experts,
        )


def max_k_of(text: str) -> int:
    """The max_k in what `RouteSpec.operands` gave."""
    max_k: int = json.loads(text)[3]
    return max_k
