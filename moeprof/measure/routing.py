"""Routing in Python by way of C: for passes that change a routing before it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import _C
from ..backends.cpu import get_num_threads
from ..backends.ops import as_array
from ..models.find import adapter_of, find_moe_blocks

if TYPE_CHECKING:
    from torch import nn

    from ..null.layers import LayerNull, TokenNull
    from ..null.resolve import AnyNull
    from ..routers.base import Router


def model_norm(model: nn.Module) -> tuple[str, int]:
    """(norm, top_k): how the model weighs its experts ("sum" or "none"), and how many it takes."""
    _, block = find_moe_blocks(model)[0]
    top_k, norm_topk_prob = adapter_of(block).settings(block)
    return ("sum" if norm_topk_prob else "none"), top_k


def by_layer(
    router: Router, null: AnyNull | None, num_layers: int
) -> list[tuple[Router, LayerNull | TokenNull | None]]:
    """[(the router with scalar parameters, its LayerNull)] of each layer, as `patch` has them.

    null: a Null (or one by token); None, or a router that works on none, gives None.
    """
    adapted = router.adapt(null) if router.wants_null and null is not None else None
    return [
        (router.at(layer, num_layers), None if adapted is None else adapted.layer(layer))
        for layer in range(num_layers)
    ]


def choose(
    router: Router, logits: Tensor, null: LayerNull | TokenNull | None, norm: str, norm_k: int
) -> tuple[Tensor, ...]:
    """(weights (T, k), experts (T, k), counts (T,), rejections (T,)) as a patched layer has them.

    router: a Router with scalar parameters; logits (T, E); null: its LayerNull, or None.
    """
    spec = router.spec(logits.shape[1], norm=norm, norm_k=norm_k, null=null)
    rows = as_array(logits.float())
    *routing, _ = _C.route(rows, "float32", spec, get_num_threads(), False)
    return tuple(map(torch.from_numpy, routing))
