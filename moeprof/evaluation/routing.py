"""Routing in Python by way of C: for passes that change a routing before it runs."""

import torch
from torch import Tensor

from .. import _C
from ..adapters import adapter_of, find_moe_blocks
from ..cpu import get_num_threads
from ..experts import as_array


def model_norm(model) -> tuple[str, int]:
    """(norm, top_k): how the model weighs its experts ("sum" or "none"), and how many it takes."""
    _, block = find_moe_blocks(model)[0]
    top_k, norm_topk_prob = adapter_of(block).settings(block)
    return ("sum" if norm_topk_prob else "none"), top_k


def by_layer(router, null, num_layers: int) -> list[tuple]:
    """[(the router with scalar parameters, its LayerNull)] of each layer, as `patch` has them.

    null: a Null (or one by token); None, or a router that works on none, gives None.
    """
    adapted = router.adapt(null) if router.wants_null and null is not None else None
    return [
        (router.at(layer, num_layers), None if adapted is None else adapted.layer(layer))
        for layer in range(num_layers)
    ]


def choose(router, logits: Tensor, null, norm: str, norm_k: int) -> tuple[Tensor, ...]:
    """(weights (T, k), experts (T, k), counts (T,), rejections (T,)) as a patched layer has them.

    router: a Router with scalar parameters; logits (T, E); null: its LayerNull, or None.
    """
    spec = router.spec(logits.shape[1], norm=norm, norm_k=norm_k, null=null)
    rows = as_array(logits.float())
    spec = _C.RouteSpec(spec, "float32", logits.shape[1])
    *routing, _ = _C.route(rows, spec, get_num_threads(), False)
    return tuple(map(torch.from_numpy, routing))
