"""Contenders in turn, and what their times come to."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from torch import Tensor

    from ..show.console import Bar


# {contender: {"median_ms", "best_ms", …, and of each round "each_ms"}}
Times = Mapping[str, Mapping[str, Any]]


def wait_for(tensor: Tensor) -> None:
    """Until the device of a tensor has done what it was given: it works behind the host."""
    if not tensor.is_cpu:
        import torch

        torch.accelerator.synchronize(tensor.device)


def interleave(
    contenders: Mapping[str, Callable[..., object]],
    rounds: int,
    prepare: Callable[[str], Iterable[Any]],
    bar: Bar,
) -> dict[str, dict[str, Any]]:
    """{name: times} of functions that run once each, in turn, in every round.

    Their order is drawn for each round, so that none is always the one after another's caches.
    ``prepare(name)`` gives the arguments of the next call, outside of its time. A first round
    is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
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


def _summary(seconds: list[float]) -> dict[str, Any]:
    each = np.multiply(seconds, 1e3)
    best, lower, median, upper = np.percentile(each, [0, 25, 50, 75]).tolist()
    times = {"median_ms": median, "best_ms": best, "lower_ms": lower, "upper_ms": upper}
    return times | {"each_ms": each.tolist()}


def steps(rounds: Iterable[int]) -> int:
    """Steps of the bar for measurements of these numbers of rounds, with the uncounted ones."""
    return sum(n + 1 for n in rounds)


class Ratio(NamedTuple):
    """A ratio within each round: its median over the rounds, and its quartiles.

    What slows a whole round down, such as memory that others use, falls out of it.
    """

    median: float
    lower: float
    upper: float

    @property
    def quartiles(self) -> str:
        return f"{self.lower:.2f}-{self.upper:.2f}"


def ratio(times: Times, name: str, other: str) -> Ratio:
    """The time of one contender over that of another."""
    return over_rounds(np.divide(times[name]["each_ms"], times[other]["each_ms"]))


def over_rounds(values: ArrayLike) -> Ratio:
    """What values of each round come to."""
    lower, median, upper = np.percentile(np.asarray(values), [25, 50, 75]).tolist()
    return Ratio(median, lower, upper)
