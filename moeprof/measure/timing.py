"""Contenders in turn, and what their times come to."""

import random
import time

import numpy as np


def interleave(contenders, rounds, prepare, bar):
    """{name: times} of functions that run once each, in turn, in every round.

    Their order is drawn for each round, so that none is always the one after another's caches.
    ``prepare(name)`` gives the arguments of the next call, outside of its time. A first round
    is not counted.
    """
    seconds = {name: [] for name in contenders}
    order, draw = list(contenders.items()), random.Random(0)
    for number in range(rounds + 1):
        draw.shuffle(order)
        for name, call in order:
            arguments = prepare(name)
            start = time.perf_counter()
            result = call(*arguments)
            elapsed = time.perf_counter() - start
            del result  # not within the time of the next one
            if number:
                seconds[name].append(elapsed)
        bar.step()
    return {name: _summary(values) for name, values in seconds.items()}


def _summary(seconds):
    best, lower, median, upper = np.percentile(seconds, [0, 25, 50, 75]) * 1e3
    return {"median_ms": median, "best_ms": best, "lower_ms": lower, "upper_ms": upper}


def steps(rounds):
    """Steps of the bar for measurements of these numbers of rounds, with the uncounted ones."""
    return sum(n + 1 for n in rounds)


def ratio(times, name, other):
    """The median of one contender over that of another."""
    return times[name]["median_ms"] / times[other]["median_ms"]
