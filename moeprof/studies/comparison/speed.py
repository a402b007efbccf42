"""Decode speed of settings: batch 1, all in turn, in an order that is drawn anew each round."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...measure.generate import greedy
from ...patching.patch import patch
from ...quantizing.quantize import experts_in
from ..sweep.compared import interval

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ...null.resolve import AnyNull


NEW_TOKENS = 16
ROUNDS = 3  # one prompt each, where there are so many
SPEED = "tokens_per_s"  # of a row: the median of its rounds, with SPEED_low and _high


class Timed(NamedTuple):
    """A setting to time: a router, None for the model's own; experts in 8 or 4 bits, or as is."""

    router: Any
    null: AnyNull | None = None
    bits: int | None = None


def decode_speeds(
    model: nn.Module,
    prompts: Sequence[Tensor],
    timed: Sequence[Timed],
    *,
    seed: int = 0,
    new_tokens: int = NEW_TOKENS,
    step: Callable[[], object] = lambda: None,
) -> list[list[float]]:
    """Tokens per second of each setting in each round, all of them in turn in every one.

    In a round those with the same `bits` come one after the other: experts are made for them once.

    prompts: (1, n) token ids, one for each round; new_tokens: that are timed; step is called after
    each generation.
    """
    draw = random.Random(seed)
    order = list(range(len(timed)))
    speeds: list[list[float]] = [[] for _ in timed]
    for ids in prompts:
        draw.shuffle(order)
        for bits in dict.fromkeys(timed[place].bits for place in order):
            with experts_in(model, bits) if bits else nullcontext():
                greedy(model, prompts[0], 2)  # uncounted: the first calls pay for page faults
                for place in order:
                    if timed[place].bits == bits:
                        with patch(model, timed[place].router, null=timed[place].null):
                            seconds = greedy(model, ids, new_tokens + 1)[1]
                        speeds[place].append(new_tokens / seconds)
                        step()
    return speeds


def summary(rounds: Sequence[float]) -> dict[str, float]:
    """{SPEED, SPEED_low, SPEED_high}: the median of the rounds and their quartiles."""
    median, low, high = np.percentile(rounds, [50, 25, 75]).tolist()
    return {SPEED: median, f"{SPEED}_low": low, f"{SPEED}_high": high}


def speed_in_words(row: Mapping[str, Any]) -> str:
    """ "112 (108 to 121)" tokens per second; "" where they weren't measured."""
    return interval(row, SPEED, ".0f")
