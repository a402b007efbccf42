"""How well a model predicts the next token of a text."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..models.decoding import device_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..texts.windows import HeldOut


def nats(model: nn.Module, ids: Tensor) -> float:
    """−Σ ln P(token | those before it in the window) for token ids (1, n), without the first."""
    import torch

    ids = ids.to(device_of(model))
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()


def evaluate(
    model: nn.Module, heldout: HeldOut, step: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    """Perplexity per predicted token and bits per byte; `step` is called after every window."""
    by_document = [0.0] * len(heldout.documents)
    for window in heldout.windows:
        by_document[window.document] += nats(model, window.ids)
        step()
    total = sum(by_document)
    predicted = sum(window.ids.shape[1] - 1 for window in heldout.windows)
    num_bytes = sum(window.num_bytes for window in heldout.windows)
    return {
        "perplexity": math.exp(total / predicted),
        "bits_per_byte": total / math.log(2) / num_bytes,
        "nats_by_document": by_document,
    }
