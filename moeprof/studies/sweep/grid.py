"""The configurations that are compared: the model's own top-k, and BH by alpha and max_k."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from ...routers import BH, TopK

if TYPE_CHECKING:
    from ...routers.base import Router


ALPHAS = (0.01, 0.05, 0.10, 0.20)
MAX_KS = (4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Configuration:
    """One way to route: "topk" takes `max_k` experts, "bh" up to `max_k` of them at `alpha`."""

    name: str
    routing_type: str
    alpha: float | None = None
    max_k: int | None = None

    def __post_init__(self) -> None:
        if self.routing_type not in ("topk", "bh"):
            raise ValueError(
                f'configuration {self.name}: routing_type must be "topk" or "bh", '
                f"got {self.routing_type!r}"
            )
        if self.max_k is None:
            raise ValueError(f"configuration {self.name}: max_k is missing")
        if (self.alpha is None) != (self.routing_type == "topk"):
            raise ValueError(f'configuration {self.name}: alpha belongs to "bh", and only to it')

    def is_baseline(self, top_k: int) -> bool:
        """Whether this is the original routing of a model with this top_k."""
        return self.routing_type == "topk" and self.max_k == top_k

    def router(self, top_k: int) -> Router | None:
        """What `moeprof.patch` takes; None is the model's own top_k, on the same kernels."""
        if self.alpha is not None:
            return BH(self.alpha, max_k=self.max_k)
        return None if self.max_k is None or self.max_k == top_k else TopK(self.max_k)


def configurations(
    num_experts: int = 64,
    top_k: int = 8,
    alphas: Sequence[float] = ALPHAS,
    max_ks: Sequence[int] = MAX_KS,
) -> list[Configuration]:
    """The baseline, then BH by max_k and alpha: 21 of them for 64 experts or more.

    A max_k above num_experts is left out (`dropped_max_ks`). A name has alpha's digits without
    the point, two decimals at least: a005 is 0.05, a0025 is 0.025.

    >>> [c.name for c in configurations()][:3]
    ['topk_8_baseline', 'bh_k4_a001', 'bh_k4_a005']
    """
    baseline = Configuration(f"topk_{top_k}_baseline", "topk", None, top_k)
    return [baseline] + [
        Configuration(f"bh_k{max_k}_a{digits(alpha)}", "bh", alpha, max_k)
        for max_k in max_ks
        if max_k <= num_experts
        for alpha in alphas
    ]


def digits(alpha: float) -> str:
    """0.2 -> "020", 0.025 -> "0025": different for every alpha."""
    text = format(Decimal(repr(float(alpha))), "f")
    whole, _, decimals = text.partition(".")
    return whole + decimals.ljust(2, "0")


def dropped_max_ks(num_experts: int, max_ks: Sequence[int] = MAX_KS) -> list[int]:
    """The values of max_k that a model with so few experts can't have."""
    return [max_k for max_k in max_ks if max_k > num_experts]


def as_configuration(
    config: Configuration | Mapping[str, Any] | str, num_experts: int, top_k: int
) -> Configuration:
    """A Configuration from one, from its fields as a dict, or from a name of `configurations`."""
    if isinstance(config, Configuration):
        return config
    if isinstance(config, dict):
        return Configuration(**config)
    known = {c.name: c for c in configurations(num_experts, top_k)}
    if config not in known:
        raise ValueError(f"unknown configuration {config!r}; there are {', '.join(known)}")
    return known[config]
