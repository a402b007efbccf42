"""The families of MoE blocks that `moeprof.patch` knows, a record each.

To add one whose blocks hold a gate and experts and do nothing else: a record here, and a
row in tests/zoo.py.
"""

import sys
from functools import lru_cache

from torch import nn

from .base import Family, Layout
from .listed import Listed
from .packed import Packed

FAMILIES = (
    Family(
        name="olmoe",
        module="transformers.models.olmoe.modeling_olmoe",
        block="OlmoeSparseMoeBlock",
        router="OlmoeTopKRouter",
        experts="OlmoeExperts",
        expert="OlmoeMLP",
    ),
)


def family_of(block: nn.Module) -> Layout | None:
    """How to read this block, or None if it is of no family that is known here."""
    family = next((f for f in FAMILIES if f.is_of(block)), None)
    return None if family is None else _layout(family)


@lru_cache
def _layout(family: Family) -> Layout:
    """In the layout of the transformers that the family's module is of."""
    is_packed = hasattr(sys.modules[family.module], family.experts)
    return Packed(family) if is_packed else Listed(family)
