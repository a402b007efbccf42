"""Decode speed of routers: batch 1, all of them in turn, in an order drawn anew each round."""

from __future__ import annotations

import random
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
    new_tokens: int = NEW_TOKENS,
    step: Callable[[], object] = lambda: None,
) -> list[list[float]]:
    """Tokens per second of each (router, null) in each round, all of them in turn in every one.

    prompts: (1, n) token ids, one for each round; new_tokens: that are timed; step is called after
    each generation.
    """
    draw = random.Random(seed)
    order = list(range(len(timed)))
    speeds: list[list[float]] = [[] for _ in timed]
    greedy(model, prompts[0], 2)  # uncounted: the first calls pay for page faults
    for ids in prompts:
        draw.shuffle(order)
        for place in order:
            router, null = timed[place]
            with patch(model, router, null=null):
                speeds[place].append(new_tokens / greedy(model, ids, new_tokens + 1)[1])
            step()
    return speeds
