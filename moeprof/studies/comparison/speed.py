"""Decode speed of the cells: batch 1, all of them in turn, in an order drawn anew each round."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...measure.generate import greedy
from ...patching.patch import patch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ...null.resolve import AnyNull


NEW_TOKENS = 16
ROUNDS = 3  # one prompt each


def decode_speeds(
    model: nn.Module,
    prompts: Sequence[Tensor],
    timed: Sequence[tuple[dict[str, Any], Any, AnyNull | None]],
    *,
    seed: int = 0,
    new_tokens: int = NEW_TOKENS,
    rounds: int = ROUNDS,
) -> None:
    """Write "tokens_per_s" into cells: the median over the rounds of a cell's own prompts.

    prompts: (1, n) token ids, one for each round; timed: [(cell, router, null)]. What an
    interruption leaves unfinished is not written.
    """
    draw = random.Random(seed)
    order = list(timed)
    seconds: dict[int, list[float]] = {id(cell): [] for cell, *_ in timed}
    prompts = prompts[:rounds]
    if not prompts:
        return
    greedy(model, prompts[0], 2)  # uncounted: the first calls pay for page faults
    for ids in prompts:
        draw.shuffle(order)
        for cell, router, null in order:
            with patch(model, router, null=null):
                seconds[id(cell)].append(greedy(model, ids, new_tokens + 1)[1])
    for cell, *_ in timed:
        cell["tokens_per_s"] = new_tokens / statistics.median(seconds[id(cell)])
