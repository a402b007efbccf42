"""Routing in Python by way of C: for passes that change a routing before it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from ..backends.c import C
from ..backends.spec import PLAIN, Rule

if TYPE_CHECKING:
    from ..null.layers import LayerNull, TokenNull
    from ..null.model import Null
    from ..null.resolve import AnyNull
    from ..routers.base import Router


def by_layer(
    router: Router, null: AnyNull | None, num_layers: int
) -> list[tuple[Router, LayerNull | TokenNull | None]]:
    """[(the router with scalar parameters, its LayerNull)] of each layer, as `patch` has them.

    null: a Null (or one by token); None, or a router that works on none, gives None.
    """
    adapted: Null | TokenNull | None = None
    if router.wants_null and null is not None:
        adapted = cast("Null | TokenNull", router.adapt(null))  # of all layers, as it was
    return [
        (router.at(layer, num_layers), None if adapted is None else adapted.layer(layer))
        for layer in range(num_layers)
    ]


def choose(
    router: Router,
    logits: Tensor,
    null: LayerNull | TokenNull | None,
    norm: str,
    norm_k: int,
    rule: Rule = PLAIN,
) -> tuple[Tensor, ...]:
    """(weights (T, k), expert_ids (T, k), counts, rejections (T,)), as a patched layer has them.

    router: a Router with scalar parameters; logits (T, E); null: its LayerNull, or None; rule: what
    the model makes of its logits.
    """
    spec = router.spec(logits.shape[1], norm=norm, norm_k=norm_k, null=null, rule=rule)
    chosen = C.route(logits.float().cpu(), spec, torch.float32)
    return tuple(part.to(logits.device) for part in chosen)


def affinities(logits: Tensor, rule: Rule) -> Tensor:
    """(T, E): the scores that the model computes from its logits, see `Rule`; of sparsemixer, whose
    depend on the experts chosen before, the softmax that they are shares of."""
    if rule.affinity == "sigmoid":
        return torch.sigmoid(logits)
    if rule.affinity == "sqrt_softplus":
        return torch.nn.functional.softplus(logits).sqrt()
    return torch.softmax(logits, -1)
