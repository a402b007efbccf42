"""Greedy generation, timed."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ..models.decoding import cache_of, decode, device_of
from .timing import wait_for

if TYPE_CHECKING:
    from torch import Tensor, nn


def greedy(model: nn.Module, ids: Tensor, new_tokens: int) -> tuple[list[int], float]:
    """Generate exactly `new_tokens` tokens after ids (1, n): (their ids, decode seconds).

    The first token comes from the prefill, which isn't timed; there is no stop at an end token.
    """
    import torch

    ids = ids.to(device_of(model))
    with torch.no_grad():
        out = model(input_ids=ids, use_cache=True)
        tokens = [out.logits[:, -1:].argmax(dim=-1)]
        wait_for(ids)
        start = time.perf_counter()
        for _ in range(new_tokens - 1):
            out = decode(model, tokens[-1], cache_of(out))
            tokens.append(out.logits[:, -1:].argmax(dim=-1))
        wait_for(ids)
        seconds = time.perf_counter() - start
    return torch.cat(tokens, dim=1)[0].tolist(), seconds
