"""What a backend is told of a router at one layer: made once a layer, used in every step."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np

from .. import _C

AFFINITIES = ("softmax", "sigmoid", "sqrt_softplus", "sparsemixer")

# Of the histograms of scores that a null's tables are made from (moeprof/null/tables.py): their
# range, in bins of which so many are one unit wide; how many of the largest scores are kept.
LOW, HIGH, BINS_PER_UNIT = -32, 32, 128
BINS = (HIGH - LOW) * BINS_PER_UNIT
LARGEST = 1024

Made = TypeVar("Made")


class Rule(NamedTuple):
    """What a model makes of its router's logits (T, E), besides how many experts it takes.

    The score that a model computes from an expert's logit is its *affinity*. Experts are chosen
    by affinity plus bias, and weighted by their affinities. The formulas are in csrc/rule.h.

    affinity : one of AFFINITIES
    bias : (E,) float32, added to what experts are chosen by; None for none
    on_logits : the bias is added to the logits, and experts are chosen by these
    groups, top_groups, best : experts lie in `groups` groups, of which a token may use the
        `top_groups` best, by the sum of the `best` largest of each
    zeroed : a token may use those of other groups too, which are chosen by 0
    epsilon, floor : weights that sum to 1 are divided by max(sum + epsilon, floor)
    scale : of all weights
    expert_scale : (E,) float32, of each expert's weight; None for none
    rounds : weights are rounded to the dtype of the hidden states, else they are float32
    jitter : of sparsemixer: how near the best logit another must be, to share the weight
    """

    affinity: str = "softmax"
    bias: Any = None
    on_logits: bool = False
    groups: int = 1
    top_groups: int = 1
    best: int = 1
    zeroed: bool = False
    epsilon: float = 0.0
    floor: float = 0.0
    scale: float = 1.0
    expert_scale: Any = None
    rounds: bool = True
    jitter: float = 0.0

    def eligible(self, num_experts: int) -> int:
        """How many of E experts a token may use."""
        return num_experts if self.zeroed else num_experts // self.groups * self.top_groups


PLAIN = Rule()


class RouteSpec:
    """A router, its null, the model's rule and how weights are scaled, for a layer of so many
    experts.

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
    rule : Rule
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
        rule: Rule = PLAIN,
        *,
        num_experts: int,
    ):
        self.router, self.parameters = router, parameters
        self.min_k, self.max_k, self.temperature = min_k, max_k, temperature
        self.norm, self.norm_k = norm, norm_k
        self.null, self.table, self.rule = null, table, rule
        self.num_experts = num_experts
        self._made: dict[Any, Any] = {}

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What `_C.RouteSpec` takes."""
        return (
            self.router,
            self.parameters,
            self.min_k,
            self.max_k,
            self.temperature,
            self.norm,
            self.norm_k,
            self.null,
            self.table,
            tuple(self.rule),
        )

    def made(self, key: Any, make: Callable[[], Made]) -> Made:
        """What a backend makes of the spec, once for each key."""
        found: Made | None = self._made.get(key)
        if found is None:
            found = self._made[key] = make()
        return found

    def in_c(self, dtype: str) -> Any:
        """The `_C.RouteSpec` for hidden states of this dtype; ValueError for a spec that can't
        be."""
        return self.made(dtype, lambda: _C.RouteSpec(self.arguments, dtype, self.num_experts))

    def operands(self) -> tuple[str, Any, Any]:
        """The same for an operator of torch, which takes texts and arrays: see `from_operands`."""
        *plain, (form, score, p_table), table, rule = self.arguments
        lists = [value.tolist() if isinstance(value, np.ndarray) else value for value in rule]
        text = json.dumps(
            [*plain, form, score, self.num_experts, lists],
            default=np.generic.item,  # of a config that holds NumPy's numbers
        )
        return text, p_table, table

    @classmethod
    def from_operands(cls, text: str, p_table: Any, table: Any) -> "RouteSpec":
        router, parameters, *numbers, form, score, num_experts, rule = json.loads(text)
        values: Any = [np.array(v, np.float32) if isinstance(v, list) else v for v in rule]
        min_k, max_k, temperature, norm, norm_k = numbers
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
            Rule(*values),
            num_experts=num_experts,
        )


def topk_spec(rule: Rule, num_experts: int, top_k: int = 1, norm: str = "none") -> RouteSpec:
    """Of a model's own top-k by its rule."""
    null = ("normal", "logit", None)
    k = (float(top_k),)
    return RouteSpec(
        "topk", k, top_k, top_k, 1.0, norm, top_k, null, None, rule, num_experts=num_experts
    )


def max_k_of(text: str) -> int:
    """The max_k in what `RouteSpec.operands` gave."""
    max_k: int = json.loads(text)[3]
    return max_k
