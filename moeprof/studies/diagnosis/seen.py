"""One pass of a text through a model: gate logits, selections, and how it predicted."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ...measure.passes import documents_of, ids_for, patched
from ...measure.routing import by_layer, choose
from ...models.blocks import find_blocks
from ...texts.windows import HeldOut

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from ...backends.spec import Rule
    from ...null.resolve import AnyNull
    from ...routers.base import Router


class Seen(NamedTuple):
    """T tokens, L layers, E experts; the first token of each window is left out.

    logits : (L, T, E) float32, what a router sees of what the gates said; rules: as in `Pass`
    loss : (T,) nats, the loss of the token after; NaN for the last of a window
    documents : (T,) the index of each token's document; size : how many documents there are
    """

    logits: NDArray[np.float32]
    loss: NDArray[np.float64]
    documents: NDArray[np.int64]
    size: int
    rules: list[Rule]


class Selected(NamedTuple):
    """What a router selects on logits (L, T, E): counts, rejections (L, T) int32."""

    counts: NDArray[np.int32]
    rejections: NDArray[np.int32]


def see(
    model: nn.Module,
    text: HeldOut,
    router: Router | None = None,
    *,
    null: AnyNull | None = None,
    norm: str = "model",
    step: Callable[[], object] = lambda: None,
) -> Seen:
    """The text through the model patched with `router` (None: its own top-k)."""
    losses = []
    with patched(model, router, null=null, norm=norm) as handle, torch.inference_mode():
        calls: list[list[Any]] = [[] for _ in handle.layers]
        handle.on_routing(lambda layer, routing: calls[layer].append(routing.logits))
        for window in text.windows:
            ids = ids_for(model, [window])
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
            losses.append(np.append(loss.numpy(force=True), np.nan)[1:])
            step()
    if any(logits is None for layer in calls for logits in layer):
        raise ValueError("the model's gates give no logits, so there is nothing to diagnose")
    blocks = find_blocks(model)
    logits = np.stack(
        [
            block.choice_logits(torch.cat([z[1:] for z in layer])).numpy()
            for block, layer in zip(blocks, calls, strict=True)
        ]
    )
    sizes = np.array([window.ids.shape[1] for window in text.windows])
    later = np.ones(sizes.sum(), bool)
    later[np.cumsum(sizes) - sizes] = False
    documents, rules = documents_of(text)[later], [block.choice_rule() for block in blocks]
    return Seen(logits, np.concatenate(losses), documents, len(text.documents), rules)


def select(router: Router, seen: Seen, null: AnyNull | None) -> Selected:
    """The router on what was seen, through C; null: a Null, or None for `normal`."""
    layers = zip(by_layer(router, null, len(seen.logits)), seen.logits, seen.rules, strict=True)
    found = [
        choose(scalar, torch.from_numpy(z), own, "none", 1, rule)[2:]
        for (scalar, own), z, rule in layers
    ]
    return Selected(*(np.stack([f[i].numpy() for f in found]) for i in range(2)))


def entropy(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """(T,) nats: the entropy of the softmax of logits (T, E)."""
    z = torch.from_numpy(logits).double()
    log_p = torch.log_softmax(z, -1)
    return -(log_p.exp() * torch.where(log_p > -torch.inf, log_p, 0)).sum(-1).numpy()
