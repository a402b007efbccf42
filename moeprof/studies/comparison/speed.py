"""Decode speed of routers: batch 1, all of them in turn, in an order drawn anew each round."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ...measure.generate import greedy
from ...patching.patch import patch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ...null.resolve import AnyNull


NEW_TOKENS = 16
ROUNDS = 3  # one prompt each, where there are so many


def decode_speeds(
    model: nn.Module,
    prompts: Sequence[Tensor],
    timed: Sequence[tuple[Any, AnyNull | None]],
    *,
    seed: int = 0,
    step: Callable[[], object] = lambda: None,
) -> list[float]:
    """Tokens per second of each (router, null): the median over the rounds of its own prompts.

    prompts: (1, n) token ids, one for each round; step is called after each generation.
    """
    draw = random.Random(seed)
    order = list(range(len(timed)))
    seconds: list[list[float]] = [[] for _ in timed]
    greedy(model, prompts[0], 2)  # uncounted: the first calls pay for page faults
    for ids in prompts:
        draw.shuffle(order)
        for place in order:
            router, null = timed[place]
            with patch(model, router, null=null):
                seconds[place].append(greedy(model, ids, NEW_TOKENS + 1)[1])
            step()
    return [NEW_TOKENS / statistics.median(each) for each in seconds]
