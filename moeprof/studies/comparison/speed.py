"""Decode speed of the cells: batch 1, all of them in turn, in an order drawn anew each round."""

import random
import statistics

from ...measure.generate import greedy
from ...patching.patch import patch

NEW_TOKENS = 16
ROUNDS = 3  # one prompt each


def decode_speeds(model, prompts, timed, *, seed=0, new_tokens=NEW_TOKENS, rounds=ROUNDS):
    """Write "tokens_per_s" into cells: the median over the rounds of a cell's own prompts.

    prompts: (1, n) token ids, one for each round; timed: [(cell, router, null)]. What an
    interruption leaves unfinished is not written.
    """
    draw = random.Random(seed)
    order, seconds = list(timed), {id(cell): [] for cell, *_ in timed}
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
